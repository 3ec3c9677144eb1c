"""`search`: the images of a collection nearest to words, images or vectors; `similar`: to one of its own.

Exact, unless the collection is large and has an approximate index (see `indexed.usable`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ClipworksError, check_range
from ..retrieval.queries import compose, is_vector, make_query, parts_of, shown, unit
from ..types import Ranking
from .collection import Collection
from .identity import encoder_of
from .indexed import usable
from .quick import text_vectors, top_k
from .table import MEMORY

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

CANDIDATES = 10  # times k are looked at, where hits are to differ from each other


def search(
    collection: str | os.PathLike | Collection,
    query: Any = None,
    *,
    k: int = 10,
    where: str | Mapping[str, Any] | None = None,
    encoder: str | Encoder | None = None,
    image: str | Path | None = None,
    negative: str | Sequence[str] | None = None,
    minus: str | Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    expand: int = 0,
    rerank: int = 0,
    diverse: float = 0.0,
    columns: Sequence[str] = (),
    memory: int = MEMORY,
    index: str = "auto",
) -> Ranking:
    """Rank the images of a collection by their cosine with a query.

    A query of several parts is the weighted sum of their unit vectors, brought to length one.

    Parameters
    ----------
    collection : a collection or its folder; or a folder of collections, or an address in an object store, which
        `shards.search_shards` then searches as one (without expand, rerank and diverse)
    query : words (a string), an image (`pathlib.Path`, bytes, PIL image, uint8 array), a vector of length dim, or a
        list of any of these
    k : number of hits
    where : only rows that meet this condition: SQL on the columns, "label = 'cat' AND width > 640", or a mapping
        of columns to values
    encoder : for words and images (default: the one recorded in the collection)
    image : path of an image that joins the query
    negative : words to move away from; each counts -0.5
    minus : words that are taken away in full, "a horse with stripes" minus "a horse"; each counts -1
    weights : one number per part, in the order query, image, negative, minus (default 1, 1, -0.5, -1)
    expand : number of first hits that join the query for a second search (0: none)
    rerank : number of first hits that are ordered anew by the neighbours they share (0: none; 100 is usual)
    diverse : how unlike each other the hits are to be, from 0 (not at all) to 1
    columns : columns to return with each hit
    memory : bytes of working memory
    index : "exact"; "ivf", "hnsw", "pq", "lance" for what `clipworks index` built; "auto" is exact up to 2^29 stored
        numbers (a million rows of 512), and beyond takes the quickest index with a recall of at least 0.95, if any

    Returns
    -------
    Ranking: keys and cosines, best first; with `rerank` or `diverse` in the order that these give

    Raises
    ------
    ClipworksError
        For an empty query, wrong weights, an unknown column or condition.
    CollectionError
        If the encoder is not the one that made the collection.
    """
    check_range("k", k, 1)
    check_range("expand", expand, 0)
    check_range("rerank", rerank, 0)
    check_range("diverse", diverse, 0.0, 1.0)
    if not isinstance(collection, Collection):
        from .shards import is_sharded, search_shards

        if is_sharded(collection):
            if expand or rerank or diverse:
                raise ClipworksError("expand, rerank and diverse need the rows of one collection; name one of the "
                                     f"shards in {str(collection)!r}.")  # fmt: skip
            return search_shards(collection, query, k=k, where=where, encoder=encoder, image=image, negative=negative,
                                 minus=minus, weights=weights, columns=columns, memory=memory, index=index)  # fmt: skip
    opened = Collection.open(collection)
    asked = make_query(query, image=image, negative=negative, minus=minus, weights=weights)
    vector = compose(query_vectors(opened, asked.parts, encoder), asked.weights)
    rows = None if where is None else opened.where(where)
    if expand:
        from ..retrieval.query_expansion import expand_query

        first, hits = nearest(opened, vector[None], expand, rows, memory, index)
        vector = expand_query(vector, opened.vectors[hits[0]], first[0])
    wide = max(k, rerank, CANDIDATES * k if diverse else 0)
    scores, found = nearest(opened, vector[None], wide, rows, memory, index)
    chosen = _second_look(vector, opened.vectors[found[0]], scores[0], k, rerank, diverse)
    return _answers(opened, scores[:, chosen], found[:, chosen], [str(asked)], columns)[0]


def _second_look(
    query: np.ndarray, vectors: np.ndarray, scores: np.ndarray, k: int, rerank: int, diverse: float
) -> np.ndarray:
    """Places of k hits among the candidates, in their new order."""
    order = np.arange(len(scores))
    if rerank and len(scores):
        from ..retrieval.rerank import reciprocal_distances

        distance = reciprocal_distances(query[None], vectors[:rerank])[0]
        order[: len(distance)] = np.argsort(distance, kind="stable")
    if diverse:
        from ..retrieval.diversity import diverse_order

        # relevance is the place that a hit has by now: with rerank its cosine no longer says it
        relevance = scores[order] if not rerank else -np.arange(len(order), dtype=np.float64)
        order = order[diverse_order(vectors[order], relevance, k, diverse)]
    return order[:k]


def search_many(
    collection: str | os.PathLike | Collection,
    queries: Sequence[Any] | np.ndarray,
    *,
    k: int = 10,
    where: str | Mapping[str, Any] | None = None,
    encoder: str | Encoder | None = None,
    columns: Sequence[str] = (),
    memory: int = MEMORY,
    index: str = "auto",
) -> list[Ranking]:
    """Search for many queries at once, each of one part; several times as fast as one after the other.

    Parameters
    ----------
    collection, k, where, encoder, columns, memory, index : as in `search`
    queries : words, images or vectors, or a matrix (n, dim)

    Returns
    -------
    one Ranking per query
    """
    opened = Collection.open(collection)
    parts = parts_of(queries)
    if not parts:
        return []
    vectors = unit(query_vectors(opened, parts, encoder))
    return _rank(opened, vectors.astype(np.float32), [shown(p) for p in parts], k, where, columns, memory, index)


def similar(
    collection: str | os.PathLike | Collection,
    key: str,
    *,
    k: int = 10,
    where: str | Mapping[str, Any] | None = None,
    columns: Sequence[str] = (),
    memory: int = MEMORY,
    index: str = "auto",
) -> Ranking:
    """Rank the images of a collection by their cosine with one of its own; needs no encoder.

    Parameters
    ----------
    collection, k, where, columns, memory, index : as in `search`
    key : of the image; it is left out of the answer

    Returns
    -------
    Ranking
    """
    opened = Collection.open(collection)
    row = opened.row(key)
    rows = np.arange(len(opened)) if where is None else opened.where(where)
    query = unit(opened.vector(key)[None])
    if where is None:  # reading all rows in order is faster than a choice of them
        found = _rank(opened, query, [key], k + 1, None, columns, memory, index)[0]
        keep = [i for i, other in enumerate(found.keys) if other != key][:k]
        rest = [found.columns[i] for i in keep] if columns else []
        return Ranking([found.keys[i] for i in keep], found.scores[keep], key, rest)
    return _rank(opened, query, [key], k, rows[rows != row], columns, memory, index)[0]


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
    ready = [i for i, part in enumerate(parts) if is_vector(part)]
    images = [i for i in range(len(parts)) if i not in {*texts, *ready}]
    if empty := [i for i in texts if not parts[i].strip()]:
        raise ClipworksError(f"query must not be empty words. Got {parts[empty[0]]!r}.")
    for i in ready:
        vector = np.asarray(parts[i], np.float32)
        if vector.shape != (collection.dim,) or not np.isfinite(vector).all():
            raise ClipworksError(f"a query vector must hold {collection.dim} finite numbers. Got shape {vector.shape}.")
        out[i] = unit(vector[None])[0]
    quickly = text_vectors(collection, [parts[i] for i in texts]) if texts and not images and encoder is None else None
    if quickly is not None:
        out[texts] = quickly
    elif texts or images:
        model = encoder_of(collection, encoder)
        if texts:
            out[texts] = model.texts([parts[i] for i in texts]).numpy()
        if images:
            out[images] = model.images([parts[i] for i in images]).numpy()
    return out


def _rank(
    collection: Collection,
    vectors: np.ndarray,
    queries: list[str],
    k: int,
    where: Any,
    columns: Sequence[str],
    memory: int,
    index: str,
) -> list[Ranking]:
    check_range("k", k, 1)
    rows = where if where is None or isinstance(where, np.ndarray) else collection.where(where)
    return _answers(collection, *nearest(collection, vectors, k, rows, memory, index), queries, columns)


def nearest(
    collection: Collection,
    vectors: np.ndarray,
    k: int,
    rows: np.ndarray | None = None,
    memory: int = MEMORY,
    index: str = "auto",
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and row numbers of the k nearest rows to each unit vector (q, dim), by an index where one is to be used.

    Parameters
    ----------
    collection : an open one, which also keeps the index open
    vectors, k, rows, memory : as in `exact.top_k`
    index : as in `search`
    """
    chosen = usable(collection, index)
    if chosen is not None:
        return chosen.top_k(vectors, k, rows=rows, memory=memory)
    return top_k(collection.vectors, vectors, k, rows=rows, memory=memory, norm=collection.norm)


def _answers(
    collection: Collection, scores: np.ndarray, found: np.ndarray, queries: list[str], columns: Sequence[str]
) -> list[Ranking]:
    """One ranking per query, with the columns asked for."""
    columns = [columns] if isinstance(columns, str) else list(columns)
    flat = collection.take(found.reshape(-1), columns) if columns else []
    width = found.shape[1]
    return [
        Ranking([collection.keys[j] for j in hits], values, text, flat[i * width : (i + 1) * width])
        for i, (hits, values, text) in enumerate(zip(found, scores, queries, strict=True))
    ]
