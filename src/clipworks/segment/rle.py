"""COCO's run-length code of a binary mask: runs of 0 and 1 down the columns, as numbers and as the short string."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ClipworksError


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) as `{"size": [H, W], "counts": str}`, as pycocotools writes it.

    >>> encode(np.array([[0, 1], [1, 1]], bool))
    {'size': [2, 2], 'counts': '13'}
    """
    mask = np.asarray(mask, bool)
    if mask.ndim != 2:
        raise ClipworksError(f"mask must have two dimensions. Got shape {mask.shape}.")
    line = mask.flatten(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(line)) + 1
    counts = np.diff(np.concatenate([[0], edges, [line.size]])).tolist()
    if line.size and line[0]:
        counts.insert(0, 0)
    return {"size": list(mask.shape), "counts": _pack(counts)}


def decode(code: dict[str, Any]) -> np.ndarray:
    """The mask of a code; counts may be the string or a list of numbers."""
    counts = code["counts"]
    counts = _unpack(counts) if isinstance(counts, str) else list(counts)
    height, width = code["size"]
    if sum(counts) != height * width or min(counts, default=0) < 0:
        raise ClipworksError(f"counts must add up to {height} x {width}. Got {sum(counts)}.")
    line = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return line.reshape((height, width), order="F")


def _pack(counts: list[int]) -> str:
    """Five bits a character, the sixth says that more follow; from the fourth count on the difference to two before."""
    letters = []
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            letters.append(chr((bits | 32 if more else bits) + 48))
    return "".join(letters)


def _unpack(text: str) -> list[int]:
    counts: list[int] = []
    place = 0
    while place < len(text):
        value = shift = 0
        more = True
        while more and place < len(text):
            bits = ord(text[place]) - 48
            value |= (bits & 31) << shift
            more, shift, place = bool(bits & 32), shift + 5, place + 1
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts
