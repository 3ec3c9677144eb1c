"""Search in many collections at once, exactly as if they were one.

A sharded collection is a folder whose subfolders are collections, each complete in itself and made by `embed` on
whichever machine; there is no table above them that could disagree with them:

    photos.shards/
      000.collection/     items.lance, checksums.txt, snapshot/, perhaps indexes/
      001.collection/
      ...

The k best of all are among the k best of each, and a score is the same sum in every shard, so that merging is exact.
Keys are given as "shard/key". All shards must be of one encoder; a shard that cannot be read is an error, not a gap.
The folder may lie in an object store, where `object_store.publish` puts collections: then its shards are asked there,
several at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CollectionError, check_range
from ..retrieval.queries import compose, make_query
from ..types import Ranking
from .collection import Collection
from .journal import NAME as JOURNAL
from .object_store import Shard, is_address, published, together
from .search import nearest, query_vectors
from .table import MEMORY, is_collection

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

Hit = tuple[float, str, dict[str, Any]]  # score, key, columns


def is_sharded(path: str | os.PathLike) -> bool:
    """Whether a folder is no collection and has collections in it, or lies in an object store."""
    place = Path(path)
    return is_address(path) or (place.is_dir() and not is_collection(place) and any(_shards(place)))


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
    folder : whose subfolders are collections of one encoder; or an address in an object store, of such a folder or of
        one published collection, whose keys are then its own
    query, k, where, encoder, image, negative, minus, weights, columns, memory, index : as in `search`; a condition
        and the columns must be known to every shard, and each shard chooses its own index ("auto", "exact" or
        "lance" in an object store)

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
    shards: Iterator[Collection | Shard]
    shards = iter(published(folder)) if is_address(folder) else map(Collection, _shards(Path(folder)))
    first: Any = next(shards, None)
    if first is None:
        raise CollectionError(f"there is no collection in {str(folder)!r}.")
    vector = compose(query_vectors(first, asked.parts, encoder), asked.weights)

    def hits(shard: Collection | Shard) -> list[Hit]:
        if (shard.fingerprint, shard.dim) != (first.fingerprint, first.dim):
            raise CollectionError(
                f"shards must be of one encoder. {str(first.path)!r} has the fingerprint {first.fingerprint[:12]!r} "
                f"and vectors of length {first.dim}, {str(shard.path)!r} {shard.fingerprint[:12]!r} and {shard.dim}."
            )
        if isinstance(shard, Shard):
            own = shard.hits(vector, k, where, columns, index)
            return [(score, shard.prefix + key, row) for score, key, row in own]
        rows = None if where is None else shard.where(where)
        (scores,), (numbers,) = nearest(shard, vector[None], k, rows, memory, index)
        keys = [f"{shard.path.name}/{shard.keys[row]}" for row in numbers]
        return list(zip(scores.tolist(), keys, shard.take(numbers, columns), strict=True))

    found: list[Hit] = []
    every = chain([first], shards)
    for own in together(hits, list(every)) if isinstance(first, Shard) else map(hits, every):
        found = sorted([*found, *own], key=lambda hit: (-hit[0], hit[1]))[:k]
    best = np.array([score for score, _, _ in found], np.float32)
    return Ranking([key for _, key, _ in found], best, str(asked), [row for _, _, row in found] if columns else [])


def _shards(folder: Path) -> Iterator[Path]:
    """The collections in a folder in the order of their names, also those that have lost their table."""
    places = sorted(folder.iterdir()) if folder.is_dir() else []
    return (p for p in places if not p.name.startswith(".") and (is_collection(p) or (p / JOURNAL).exists()))
