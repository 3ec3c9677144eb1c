"""Which samples belong to which step, and their batches prepared ahead in threads.

Everything is a function of (seed, step), never of what ran before: a resumed run draws exactly what the interrupted
one would have drawn, and any number of processes share the same batches.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ..data.folder import FolderSource
from ..data.item import Item
from ..data.sources import open_source
from ..errors import BadImage, ClipworksError, naming
from .recipe import Recipe

T = TypeVar("T")


def open_items(data: Any, argument: str = "data") -> list[Item]:
    """Return the items of anything `open_source` takes, or of a list of (image, caption) pairs.

    A folder without captions gives the names of its subfolders as labels.
    """
    if isinstance(data, list | tuple) and data and isinstance(data[0], list | tuple):
        items = [Item(str(i), image, caption=caption) for i, (image, caption) in enumerate(data)]
    else:
        with naming(argument):
            source = open_source(data)
            items = list(source)
            if isinstance(source, FolderSource) and not any(item.caption or item.label for item in items):
                items = list(open_source(source.root, kind="folder", label_from="folder"))
    if not items:
        raise ClipworksError(f"{argument} holds no images.")
    return items


def open_pairs(data: Any, argument: str = "data") -> list[Item]:
    """Return the items of a source in which every image has a caption.

    Raises
    ------
    ClipworksError
        If there is nothing, or a caption is missing.
    """
    items = open_items(data, argument)
    if lacking := [item.key for item in items if item.error is None and not item.caption]:
        counted = f"{len(lacking)} of {len(items)} have none, for example {lacking[0]!r}."
        raise ClipworksError(f"{argument} must give every image a caption. {counted}")
    return items


def data_digest(items: Iterable[Item]) -> str:
    """SHA-256 over keys, captions and labels: tells whether a run goes on with the data it began with."""
    state = hashlib.sha256()
    for item in items:
        state.update(repr((item.key, item.caption, item.label)).encode())
    return state.hexdigest()


@dataclass(frozen=True)
class Order:
    """The order of samples: a new permutation per epoch, whole batches only.

    Parameters
    ----------
    count : number of samples
    batch_size : samples per step, over all processes
    seed : of the permutations
    """

    count: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.count:
            raise ClipworksError(f"batch_size must lie in [1, {self.count}] (the samples). Got {self.batch_size}.")

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size

    def rows(self, step: int) -> np.ndarray:
        """Return the samples of one step, for all processes together."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        return permutation(self.count, self.seed, epoch)[offset * self.batch_size : (offset + 1) * self.batch_size]


@functools.lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def step_generator(seed: int, step: int, first: int = 0) -> np.random.Generator:
    """Return a step's generator; its children (`spawn`) are those of the samples from row `first` of the batch on."""
    sequence = np.random.SeedSequence([seed, step], n_children_spawned=first)
    return np.random.Generator(np.random.PCG64(sequence))


@dataclass
class Feed:
    """Batches of one process by step.

    Parameters
    ----------
    items : all samples
    order : which belong to which step
    recipe : makes a batch of items
    part, parts : this process and the number of processes
    on_error : "raise", or "skip" to put the next usable sample in the place of a bad one

    Attributes
    ----------
    bad : key -> reason of the images that were replaced
    """

    items: Sequence[Item]
    order: Order
    recipe: Recipe
    part: int = 0
    parts: int = 1
    on_error: str = "raise"
    bad: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.order.batch_size % self.parts:
            raise ClipworksError(
                f"batch_size must be a multiple of the number of processes ({self.parts}). Got {self.order.batch_size}."
            )

    def batch(self, step: int) -> dict[str, Any]:
        """Return this process's share of a step's batch, with bad images replaced if that is the policy."""
        share = self.order.batch_size // self.parts
        rows = [int(r) for r in self.order.rows(step)[self.part * share : (self.part + 1) * share]]
        while True:
            items = [self.items[self._usable(row)] for row in rows]
            try:
                # a fresh generator each time: replacing one sample must not change the draws of the others
                return self.recipe.batch(items, step, step_generator(self.order.seed, step, self.part * share))
            except BadImage as error:
                if self.on_error == "raise" or error.key in self.bad:
                    raise
                self.bad[error.key] = error.reason
                warnings.warn(f"{error}; another sample takes its place", stacklevel=2)

    def _usable(self, row: int) -> int:
        """Return `row`, or the next one whose image is not known to be bad."""
        for ahead in range(len(self.items)):
            here = (row + ahead) % len(self.items)
            if self.items[here].key not in self.bad:
                return here
        raise ClipworksError(f"none of the {len(self.items)} images can be used.")


def ahead(make: Callable[[int], T], steps: Iterable[int], depth: int = 2) -> Iterator[T]:
    """Yield `make(step)` in order, up to `depth` of them made ahead in one thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="clipworks-batch") as pool:
        waiting: deque = deque()
        try:
            for step in steps:
                waiting.append(pool.submit(make, step))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
