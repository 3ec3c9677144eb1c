"""`Item`: one image on its way into a collection, with what belongs to it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import BadImage
from .decode import DEFAULT_LIMITS, ImageSource, Limits, decode


@dataclass(frozen=True)
class Remote:
    """An image at an address that fsspec can open (`s3://...`, `gs://...`), read when it is asked for."""

    address: str

    def read(self) -> bytes:
        import fsspec

        with fsspec.open(self.address, "rb") as stream:
            return stream.read()


@dataclass
class Item:
    """One image with its key and what belongs to it; nothing is read or decoded until it is asked for.

    Attributes
    ----------
    key : unique name within its source; for files the relative path with forward slashes
    image : path, encoded bytes, PIL image, uint8 array, or `Remote`, which `source` reads; None when `error` says why
        there is none
    caption, label : text and class that came with it, if any
    columns : further columns of a table or of a sidecar file
    mtime : modification time of the file in seconds since 1970, if there is a file
    error : why the source refused it (a URL, a path outside the folder ...); asking for the image raises it
    """

    key: str
    image: ImageSource | Remote | None = None
    caption: str | None = None
    label: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    mtime: float | None = None
    error: str | None = None

    def source(self) -> ImageSource:
        """The image as given, or `BadImage` when the source refused it."""
        if self.error is not None or self.image is None:
            raise BadImage(self.key, self.error or "has no image")
        if isinstance(self.image, Remote):
            try:
                return self.image.read()
            except Exception as error:  # every kind of store has errors of its own
                raise BadImage(self.key, f"cannot be read ({error})") from error
        return self.image

    def decode(self, *, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
        """The upright RGB image; raises `BadImage` with this item's key."""
        return decode(self.source(), key=self.key, limits=limits)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file's bytes (of mode, size and pixels for an image in memory), computed once, on request."""
        source = self.source()
        state = hashlib.sha256()
        if isinstance(source, (str, os.PathLike)):
            try:
                if not Path(source).is_file():  # opening a pipe would wait for ever
                    raise FileNotFoundError("no such regular file")
                with Path(source).open("rb") as stream:
                    while block := stream.read(1 << 20):
                        state.update(block)
            except (OSError, ValueError) as error:
                raise BadImage(self.key, f"cannot be read ({error})") from error
        elif isinstance(source, (bytes, bytearray, memoryview)):
            state.update(source)
        elif isinstance(source, Image.Image):
            state.update(f"{source.mode} {source.size}".encode())
            state.update(source.tobytes())
        else:
            state.update(f"{source.dtype} {source.shape}".encode())
            state.update(source.tobytes())
        return state.hexdigest()


def as_items(images: Any) -> list[Item]:
    """Return one image or many, in any form, as items; an error calls them by their path or their place in the list.

    Parameters
    ----------
    images : a path, encoded bytes, a PIL image, a uint8 array or tensor (H, W, 3), an item; a list of these, or an
        array or tensor (N, H, W, 3)

    Examples
    --------
    >>> [item.key for item in as_items(["a.jpg", np.zeros((2, 2, 3), np.uint8), Item("mine", "b.jpg")])]
    ['a.jpg', '1', 'mine']
    """
    images = images.cpu().numpy() if hasattr(images, "cpu") else images
    if isinstance(images, np.ndarray):
        images = images if images.ndim == 4 else [images]
    elif isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image | Item):
        images = [images]
    return [image if isinstance(image, Item) else
            Item(os.fspath(image) if isinstance(image, str | os.PathLike) else str(number), image)
            for number, image in enumerate(images)]  # fmt: skip


def text_key(name: str) -> str:
    """A key that is valid Unicode with forward slashes, also for file names that are not.

    >>> text_key("photos/caf\\udce9.jpg")
    'photos/caf\\\\udce9.jpg'
    """
    return valid_text(name.replace(os.sep, "/"))


def valid_text(value: str) -> str:
    """A string that every store can encode: bytes that were not UTF-8 become escapes."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")
