"""The kinds of approximate index: what each stores, and how it is built, extended and asked.

All rank by inner product and only propose candidates: whoever asks computes their scores again from the vectors of the
collection. Entries are numbered in the order in which they were added.

- ivf: faiss `IndexIVFScalarQuantizer`: rows in cells of a k-means, one byte per number; some cells are looked through
- hnsw: faiss `IndexHNSWSQ`: a graph of near neighbours, one byte per number; quick to ask, slow to build
- pq: faiss `IndexIVFPQ`: cells as above, one byte per eight numbers; the smallest
- lance: LanceDB's IVF-SQ over a Lance table of its own: cells as above, read from the disk when they are looked
  through; needs no further library

References: Jegou et al., Product quantization for nearest neighbor search, TPAMI 2011; Malkov and Yashunin, Efficient
and robust approximate nearest neighbor search using hierarchical navigable small world graphs, TPAMI 2020.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import ClipworksError, need

LINKS = 32  # neighbours of an entry in the graph, twice as many on its ground floor
BREADTH = 128  # entries looked at for each while the graph is built
POINTS = 64  # training rows per cell, as many as faiss advises at least (39) and some more
FILE, TABLE = "index.faiss", "entries"


@dataclass(frozen=True)
class Effort:
    """How hard an index looks.

    Attributes
    ----------
    breadth : cells that are looked through, or entries of the graph kept in view
    candidates : scored again per hit
    """

    breadth: int
    candidates: int


@dataclass(frozen=True)
class Plan:
    """What an index is built from.

    Attributes
    ----------
    rows, dim : shape of the vectors
    sample : float32 rows to train on
    blocks : returns all rows in order, float32, a block at a time
    seed : of the clustering
    """

    rows: int
    dim: int
    sample: np.ndarray
    blocks: Callable[[], Iterable[np.ndarray]]
    seed: int

    @property
    def cells(self) -> int:
        return min(cells(self.rows), max(1, len(self.sample) // 39))


def cells(rows: int) -> int:
    """Cells of a k-means for so many rows.

    >>> cells(1_000), cells(1_000_000)
    (25, 2000)
    """
    return max(1, min(round(2 * rows**0.5), rows // 39))


def pieces(dim: int) -> int:
    """Parts into which product quantization cuts a vector: of eight numbers each, or of the nearest size that fits.

    >>> pieces(512), pieces(100), pieces(7)
    (64, 10, 1)
    """
    return next(dim // size for size in (8, 10, 12, 16, 7, 6, 5, 4, dim) if dim % size == 0 and size <= dim)


class Kind(ABC):
    """A kind of index, open.

    Attributes
    ----------
    extensible : whether entries can be added without building it anew
    """

    extensible = True

    @classmethod
    @abstractmethod
    def size(cls, rows: int, dim: int) -> int:
        """Bytes that it takes in memory."""

    @classmethod
    @abstractmethod
    def build(cls, folder: Path, plan: Plan) -> Kind:
        """Build it and write its files into a folder."""

    @classmethod
    @abstractmethod
    def open(cls, folder: Path) -> Kind:
        """Open what `build` or `extend` wrote."""

    @abstractmethod
    def extend(self, folder: Path, blocks: Iterable[np.ndarray]) -> None:
        """Add entries, and write its files into another folder."""

    @abstractmethod
    def efforts(self) -> Iterator[Effort]:
        """From the least to the largest."""

    @abstractmethod
    def search(self, queries: np.ndarray, count: int, breadth: int, allowed: np.ndarray | None) -> np.ndarray:
        """Entries near to each query, (q, count) int64 in no order, -1 where there are no more.

        Parameters
        ----------
        queries : float32 (q, dim)
        count : entries per query
        breadth : see `Effort`
        allowed : bool per entry; None allows all
        """


class Faiss(Kind):
    """What the three indexes of faiss share."""

    def __init__(self, index: Any):
        self.index = index
        self.faiss = need("faiss", "search")

    @classmethod
    @abstractmethod
    def empty(cls, faiss: Any, plan: Plan) -> Any:
        """The index of faiss, untrained."""

    @classmethod
    def build(cls, folder: Path, plan: Plan) -> Kind:
        faiss = need("faiss", "search")
        index = cls.empty(faiss, plan)
        index.train(plan.sample)
        made = cls(index)
        made.extend(folder, plan.blocks())
        return made

    @classmethod
    def open(cls, folder: Path) -> Kind:
        return cls(need("faiss", "search").read_index(str(folder / FILE)))

    def extend(self, folder: Path, blocks: Iterable[np.ndarray]) -> None:
        for block in blocks:
            self.index.add(block)
        self.faiss.write_index(self.index, str(folder / FILE))

    @abstractmethod
    def parameters(self, count: int, breadth: int) -> Any:
        """The search parameters of faiss."""

    def search(self, queries: np.ndarray, count: int, breadth: int, allowed: np.ndarray | None) -> np.ndarray:
        count = min(count, self.index.ntotal)
        parameters = self.parameters(count, breadth)
        if allowed is not None:
            # both stay referenced until the search is done: faiss keeps bare pointers
            bits = np.packbits(allowed, bitorder="little")
            parameters.sel = selector = self.faiss.IDSelectorBitmap(len(bits), self.faiss.swig_ptr(bits))
            found = self.index.search(queries, count, params=parameters)[1]
            del selector
            return found
        return self.index.search(queries, count, params=parameters)[1]


class Ivf(Faiss):
    """Cells of a k-means, one byte per number."""

    @classmethod
    def size(cls, rows: int, dim: int) -> int:
        return rows * (dim + 8) + 4 * dim * cells(rows)

    @classmethod
    def empty(cls, faiss: Any, plan: Plan) -> Any:
        coarse, count = faiss.IndexFlatIP(plan.dim), plan.cells
        index = faiss.IndexIVFScalarQuantizer(
            coarse, plan.dim, count, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        )
        return _owning(index, coarse, plan.seed)

    def efforts(self) -> Iterator[Effort]:
        for breadth in doubling(1, min(self.index.nlist, 256)):
            yield Effort(breadth, 4)

    def parameters(self, count: int, breadth: int) -> Any:
        return self.faiss.SearchParametersIVF(nprobe=breadth)


class Pq(Ivf):
    """Cells of a k-means, one byte per eight numbers; many candidates make up for it."""

    @classmethod
    def size(cls, rows: int, dim: int) -> int:
        return rows * (pieces(dim) + 8) + 4 * dim * (cells(rows) + 256)

    @classmethod
    def empty(cls, faiss: Any, plan: Plan) -> Any:
        coarse, count = faiss.IndexFlatIP(plan.dim), plan.cells
        index = faiss.IndexIVFPQ(coarse, plan.dim, count, pieces(plan.dim), 8, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.min_points_per_centroid, index.pq.cp.seed = 1, plan.seed
        return _owning(index, coarse, plan.seed)

    def efforts(self) -> Iterator[Effort]:
        for breadth in doubling(1, min(self.index.nlist, 256)):
            yield Effort(breadth, min(200, max(10, 2 * breadth)))


class Hnsw(Faiss):
    """A graph of near neighbours, one byte per number."""

    @classmethod
    def size(cls, rows: int, dim: int) -> int:
        return rows * (dim + 4 * (2 * LINKS + 2) + 16)

    @classmethod
    def empty(cls, faiss: Any, plan: Plan) -> Any:
        kind = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexHNSWSQ(plan.dim, kind, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BREADTH
        return index

    def efforts(self) -> Iterator[Effort]:
        for breadth in doubling(16, 1024):
            yield Effort(breadth, 4)

    def parameters(self, count: int, breadth: int) -> Any:
        return self.faiss.SearchParametersHNSW(efSearch=max(breadth, count))


class Lance(Kind):
    """LanceDB's IVF-SQ (one byte per number), over a Lance table with a copy of the vectors."""

    extensible = False

    def __init__(self, table: Any):
        self.table = table

    @classmethod
    def size(cls, rows: int, dim: int) -> int:
        return 1 << 28  # its parts are read when they are needed

    @classmethod
    def build(cls, folder: Path, plan: Plan) -> Kind:
        import lancedb
        from lancedb.index import IvfSq

        # float32: LanceDB clusters float16 several times as slowly
        schema = pa.schema([pa.field("entry", pa.int64()), pa.field("vector", pa.list_(pa.float32(), plan.dim))])

        def batches() -> Iterator[pa.RecordBatch]:
            start = 0
            for block in plan.blocks():
                numbers = pa.array(np.arange(start, start + len(block)))
                flat = pa.array(np.ascontiguousarray(block, np.float32).reshape(-1))
                yield pa.record_batch([numbers, pa.FixedSizeListArray.from_arrays(flat, plan.dim)], schema=schema)
                start += len(block)

        table = lancedb.connect(str(folder)).create_table(
            TABLE, pa.RecordBatchReader.from_batches(schema, batches()), schema=schema
        )
        count = _lance_cells(plan.rows)
        config = IvfSq(distance_type="dot", num_partitions=count, sample_rate=POINTS, max_iterations=10)
        table.create_index("vector", config=config)
        return cls(table)

    @classmethod
    def open(cls, folder: Path) -> Kind:
        import lancedb

        return cls(lancedb.connect(str(folder)).open_table(TABLE))

    def extend(self, folder: Path, blocks: Iterable[np.ndarray]) -> None:
        raise ClipworksError("an index of LanceDB is built anew, not extended.")

    def efforts(self) -> Iterator[Effort]:
        for breadth in doubling(1, min(_lance_cells(self.table.count_rows()), 128)):
            yield Effort(breadth, 4)

    def search(self, queries: np.ndarray, count: int, breadth: int, allowed: np.ndarray | None) -> np.ndarray:
        # rows that are not allowed are taken out afterwards, so that more of them are asked for
        share = 1.0 if allowed is None else max(float(allowed.mean()), 0.01)
        wanted = min(self.table.count_rows(), round(1.2 * count / share) if share < 1 else count)
        found = np.full((len(queries), count), -1, np.int64)
        for row, query in zip(found, queries, strict=True):
            asked = self.table.search(query, vector_column_name="vector").distance_type("dot").nprobes(breadth)
            near = asked.limit(wanted).select(["entry", "_distance"]).to_arrow()["entry"].to_numpy()
            near = near if allowed is None else near[allowed[near]]
            row[: min(len(near), count)] = near[:count]
        return found


KINDS: dict[str, type[Kind]] = {"ivf": Ivf, "hnsw": Hnsw, "pq": Pq, "lance": Lance}


def _lance_cells(rows: int) -> int:
    """Larger cells than elsewhere, as LanceDB advises: each is read from the disk in one go."""
    return min(cells(rows), max(8, rows // 2048))


def _owning(index: Any, coarse: Any, seed: int) -> Any:
    """The index with its coarse quantizer, which it shall outlive the name of."""
    coarse.this.disown()
    index.own_fields = True
    index.cp.min_points_per_centroid, index.cp.seed = 1, seed
    return index


def doubling(low: int, high: int) -> Iterator[int]:
    """From `low` twice as many each time, and `high` at last."""
    while low < high:
        yield low
        low *= 2
    yield high
