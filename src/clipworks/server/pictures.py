"""`Gallery`: pictures of a collection by row, always re-encoded: no file leaves the server as it is.

What a key points to may have changed since it was embedded. A file that is no image, that has too many pixels, or that
lies outside its folder now (a link) has no picture.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from pathlib import Path

from PIL import Image

from ..data.decode import Limits, decode
from ..errors import BadImage
from .shelf import View

LIMITS = Limits(max_bytes=64 * 2**20, max_pixels=20_000_000)
KEPT = 64 * 2**20  # bytes of recent pictures that are kept
SIDES = (64, 2048)


class Gallery:
    """Pictures, with the most recent ones kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self._size = 0

    def jpeg(self, view: View, row: int, side: int) -> bytes | None:
        """The picture of a row with at most `side` pixels a side, as JPEG without metadata."""
        key = (view.collection.version, view.collection.keys[row], side)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        image = picture(view, row, side)
        if image is None:
            return None
        data = encoded(image, side)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = data
                self._size += len(data)
            while self._size > KEPT:
                self._size -= len(self._kept.popitem(last=False)[1])
        return data


def picture(view: View, row: int, side: int | None = None) -> Image.Image | None:
    """The decoded picture of a row, None where there is none any more."""
    key = view.collection.keys[row]
    source = view.collection.sources([key])[key]
    if not source:
        return None
    place = _inside(Path(source), key)
    try:
        if place is not None:
            return decode(place, key=key, limits=LIMITS, min_side=side)
        if os.path.isdir(source):
            return None
        from ..plot.pictures import _opened

        found = dict(_opened(source, {key})).get(key)
        return None if found is None else decode(found, key=key, limits=LIMITS, min_side=side)
    except BadImage:
        return None


def _inside(folder: Path, key: str) -> Path | None:
    """The file of a key in a folder, if it is a file and really lies there."""
    try:
        root, place = folder.resolve(strict=True), (folder / key).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        return None
    return place if root.is_dir() and root in place.parents and place.is_file() else None


def encoded(image: Image.Image, side: int, quality: int = 85) -> bytes:
    """JPEG of an image with at most `side` pixels a side."""
    copy = image.convert("RGB")
    copy.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    out = io.BytesIO()
    copy.save(out, "JPEG", quality=quality)
    return out.getvalue()
