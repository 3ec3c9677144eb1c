"""`dedupe`: groups of images that are the same or nearly the same, by the cosine of their vectors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..encoders.precision import fast_matmul
from ..errors import check_range
from .collection import Collection
from .exact import MEMORY

THRESHOLD = 0.97  # no published standard: depends on the encoder; look at some groups before deleting anything


@dataclass
class Group:
    """Images that belong together.

    Attributes
    ----------
    keys : of the images, sorted; the first stands for the group
    scores : cosine of each with the first
    identical : whether all files are equal byte for byte
    """

    keys: list[str]
    scores: np.ndarray
    identical: bool = False

    def __len__(self) -> int:
        return len(self.keys)


class Groups(list[Group]):
    """The answer of `dedupe`, largest group first."""

    def as_rows(self) -> list[dict[str, Any]]:
        """One dictionary per image: group, key, cosine with the group's first, whether the group is identical."""
        return [
            {"group": i, "key": key, "score": round(float(score), 6), "identical": group.identical}
            for i, group in enumerate(self, 1)
            for key, score in zip(group.keys, group.scores, strict=True)
        ]

    def extras(self) -> list[str]:
        """All keys but the first of each group: what could go."""
        return [key for group in self for key in group.keys[1:]]


def dedupe(
    collection: str | os.PathLike | Collection,
    *,
    threshold: float = THRESHOLD,
    where: str | Mapping[str, Any] | None = None,
    memory: int = MEMORY,
) -> Groups:
    """Find images that occur more than once.

    Two images are linked if the cosine of their vectors is at least `threshold`; a group is a connected set of links.
    Links chain: A and C may be in one group because both are close to B. `Group.scores` shows how close each is to
    the first. All pairs are compared, in blocks: 100,000 rows take minutes on a few cores.

    Parameters
    ----------
    collection : a collection or its folder
    threshold : lowest cosine of a link, in [-1, 1] (default 0.97; what is a duplicate depends on the encoder)
    where : only rows that meet this condition, as in `search`
    memory : bytes of working memory

    Returns
    -------
    Groups: a list of `Group`, largest first; images without a duplicate are in none
    """
    opened = Collection.open(collection)
    check_range("threshold", threshold, -1.0, 1.0)
    check_range("memory", memory, 1 << 20)
    rows = np.arange(len(opened)) if where is None else opened.where(where)
    first, second = _links(opened.vectors, rows, threshold, memory)
    digests = opened.column("digest")
    groups = Groups()
    for members in _connected(len(rows), first, second):
        chosen = rows[members]
        vectors = _unit_block(opened.vectors, chosen)
        known = {digests[i] for i in chosen}
        scores = (vectors[:1] * vectors).sum(1).numpy()
        groups.append(Group([opened.keys[i] for i in chosen], scores, len(known) == 1 and None not in known))
    groups.sort(key=lambda group: (-len(group), group.keys[0]))
    return groups


def _links(vectors: np.ndarray, rows: np.ndarray, threshold: float, memory: int) -> tuple[np.ndarray, np.ndarray]:
    """Places i < j in `rows` of every pair at or above the threshold."""
    height = int(max(64, min(4096, (memory / 16) ** 0.5, memory // (12 * vectors.shape[1]))))
    first, second = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    with fast_matmul():
        for i in range(0, len(rows), height):
            left = _unit_block(vectors, rows[i : i + height])
            for j in range(i, len(rows), height):
                right = left if i == j else _unit_block(vectors, rows[j : j + height])
                close = F.linear(left, right) >= threshold
                close = close.triu(1) if i == j else close
                a, b = np.nonzero(close.numpy())
                first.append(a + i)
                second.append(b + j)
    return np.concatenate(first), np.concatenate(second)


def _unit_block(vectors: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    return F.normalize(torch.from_numpy(np.asarray(vectors[rows], np.float32)), dim=1)


def _connected(count: int, first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
    """Sets of two and more connected places, each ascending."""
    if not len(first):
        return []
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(first), np.int8), (first, second)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [part for part in parts if len(part) > 1]
