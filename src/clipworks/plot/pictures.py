"""From a collection's key back to its picture, for sheets; None where the picture can no longer be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import BadImage, ClipworksError

SIDE = 512  # pixels that are enough for a sheet; large JPEGs are decoded at a fraction of their size


def pictures(collection: Any, keys: Iterable[str]) -> Callable[[str], Image.Image | None]:
    """Return a function from some keys of a collection to their pictures.

    Parameters
    ----------
    collection : an open `Collection`; it remembers which source each row came from
    keys : the keys that will be asked for; of tables and archives only these are kept in memory
    """
    asked = {key: source for key, source in collection.sources(keys).items() if source}
    elsewhere = {s for key, s in asked.items() if _file(key, s) is None}
    found: dict[str, Any] = {}
    for source in elsewhere:
        found.update(_opened(source, {key for key in asked if asked[key] == source}))

    def picture(key: str) -> Image.Image | None:
        place = _file(key, asked.get(key, ""))
        return readable(place if place is not None else found.get(key), key)

    return picture


def source_pictures(source: Any, keys: Iterable[str]) -> Callable[[str], Image.Image | None]:
    """The same for images that are in no collection: a folder, table, archive ... as `open_source` takes it."""
    found = dict(_opened(source, set(keys)))
    return lambda key: readable(found.get(key), key)


def readable(image: Any, key: str) -> Image.Image | None:
    """The decoded image, or None if it cannot be used."""
    from ..data.decode import decode

    try:
        return None if image is None else decode(image, key=key, min_side=SIDE)
    except BadImage:
        return None


def _file(key: str, source: str) -> Path | None:
    """The file of a key in a folder, or of a key that is a path itself."""
    place = Path(source) / key if os.path.isdir(source) else Path(key)
    return place if place.is_file() else None


def _opened(source: Any, keys: set[str]) -> Iterable[tuple[str, Any]]:
    """Walk through a source until all keys are found; a source that is gone has none."""
    from ..data.sources import open_source

    left = set(keys)
    try:
        for item in open_source(source):
            if item.key in left and item.error is None:
                left.discard(item.key)
                yield item.key, item.image
            if not left:
                return
    except (ClipworksError, OSError):
        return
