"""Batches from inside clusters: samples that look alike to a model are each other's negatives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import ClipworksError
from .feed import Order


@dataclass(frozen=True)
class ClusterOrder(Order):
    """Whole batches from inside one group each, the groups in turn, new permutations per epoch.

    Parameters
    ----------
    count, batch_size, seed : see `Order`
    groups : numbers of the samples of every group
    """

    groups: tuple[np.ndarray, ...] = ()

    @cached_property
    def turns(self) -> list[tuple[int, int]]:
        """Group and number of the batch within it, for every step of an epoch."""
        whole = [len(group) // self.batch_size for group in self.groups]
        return [(place, turn) for turn in range(max(whole)) for place, n in enumerate(whole) if turn < n]

    @property
    def steps_per_epoch(self) -> int:
        return len(self.turns)

    def rows(self, step: int) -> np.ndarray:
        """Return the samples of one step."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        place, turn = self.turns[offset]
        mixed = np.random.default_rng([self.seed, epoch, place]).permutation(self.groups[place])
        return mixed[turn * self.batch_size : (turn + 1) * self.batch_size]


def batches_from(ids: np.ndarray, batch: int, branches: int | None = None) -> list[np.ndarray]:
    """Return the samples of every cluster that fills a batch.

    Parameters
    ----------
    ids : cluster of every sample, (n,)
    batch : samples per batch
    branches : clusters that each earlier one was divided into: what fills no batch is pooled with the rest of the same
        earlier cluster (ids // branches), and so on; None leaves it out

    Examples
    --------
    >>> batches_from(np.array([0, 0, 1, 2, 10]), 2)
    [array([0, 1])]
    >>> batches_from(np.array([0, 0, 1, 2, 10]), 2, branches=9)
    [array([0, 1]), array([2, 3])]
    """
    rest, found = np.arange(len(ids)), []
    while len(rest):
        here = [rest[ids[rest] == value] for value in np.unique(ids[rest])]
        found += [rows for rows in here if len(rows) >= batch]
        rest = np.sort(np.concatenate([np.empty(0, np.int64), *(rows for rows in here if len(rows) < batch)]))
        if branches is None or not ids.any():
            break
        ids = ids // max(branches, 2)
    if not found:
        raise ClipworksError(f"batch_size must not exceed the largest cluster, {max(map(len, here), default=0)} "
                             f"pairs: lower it, or clusters, or take small='merge'. Got {batch}.")  # fmt: skip
    return found
