"""Queries of several parts: words, images and vectors, added and taken away.

A query is the weighted sum of the unit vectors of its parts, brought to length one:

    q = unit( sum_i w_i unit(v_i) ),     w = 1 of what is wanted, -0.5 of a negative, -1 of what is taken away

All texts of a CLIP model share a large common part, and so do all images. Taking words away from words with the weight
-1 cancels it: "a horse with stripes" minus "a horse" leaves what the stripes add. A negative of -0.5 keeps half of it
and only pushes the hits away from what is not wanted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ClipworksError

NEGATIVE, MINUS = -0.5, -1.0


@dataclass
class Query:
    """What is looked for.

    Attributes
    ----------
    parts : strings are words; paths, bytes, PIL images and uint8 arrays are images; other arrays are vectors
    weights : one number per part
    """

    parts: list[Any]
    weights: list[float]

    def __str__(self) -> str:
        signed = [f"{'-' if w < 0 else '+'} {shown(p)}" for w, p in zip(self.weights, self.parts, strict=True)]
        return " ".join(signed).removeprefix("+ ")


def make_query(
    query: Any = None,
    *,
    image: str | Path | None = None,
    negative: str | Sequence[str] | None = None,
    minus: str | Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
) -> Query:
    """Put a query together.

    Parameters
    ----------
    query : words, an image, a vector, or a list of any of these
    image : path of an image that joins the query
    negative : words to move away from; each counts -0.5
    minus : words that are taken away in full; each counts -1
    weights : one number per part, in the order query, image, negative, minus

    Examples
    --------
    >>> str(make_query("a horse with stripes", minus="a horse"))
    'a horse with stripes - a horse'
    """
    wanted = parts_of(query)
    if image is not None:
        wanted.append(Path(image) if isinstance(image, str) else image)
    away, taken = _words(negative), _words(minus)
    parts = [*wanted, *away, *taken]
    if not parts:
        raise ClipworksError("query must be words, an image or a vector. Got nothing.")
    given = [1.0] * len(wanted) + [NEGATIVE] * len(away) + [MINUS] * len(taken)
    if weights is not None:
        given = [float(w) for w in weights]
    if len(given) != len(parts):
        raise ClipworksError(f"weights must have one number per part of the query ({len(parts)}). Got {len(given)}.")
    return Query(parts, given)


def compose(vectors: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return the weighted sum of unit vectors (n, dim), as one float32 vector (dim,) of length one.

    Raises
    ------
    ClipworksError
        If the parts cancel.

    Examples
    --------
    >>> [round(float(value), 3) for value in compose(np.eye(2), [1.0, -1.0])]
    [0.707, -0.707]
    """
    total = np.asarray(weights, np.float64)[None] @ np.asarray(vectors, np.float64)
    return unit(total)[0].astype(np.float32)


def parts_of(query: Any) -> list[Any]:
    """The parts of a query; a matrix is a list of vectors, and torch tensors are arrays."""
    if query is None:
        return []
    if hasattr(query, "detach"):
        query = query.detach().cpu().numpy()
    if isinstance(query, np.ndarray):
        return list(query) if query.ndim == 2 and query.dtype != np.uint8 else [query]
    if isinstance(query, (list, tuple)):
        if query and all(isinstance(x, (int, float)) for x in query):
            return [np.asarray(query, np.float32)]
        return [part for entry in query for part in parts_of(entry)]
    return [query]


def is_vector(part: Any) -> bool:
    """Whether a part is a vector, and no picture."""
    return isinstance(part, np.ndarray) and part.dtype != np.uint8


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows divided by their lengths; a row of zeros is an error."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise ClipworksError("the query is a vector of length zero: its parts cancel.")
    return vectors / lengths


def shown(part: Any) -> str:
    """A part in words."""
    if isinstance(part, (str, os.PathLike)):
        return os.fspath(part)
    return "vector" if is_vector(part) else "image"


def _words(given: str | Sequence[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or [])
