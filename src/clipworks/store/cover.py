"""Which rows of a collection an index covers: by key, and by a mark of the vector that the key had.

Row numbers change with every version, keys and vectors do not. An entry of an index stands for the row with its key as
long as that row has its vector; else the entry is gone and the row is fresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .collection import Collection

COVERED = "covered.arrow"
BLOCK = 4096


@dataclass
class Cover:
    """What the entries of an index are in one version of a collection.

    Attributes
    ----------
    row_of : row behind each entry, -1 for those that are gone
    fresh : rows that no entry stands for, ascending
    gone : number of entries without a row
    """

    row_of: np.ndarray
    fresh: np.ndarray
    gone: int

    @property
    def strange(self) -> int:
        """Rows and entries that do not meet."""
        return len(self.fresh) + self.gone


def write_covered(folder: Path, opened: Collection, row_of: np.ndarray) -> None:
    """Write what the entries of an index are, now that they stand for these rows (-1: for none)."""
    there = row_of >= 0
    safe = pa.array(np.where(there, row_of, 0), mask=~there)
    rows = opened.arrow(["key", "_check"])
    mark = np.zeros(len(row_of), np.uint64)
    mark[there] = marks(opened.vectors)[row_of[there]]
    table = pa.table({"key": rows["key"].take(safe), "check": rows["_check"].take(safe), "mark": mark, "row": row_of})
    with pa.OSFile(str(folder / COVERED), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def cover(folder: Path, version: str, opened: Collection) -> Cover:
    """What the entries of an index that was made at `version` are in an open collection."""
    table = pa.ipc.open_file(pa.memory_map(str(folder / COVERED))).read_all()
    if version == opened.version:
        row_of = table["row"].to_numpy()
    else:
        row_of = _match(table, opened)
    met = row_of[row_of >= 0]
    fresh = np.ones(len(opened), bool)
    fresh[met] = False
    return Cover(row_of, np.flatnonzero(fresh), len(row_of) - len(met))


def _match(table: pa.Table, opened: Collection) -> np.ndarray:
    import pyarrow.compute as pc

    rows = opened.arrow(["key", "_check"])
    entry = pc.fill_null(pc.index_in(rows["key"], value_set=table["key"].combine_chunks()), -1)
    entry = entry.to_numpy().astype(np.int64)
    found = np.flatnonzero(entry >= 0)
    check = table["check"].to_numpy()
    same = rows["_check"].to_numpy()[found] == check[entry[found]]
    # another label, caption or time changes the check of a row and leaves its vector
    doubtful = found[~same]
    if len(doubtful):
        same[~same] = marks(opened.vectors, doubtful) == table["mark"].to_numpy()[entry[doubtful]]
    row_of = np.full(len(table), -1, np.int64)
    row_of[entry[found[same]]] = found[same]
    return row_of


def marks(vectors: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """A number per vector, uint64: equal for equal bytes, and else different but for one pair in 2^48.

    The sum of the 16-bit words, each times a fixed number of 64 bits, modulo 2^64.
    """
    count = len(vectors) if rows is None else len(rows)
    words = vectors.shape[1] * vectors.dtype.itemsize // 2
    factors = _scramble(np.arange(1, words + 1, dtype=np.uint64))
    found = np.empty(count, np.uint64)
    for start in range(0, count, BLOCK):
        part = slice(start, start + BLOCK)
        block = np.ascontiguousarray(vectors[part] if rows is None else vectors[rows[part]])
        found[part] = block.view(np.uint16).astype(np.uint64) @ factors
    return found


def _scramble(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): numbers that look random, the same everywhere."""
    x = numbers * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
