"""`search`: the images of a collection nearest to words, images or vectors, exactly; `similar`: to one of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ClipworksError, check_range
from ..types import Ranking
from .collection import Collection
from .exact import MEMORY, top_k
from .identity import encoder_of

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


def search(
    collection: str | os.PathLike | Collection,
    query: Any = None,
    *,
    k: int = 10,
    where: str | Mapping[str, Any] | None = None,
    encoder: str | Encoder | None = None,
    image: str | Path | None = None,
    negative: str | Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    columns: Sequence[str] = (),
    memory: int = MEMORY,
) -> Ranking:
    """Rank the images of a collection by their cosine with a query.

    A query of several parts is the weighted sum of their unit vectors, brought to length one.

    Parameters
    ----------
    collection : a collection or its folder
    query : words (a string), an image (`pathlib.Path`, bytes, PIL image, uint8 array), a vector of length dim, or a
        list of any of these
    k : number of hits
    where : only rows that meet this condition: SQL on the columns, "label = 'cat' AND width > 640", or a mapping
        of columns to values
    encoder : for words and images (default: the one recorded in the collection)
    image : path of an image that joins the query
    negative : words to move away from; each counts -0.5
    weights : one number per part, in the order query, image, negative (default 1 each, -0.5 for negatives)
    columns : columns to return with each hit
    memory : bytes of working memory

    Returns
    -------
    Ranking: keys and cosines, best first

    Raises
    ------
    ClipworksError
        For an empty query, wrong weights, an unknown column or condition.
    CollectionError
        If the encoder is not the one that made the collection.
    """
    opened = Collection.open(collection)
    parts = _parts(query)
    if image is not None:
        parts.append(image if not isinstance(image, str) else Path(image))
    words = [negative] if isinstance(negative, str) else list(negative or [])
    if not parts and not words:
        raise ClipworksError("query must be words, an image or a vector. Got nothing.")
    given = [1.0] * len(parts) + [-0.5] * len(words) if weights is None else [float(w) for w in weights]
    parts += words
    if len(given) != len(parts):
        raise ClipworksError(f"weights must have one number per part of the query ({len(parts)}). Got {len(given)}.")
    vectors = query_vectors(opened, parts, encoder)
    total = _unit(np.asarray(given, np.float64)[None] @ vectors.astype(np.float64))
    signed = [f"{'-' if w < 0 else '+'} {_shown(part)}" for w, part in zip(given, parts, strict=True)]
    shown = " ".join(signed).removeprefix("+ ")
    return _rank(opened, total.astype(np.float32), [shown], k, where, columns, memory)[0]


def search_many(
    collection: str | os.PathLike | Collection,
    queries: Sequence[Any] | np.ndarray,
    *,
    k: int = 10,
    where: str | Mapping[str, Any] | None = None,
    encoder: str | Encoder | None = None,
    columns: Sequence[str] = (),
    memory: int = MEMORY,
) -> list[Ranking]:
    """Search for many queries at once, each of one part; several times as fast as one after the other.

    Parameters
    ----------
    collection, k, where, encoder, columns, memory : as in `search`
    queries : words, images or vectors, or a matrix (n, dim)

    Returns
    -------
    one Ranking per query
    """
    opened = Collection.open(collection)
    parts = _parts(queries)
    if not parts:
        return []
    vectors = _unit(query_vectors(opened, parts, encoder))
    return _rank(opened, vectors.astype(np.float32), [_shown(p) for p in parts], k, where, columns, memory)


def similar(
    collection: str | os.PathLike | Collection,
    key: str,
    *,
    k: int = 10,
    where: str | Mapping[str, Any] | None = None,
    columns: Sequence[str] = (),
    memory: int = MEMORY,
) -> Ranking:
    """Rank the images of a collection by their cosine with one of its own; needs no encoder.

    Parameters
    ----------
    collection, k, where, columns, memory : as in `search`
    key : of the image; it is left out of the answer

    Returns
    -------
    Ranking
    """
    opened = Collection.open(collection)
    row = opened.row(key)
    rows = np.arange(len(opened)) if where is None else opened.where(where)
    query = _unit(opened.vector(key)[None])
    if where is None:  # reading all rows in order is faster than a choice of them
        found = _rank(opened, query, [key], k + 1, None, columns, memory)[0]
        keep = [i for i, other in enumerate(found.keys) if other != key][:k]
        rest = [found.columns[i] for i in keep] if columns else []
        return Ranking([found.keys[i] for i in keep], found.scores[keep], key, rest)
    return _rank(opened, query, [key], k, rows[rows != row], columns, memory)[0]


def query_vectors(collection: Collection, parts: Sequence[Any], encoder: str | Encoder | None = None) -> np.ndarray:
    """Unit vectors (n, dim) of words, images and vectors; the encoder is loaded only if one of them needs it.

    Parameters
    ----------
    collection : whose space they are for
    parts : strings are words; paths, bytes, PIL images and uint8 arrays are images; other arrays are vectors
    encoder : default: the one recorded in the collection
    """
    out = np.empty((len(parts), collection.dim), np.float32)
    texts = [i for i, part in enumerate(parts) if isinstance(part, str)]
    ready = [i for i, part in enumerate(parts) if _is_vector(part)]
    images = [i for i in range(len(parts)) if i not in {*texts, *ready}]
    if empty := [i for i in texts if not parts[i].strip()]:
        raise ClipworksError(f"query must not be empty words. Got {parts[empty[0]]!r}.")
    for i in ready:
        vector = np.asarray(parts[i], np.float32)
        if vector.shape != (collection.dim,) or not np.isfinite(vector).all():
            raise ClipworksError(f"a query vector must hold {collection.dim} finite numbers. Got shape {vector.shape}.")
        out[i] = _unit(vector[None])[0]
    if texts or images:
        model = encoder_of(collection, encoder)
        if texts:
            out[texts] = model.texts([parts[i] for i in texts]).numpy()
        if images:
            out[images] = model.images([parts[i] for i in images]).numpy()
    return out


def _rank(
    collection: Collection,
    vectors: np.ndarray,
    shown: list[str],
    k: int,
    where: Any,
    columns: Sequence[str],
    memory: int,
) -> list[Ranking]:
    check_range("k", k, 1)
    columns = [columns] if isinstance(columns, str) else list(columns)
    rows = where if where is None or isinstance(where, np.ndarray) else collection.where(where)
    scores, found = top_k(collection.vectors, vectors, k, rows=rows, memory=memory, norm=collection.norm)
    flat = collection.take(found.reshape(-1), columns) if columns else []
    width = found.shape[1]
    return [
        Ranking([collection.keys[j] for j in hits], values, text, flat[i * width : (i + 1) * width])
        for i, (hits, values, text) in enumerate(zip(found, scores, shown, strict=True))
    ]


def _parts(query: Any) -> list[Any]:
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
        return [part for entry in query for part in _parts(entry)]
    return [query]


def _is_vector(part: Any) -> bool:
    return isinstance(part, np.ndarray) and part.dtype != np.uint8


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise ClipworksError("the query is a vector of length zero: its parts cancel.")
    return vectors / lengths


def _shown(part: Any) -> str:
    if isinstance(part, (str, os.PathLike)):
        return os.fspath(part)
    return "vector" if _is_vector(part) else "image"
