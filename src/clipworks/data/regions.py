"""Regions of an image: boxes with words, as an item carries them in a column, and what a crop or a flip makes of them.

A column "regions" holds a list of `{"box": [left, top, right, bottom], "text": "a red car"}`, or that list as JSON
text (a CSV file, a JSON file beside the image). Boxes are shares of width and height, so they mean the same whatever
size the image is decoded at; a "score" may stand beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ClipworksError
from .item import Item

COLUMN = "regions"
FORM = '{"box": [left, top, right, bottom] as shares of width and height, "text": words}'


@dataclass(frozen=True)
class Region:
    """A box and what is in it.

    Attributes
    ----------
    box : left, top, right, bottom, shares of width and height in [0, 1]
    text : words
    score : how sure whoever found it was
    """

    box: tuple[float, float, float, float]
    text: str
    score: float = 1.0


def regions_of(item: Item, column: str = COLUMN) -> list[Region]:
    """Return the regions of an item; none where the column is missing or empty.

    Raises
    ------
    ClipworksError
        If an entry is no region, naming the item.

    Examples
    --------
    >>> regions_of(Item("a.jpg", columns={"regions": '[{"box": [0, 0, 0.5, 1], "text": "a door"}]'}))[0].text
    'a door'
    """
    value: Any = item.columns.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            text = f"regions of {item.key!r} must be JSON, a list of {FORM}. Got {value[:60]!r}."
            raise ClipworksError(text) from None
    if value is None:
        return []
    if not isinstance(value, Iterable):
        raise ClipworksError(f"regions of {item.key!r} must be a list of {FORM}. Got {type(value).__name__}.")
    return [entry if isinstance(entry, Region) else _region(entry, item.key) for entry in value]


def _region(entry: Any, key: str) -> Region:
    try:
        left, top, right, bottom = (float(v) for v in entry["box"])
        region = Region((left, top, right, bottom), str(entry["text"]), float(entry.get("score", 1.0)))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ClipworksError(f"a region of {key!r} must be {FORM}. Got {str(entry)[:80]}.") from None
    if not (0 <= left < right <= 1 + 1e-6 and 0 <= top < bottom <= 1 + 1e-6) or not math.isfinite(region.score):
        raise ClipworksError(
            f"a box of {key!r} must be [left, top, right, bottom] with 0 <= left < right <= 1 and 0 <= top < bottom "
            f"<= 1: shares of width and height, no pixels. Got {list(entry['box'])}."
        )
    return region


def from_pixels(boxes: Iterable[Sequence[float]], width: float, height: float) -> list[tuple[float, ...]]:
    """Turn boxes (left, top, right, bottom) in pixels into shares, cut at the borders.

    >>> from_pixels([(10, 20, 60, 120)], width=100, height=100)
    [(0.1, 0.2, 0.6, 1.0)]
    """
    sides = (width, height, width, height)
    return [tuple(min(max(float(v) / s, 0.0), 1.0) for v, s in zip(box, sides, strict=True)) for box in boxes]


def seen(
    box: Sequence[float], window: Sequence[float], mirrored: bool = False
) -> tuple[tuple[float, float, float, float], float]:
    """Return a box as shares of a window, cut at its borders, and which share of the box's area that is.

    Parameters
    ----------
    box, window : left, top, right, bottom, in one unit
    mirrored : whether the window was flipped left to right afterwards

    >>> seen((0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.75, 1.0))
    ((0.0, 0.0, 0.5, 0.5), 0.5)
    """
    wide, tall = window[2] - window[0], window[3] - window[1]
    left, right = (min(max((box[i] - window[0]) / wide, 0.0), 1.0) for i in (0, 2))
    top, bottom = (min(max((box[i] - window[1]) / tall, 0.0), 1.0) for i in (1, 3))
    if mirrored:
        left, right = 1 - right, 1 - left
    area = (box[2] - box[0]) * (box[3] - box[1])
    left_over = (right - left) * wide * (bottom - top) * tall
    return (left, top, right, bottom), left_over / area if area > 0 else 0.0
