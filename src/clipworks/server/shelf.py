"""`Shelf`: the collection that is served, reopened when it has changed; `View`: one version of it, by opaque ids."""

from __future__ import annotations

import hashlib
import ntpath
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ..errors import ClipworksError, CollectionError, check_choice
from ..store.collection import Collection
from ..store.journal import newest_manifest
from ..store.table import literal

LOOK = 2.0  # seconds between two looks for a newer version
FILTERS = 64  # answers to conditions that are kept
POINTS, FITTED = 20_000, 5_000  # of the map: points shown, points that decide its axes
VALUES = 40  # a column with at most so many different words is offered as a choice
COUNTED = 200_000  # rows up to which the words of a column are counted
OPERATORS = {"is": "=", "is not": "!=", "below": "<", "at most": "<=", "above": ">", "at least": ">="}
WORDS = ("contains", "missing", "present", "in")


class Shelf:
    """A collection's newest version.

    Parameters
    ----------
    path : the collection, or its folder
    expose_paths : show keys that are absolute paths as they are, not as the file's name only
    """

    def __init__(self, path: str | os.PathLike | Collection, *, expose_paths: bool = False):
        self.expose_paths = expose_paths
        self._lock = threading.Lock()
        self._view = View(Collection.open(path), expose_paths)
        self._looked = time.monotonic()

    @property
    def dim(self) -> int:
        return self._view.collection.dim

    def view(self) -> View:
        """The newest version; a damaged one leaves the last in place."""
        now = time.monotonic()
        with self._lock:
            if now - self._looked > LOOK:
                self._looked = now
                kept = self._view.collection
                try:
                    if newest_manifest(kept.path) != kept.version:
                        fresh = Collection.open(kept.path)
                        if fresh.fingerprint == kept.fingerprint and fresh.dim == kept.dim:
                            self._view = View(fresh, self.expose_paths)
                except (CollectionError, OSError):
                    pass
            return self._view


class View:
    """One version of a collection: ids for rows, conditions, the map.

    Parameters
    ----------
    collection : the open collection
    expose_paths : as for `Shelf`
    """

    def __init__(self, collection: Collection, expose_paths: bool = False):
        self.collection = collection
        self.expose_paths = expose_paths
        self._filters: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.collection)

    # -- ids -----------------------------------------------------------------------------------------------------

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of rows: 16 hexadecimal digits that depend on the key alone."""
        return [item_id(self.collection.keys[row]) for row in rows]

    def row(self, item: str) -> int:
        """The row of an id; `KeyError` if there is none."""
        try:
            number = int(item, 16) if len(item) == 16 else -1
        except ValueError:
            number = -1
        if number >= 0 and len(self):
            numbers, rows = self._numbers
            place = int(np.searchsorted(numbers, np.uint64(number)))
            if place < len(numbers) and int(numbers[place]) == number and item == f"{number:016x}":
                return int(rows[place])
        raise KeyError(item)

    @cached_property
    def _numbers(self) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.fromiter((int(item_id(key), 16) for key in self.collection.keys), np.uint64, len(self))
        order = np.argsort(numbers, kind="stable")
        return numbers[order], order

    def name(self, row: int) -> str:
        """What a person reads: the key, or of a key that is a path of this machine the file's name only."""
        return shown_key(self.collection.keys[row], self.expose_paths)

    def items(
        self, rows: Sequence[int] | np.ndarray, scores: Sequence[float] | None = None, columns: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Rows as they are answered: id, name, score, columns."""
        wanted = list(dict.fromkeys(c for c in columns if c != "key"))
        details = self.collection.take(rows, wanted) if len(rows) else []
        out = []
        for i, (row, item) in enumerate(zip(rows, self.ids(rows), strict=True)):
            entry: dict[str, Any] = {"id": item, "name": self.name(row)}
            if scores is not None:
                entry["score"] = round(float(scores[i]), 6)
            out.append(entry | {"columns": {k: plain(v) for k, v in details[i].items()}})
        return out

    # -- conditions ----------------------------------------------------------------------------------------------

    def where(self, conditions: Sequence[Any]) -> np.ndarray | None:
        """Row numbers that meet all conditions (column, operator, value), None where there are none."""
        if not conditions:
            return None
        text = " AND ".join(condition(c, self.collection.columns) for c in conditions)
        with self._lock:
            if text in self._filters:
                self._filters.move_to_end(text)
                return self._filters[text]
        try:
            rows = self.collection.where(text)
        except ClipworksError as error:  # the store's message names files
            raise ClipworksError("the conditions do not fit the columns: compare numbers with numbers.") from error
        with self._lock:
            self._filters[text] = rows
            while len(self._filters) > FILTERS:
                self._filters.popitem(last=False)
        return rows

    @cached_property
    def columns(self) -> list[dict[str, Any]]:
        """Name and type of every column, and of those with few different words the words and their numbers."""
        out: list[dict[str, Any]] = []
        for name, kind in self.collection.columns.items():
            if name in ("key", "digest"):
                continue
            entry: dict[str, Any] = {"name": name, "type": kind, "values": None}
            if kind in ("string", "bool", "large_string") and len(self) <= COUNTED:
                count = Counter(v for v in self.collection.column(name) if v is not None)
                if 0 < len(count) <= VALUES:
                    entry["values"] = [{"value": v, "count": n} for v, n in sorted(count.items(), key=lambda p: -p[1])]
            out.append(entry)
        return out

    # -- the map -------------------------------------------------------------------------------------------------

    @cached_property
    def map(self) -> dict[str, Any]:
        """Rows at their place along the two principal components of the collection."""
        count = len(self)
        rows = np.unique(np.linspace(0, count - 1, min(count, POINTS)).astype(int)) if count else np.empty(0, int)
        if count < 2:
            return self._placed(rows, np.zeros((count, 2)), [0.0, 0.0])
        some = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), FITTED)).astype(int))]
        sample = np.asarray(self.collection.vectors[some], np.float32)
        mean = sample.mean(0)
        values, axes = np.linalg.eigh(np.cov((sample - mean).T.astype(np.float64)))
        best = axes[:, ::-1][:, :2]
        best = best * np.sign(best[np.abs(best).argmax(0), range(best.shape[1])])  # the same picture every time
        places = np.concatenate(
            [(np.asarray(self.collection.vectors[part], np.float32) - mean) @ best
             for part in np.array_split(rows, max(1, len(rows) // 4096))]
        )  # fmt: skip
        if places.shape[1] < 2:
            places = np.concatenate([places, np.zeros((len(places), 1))], 1)
        total = max(float(values.clip(0).sum()), 1e-12)
        explained = [round(float(v) / total, 4) for v in values[::-1][:2]]
        return self._placed(rows, places, explained)

    def _placed(self, rows: np.ndarray, places: np.ndarray, explained: list[float]) -> dict[str, Any]:
        labels = [row["label"] for row in self.collection.take(rows, ["label"])] if len(rows) else []
        return {"total": len(self), "ids": self.ids(rows), "names": [self.name(row) for row in rows], "labels": labels,
                "x": places[:, 0].round(4).tolist(), "y": places[:, 1].round(4).tolist(),
                "explained": explained}  # fmt: skip


def item_id(key: str) -> str:
    """The id of a key."""
    return hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


def shown_key(key: str, expose_paths: bool = False) -> str:
    """A key as it is, unless it is a path of the machine: then the last part of it."""
    drive, rest = ntpath.splitdrive(key)
    if expose_paths or not (drive or rest.startswith(("/", "\\")) or ".." in key.split("/")):
        return key
    return PurePosixPath(key).name if "/" in key else PureWindowsPath(key).name


def condition(given: Any, columns: dict[str, str]) -> str:
    """One condition as SQL; the column is one of the collection's, the value a quoted literal, and nothing else."""
    check_choice("the column of a condition", given.column, [c for c in columns if c != "digest"])
    check_choice("the operator of a condition", given.operator, [*OPERATORS, *WORDS])
    column, value = f"`{given.column}`", given.value
    if given.operator in ("missing", "present"):
        return f"{column} IS {'NOT ' if given.operator == 'present' else ''}NULL"
    text = columns[given.column] in ("string", "large_string")
    if given.operator == "in":
        if not isinstance(value, list) or not value:
            raise ClipworksError("the value of the condition 'in' must be a list of one value or more.")
        return f"{column} IN ({', '.join(literal(v) for v in value)})"
    if value is None or isinstance(value, list):
        raise ClipworksError(f"the value of the condition {given.operator!r} must be one word or number.")
    if given.operator == "contains":
        if not text or not isinstance(value, str):
            raise ClipworksError(f"'contains' needs a column of words and a word. Got {given.column!r} and {value!r}.")
        return f"strpos(lower({column}), {literal(value.lower())}) > 0"
    return f"{column} {OPERATORS[given.operator]} {literal(value)}"


def plain(value: Any) -> Any:
    """A value of a column as JSON can hold it."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return Path(value).name if isinstance(value, Path) else str(value)[:2000]
