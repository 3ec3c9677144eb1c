"""Search with an approximate index: `usable` opens the one to take, `Index.top_k` stands beside `exact.top_k`.

Rows that came after the index are searched exactly and merged, rows that went are masked, filters are kept; every
score is computed from the collection's own vectors. An index that is damaged, or too far from the collection, is left
out with a message, and the search is exact.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import CollectionError, MissingExtra, check_choice
from . import derived
from .collection import Collection
from .cover import Cover, cover
from .quick import top_k
from .table import INDEXES, translated

KINDS = ("ivf", "hnsw", "pq", "lance")
CHOICES = ("auto", "exact", *KINDS)
FORMAT = 1
EXACT_UP_TO = 1 << 29  # numbers (rows x dim) up to which "auto" is exact: about 0.1 s for a query on one core
GOOD = 0.95  # recall from which "auto" looks at the speed
STALE = 0.2  # share of new, changed and removed rows beyond which an index is left out
FEW = 0.1  # share of rows below which a filter makes the exact search the quicker one


class Index:
    """An index of a collection, open.

    Parameters
    ----------
    folder : where it is
    opened : the collection, at any version

    Attributes
    ----------
    facts : what was recorded when it was built
    cover : which rows of the collection are behind its entries

    Raises
    ------
    CollectionError
        If it is damaged, or too far from the collection.
    MissingExtra
        If faiss is needed and not installed.
    """

    def __init__(self, folder: Path, opened: Collection):
        # all of it is compared with its checksums: faiss trusts what it reads, and would crash on damaged bytes
        if damage := derived.damage(folder):
            name, reason = next(iter(damage.items()))
            raise CollectionError(f"is damaged ({name} {reason})")
        self.folder, self.vectors, self.norm = folder, opened.vectors, opened.norm
        with translated(folder):
            self.facts = derived.read_facts(folder)
            if self.facts.get("format") != FORMAT or self.facts.get("dim") != opened.dim:
                raise CollectionError(f"is of another format, or of vectors of length {self.facts.get('dim')}")
            if not _sound(self.facts):
                raise CollectionError("is damaged (its record has another form)")
            self.cover: Cover = cover(folder, self.facts["version"], opened)
            if self.cover.strange > STALE * len(opened):
                share = self.cover.strange / max(1, len(opened))
                raise CollectionError(f"is out of date ({share:.0%} of the rows are new, changed or gone)")
            self.kind = kind_of(self.facts["kind"]).open(folder)

    def top_k(
        self, queries: np.ndarray, k: int, *, rows: np.ndarray | None = None, memory: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `exact.top_k`, whose scores these are; a row of the exact answer can be missing."""
        count = len(self.vectors) if rows is None else len(rows)
        if rows is not None and count <= FEW * len(self.vectors):
            return self._exactly(queries, k, rows, memory)
        k, queries = min(k, count), np.ascontiguousarray(queries, np.float32)
        scores, found = np.empty((len(queries), k), np.float32), np.full((len(queries), k), -1, np.int64)
        wanted = np.ones(len(self.vectors), bool)
        if rows is not None:
            wanted[:] = False
            wanted[rows] = True
        fresh = self.cover.fresh[wanted[self.cover.fresh]]
        later = self._exactly(queries, k, fresh, memory)[1]
        at_once = max(1, memory // (64 * k * self.facts["candidates"]))
        for start in range(0, len(queries), at_once):
            part = slice(start, start + at_once)
            near = self._near(queries[part], k, None if rows is None else wanted)
            for i, (query, some, more) in enumerate(zip(queries[part], near, later[part], strict=True), start):
                chosen = np.concatenate([some[some >= 0], more])
                if len(chosen) < k:
                    continue
                exact = (np.asarray(self.vectors[chosen], np.float32) * query).sum(1)  # as `exact.top_k` does
                best = np.lexsort((chosen, -exact))[:k]
                scores[i], found[i] = exact[best], chosen[best]
        missing = np.flatnonzero((found < 0).any(1))  # too few of the rows nearby meet the filter
        if len(missing):
            scores[missing], found[missing] = self._exactly(queries[missing], k, rows, memory)
        return scores, found

    def _exactly(
        self, queries: np.ndarray, k: int, rows: np.ndarray | None, memory: int
    ) -> tuple[np.ndarray, np.ndarray]:
        return top_k(self.vectors, queries, k, rows=rows, memory=memory, norm=self.norm)

    def _near(self, queries: np.ndarray, k: int, wanted: np.ndarray | None) -> np.ndarray:
        """Rows near to each query, -1 where there are fewer."""
        row_of, breadth = self.cover.row_of, self.facts["breadth"]
        allowed = row_of >= 0 if wanted is not None or self.cover.gone else None
        if wanted is not None and allowed is not None:
            allowed[allowed] = wanted[row_of[allowed]]
            # the fewer rows are allowed, the farther away they are
            breadth = round(breadth * len(row_of) / max(1, np.count_nonzero(allowed)))
        with translated(self.folder):
            entries = self.kind.search(queries, k * self.facts["candidates"], breadth, allowed)
        return np.where(entries >= 0, row_of[entries], -1)


def usable(opened: Collection, index: str = "auto") -> Index | None:
    """The index to search with, None for the exact search.

    "auto" is exact up to `EXACT_UP_TO` stored numbers and where no index was built; beyond, it takes the quickest of
    those that were measured at a recall of `GOOD` or more. What cannot be used is said once per open collection.
    """
    check_choice("index", index, CHOICES)
    if index == "exact" or (index == "auto" and opened.vectors.size <= EXACT_UP_TO):
        return None
    mine = OPEN.setdefault(opened, {})
    if index not in mine:
        mine[index] = _open(opened, index)
    return mine[index]


def newest(path: Path, kind: str) -> Path | None:
    """The folder of the newest index of a kind."""
    place = path / INDEXES
    return max(place.glob(f"{kind}-[0-9]*"), default=None) if place.is_dir() else None


def indexes(path: Path) -> dict[str, dict[str, Any]]:
    """The newest index of each kind that is there: what was recorded of it."""
    found = {}
    for kind in KINDS:
        folder = newest(path, kind)
        if folder is not None:
            try:
                facts = derived.read_facts(folder)
            except (OSError, ValueError, RecursionError):
                facts = {}
            found[kind] = facts if _sound(facts) else {}
    return found


def damage(path: Path) -> dict[str, str]:
    """Parts of indexes that do not match their checksums, as paths below the collection, with the reason."""
    found: dict[str, str] = {}
    for folder in filter(None, (newest(path, kind) for kind in KINDS)):
        found |= {f"{INDEXES}/{name}": reason for name, reason in derived.damage(folder).items()}
    return found


def discard_damaged(path: Path) -> None:
    """Remove the indexes that are damaged."""
    derived.clear({path / INDEXES / Path(name).parts[1] for name in damage(path)})


def kind_of(name: str) -> Any:
    """The class of a kind; imported only when one is used."""
    from .ann import KINDS as classes

    return classes[name]


# per open collection, by the name that was asked for; None for what could not be used
OPEN: WeakKeyDictionary[Collection, dict[str, Index | None]] = WeakKeyDictionary()


def _sound(facts: dict[str, Any]) -> bool:
    """Whether a record has all that is needed to search, in the form in which it was written."""
    words = facts.get("recall_words")
    numbers = [facts.get("recall"), facts.get("ms"), 0.0 if words is None else words]
    counts = [facts.get(name) for name in ("rows", "breadth", "candidates")]
    named = facts.get("kind") in KINDS and isinstance(facts.get("version"), str)
    return named and all(isinstance(n, int | float) for n in numbers) and all(type(n) is int and n > 0 for n in counts)


def _good(facts: dict[str, Any]) -> bool:
    """Whether the recall for images and for words is enough; a damaged index tells nothing."""
    return min(facts.get("recall", 0.0), facts.get("recall_words") or 1.0) >= GOOD


def _open(opened: Collection, index: str) -> Index | None:
    there = indexes(opened.path)
    if index == "auto":
        if not there:
            return None
        # good ones first, and of these the quickest; a damaged one, which tells nothing, last
        index = min(there, key=lambda kind: (not _good(there[kind]), there[kind].get("ms", 1e9)))
    for _ in range(3):  # an index may be replaced while it is opened
        folder = newest(opened.path, index)
        reason = "is not there"
        if folder is None:
            break
        try:
            return Index(folder, opened)
        except (CollectionError, MissingExtra) as error:
            reason = str(error)
        if newest(opened.path, index) == folder:
            break
    warnings.warn(
        f"the {index} index of {str(opened.path)!r} {reason}; the search is exact. "
        f"`clipworks index {opened.path} --kind {index}` makes it.",
        stacklevel=5,
    )
    return None
