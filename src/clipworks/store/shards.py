"""Search in many collections at once, exactly as if they were one.

A sharded collection is a folder whose subfolders are collections, each complete in itself and made by `embed` on
whichever machine; there is no table above them that could disagree with them:

    photos.shards/
      000.collection/     items.lance, checksums.txt, snapshot/, perhaps indexes/
      001.collection/
      ...

The k best of all are among the k best of each, and a score is the same sum in every shard, so that merging is exact.
Keys are given as "shard/key". All shards must be of one encoder; a shard that cannot be read is an error, not a gap.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CollectionError, check_range
from ..retrieval.queries import compose, make_query
from ..types import Ranking
from .collection import Collection
from .journal import NAME as JOURNAL
from .search import nearest, query_vectors
from .table import MEMORY, is_collection

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


def is_sharded(path: str | os.PathLike) -> bool:
    """Whether a folder is no collection and has collections in it."""
    place = Path(path)
    return place.is_dir() and not is_collection(place) and any(_shards(place))


def search_shards(
    folder: str | os.PathLike,
    query: Any = None,
    *,
    k: int = 10,
    where: str | Mapping[str, Any] | None = None,
    encoder: str | Encoder | None = None,
    image: str | Path | None = None,
    negative: str | Sequence[str] | None = None,
    minus: str | Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    columns: Sequence[str] = (),
    memory: int = MEMORY,
    index: str = "auto",
) -> Ranking:
    """Rank the images of all shards by their cosine with a query.

    Parameters
    ----------
    folder : whose subfolders are collections of one encoder
    query, k, where, encoder, image, negative, minus, weights, columns, memory, index : as in `search`; a condition
        and the columns must be known to every shard, and each shard chooses its own index

    Returns
    -------
    Ranking: keys as "shard/key" and cosines, best first; equal scores in the order of the keys

    Raises
    ------
    CollectionError
        If there are no shards, one of them cannot be read, or their encoders differ.
    """
    check_range("k", k, 1)
    asked = make_query(query, image=image, negative=negative, minus=minus, weights=weights)
    found: list[tuple[float, str, dict[str, Any]]] = []
    vector: np.ndarray | None = None
    first: Collection | None = None
    for shard in _shards(Path(folder)):
        opened = Collection(shard)
        if first is None or vector is None:
            first, vector = opened, compose(query_vectors(opened, asked.parts, encoder), asked.weights)
        elif (opened.fingerprint, opened.dim) != (first.fingerprint, first.dim):
            raise CollectionError(
                f"shards must be of one encoder. {str(first.path)!r} has the fingerprint {first.fingerprint[:12]!r} "
                f"and vectors of length {first.dim}, {str(shard)!r} {opened.fingerprint[:12]!r} and {opened.dim}."
            )
        rows = None if where is None else opened.where(where)
        (scores,), (hits,) = nearest(opened, vector[None], k, rows, memory, index)
        keys = [f"{shard.name}/{opened.keys[row]}" for row in hits]
        found += zip(scores.tolist(), keys, opened.take(hits, columns), strict=True)
        found = sorted(found, key=lambda hit: (-hit[0], hit[1]))[:k]
    if first is None:
        raise CollectionError(f"there is no collection in {str(folder)!r}.")
    best = np.array([score for score, _, _ in found], np.float32)
    return Ranking([key for _, key, _ in found], best, str(asked), [row for _, _, row in found] if columns else [])


def _shards(folder: Path) -> Iterator[Path]:
    """The collections in a folder in the order of their names, also those that have lost their table."""
    places = sorted(folder.iterdir()) if folder.is_dir() else []
    return (p for p in places if not p.name.startswith(".") and (is_collection(p) or (p / JOURNAL).exists()))
