"""Collections in an object store: `publish` puts one there, and it is searched where it lies, through LanceDB.

    s3://bucket/photos.shards/
      000.collection/     items.lance, published.json
      001.collection/
      ...

A published collection is the same Lance table, complete with what it says of its encoder, and nothing else: no lock, no
checksums, no mapped copy. It has no writer; a new version is published over the old one in one commit. Every row has 64
bits over all that belongs to it, which are compared for the rows that are answered. Large ones get LanceDB's own index,
so that a search reads some megabytes and not all vectors; `published.json` says how hard it has to look.

Addresses are those that both fsspec and LanceDB know (`s3://`, `gs://`, `az://`, `file://`); credentials and endpoints
come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL` and the like). Nothing is fetched that was not named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa

from ..errors import ClipworksError, CollectionError, check_choice, check_range, need
from .collection import Collection, condition_of, wrong_condition
from .journal import TABLE
from .table import INTERNAL, bad_rows, open_table, read_meta, scan, vectors_of

FACTS = "published.json"
CHECKED = ("key", "vector", "digest", "mtime", "label", "caption", "_check")
SMALLEST = 8192  # rows from which an index pays
ASKED = 50  # rows whose neighbours the index is measured with
TOGETHER = 16  # shards that are asked at the same time
ROUNDING = 1e-3  # of Lance's products, far above what was seen (2e-5)


@dataclass
class Published:
    """What `publish` did.

    Attributes
    ----------
    address : where the collection lies now
    rows : how many there are
    recall : share of the ten nearest that the index finds, None without one
    breadth : cells of the index that are looked at, 0 without one
    """

    address: str
    rows: int
    recall: float | None = None
    breadth: int = 0

    def __str__(self) -> str:
        index = "no index" if self.recall is None else f"index with a recall of {self.recall:.3f}"
        return f"{self.address}: {self.rows:,} rows, {index}"


def is_address(place: Any) -> TypeGuard[str]:
    """Whether it names a place in an object store: it begins with a protocol."""
    return isinstance(place, str) and "://" in place


def publish(
    collection: str | os.PathLike | Collection,
    address: str,
    *,
    index: bool | None = None,
    recall: float = 0.95,
    overwrite: bool = False,
) -> Published:
    """Put a collection into an object store, where `search_shards` finds it.

    Parameters
    ----------
    collection : a collection or its folder
    address : where it shall lie, such as s3://bucket/photos.shards/000.collection
    index : whether LanceDB's index is built there (default: from 8,192 rows on)
    recall : share of the ten nearest that it must find, measured with 50 of the rows; it looks as hard as it must
    overwrite : replace what is there, in one step

    Returns
    -------
    Published

    Raises
    ------
    CollectionError
        If the place is taken or cannot be written, or the collection is damaged.
    """
    import lancedb

    check_range("recall", recall, 0.0, 1.0)
    if not is_address(address):
        raise ClipworksError(f"address must begin with a protocol, such as s3:// or file://. Got {address!r:.120}.")
    opened, address = Collection.open(collection), address.rstrip("/")
    local = open_table(opened.path)
    rows = pa.RecordBatchReader.from_batches(local.schema, scan(local, opened.path))
    with _reached(address):
        store, mode = lancedb.connect(address), "overwrite" if overwrite else "create"
        if not overwrite and _exists(address):
            raise CollectionError(f"there is a collection at {address!r} already; overwrite=True replaces it.")
        table = store.create_table(Path(TABLE).stem, rows, schema=local.schema, mode=mode)
        done = Published(address, table.count_rows())
        if done.rows != len(opened):
            raise CollectionError(f"{address!r} got {done.rows} rows of {len(opened)}: somebody wrote meanwhile.")
        if done.rows >= SMALLEST if index is None else index and done.rows:
            _index(table, opened, done, recall)
        _write(address, {"format": 1, "rows": done.rows, "recall": done.recall, "breadth": done.breadth})
    return done


def _index(table: Any, opened: Collection, done: Published, least: float) -> None:
    """Build LanceDB's index and find how many of its cells must be looked at."""
    from lancedb.index import IvfSq

    from .ann import doubling
    from .index import unseen
    from .search import nearest

    cells = max(1, min(round(done.rows**0.5), done.rows // 2048))
    table.create_index("vector", config=IvfSq(distance_type="dot", num_partitions=cells, max_iterations=10))
    chosen = np.random.default_rng(0).choice(done.rows, min(ASKED, done.rows), replace=False)
    queries = unseen(opened, np.sort(chosen))
    exact = nearest(opened, queries, 10, index="exact")[1]
    there = [{opened.keys[row] for row in rows} for rows in exact]
    shard = Shard(done.address, table=table)
    for breadth in doubling(1, cells):
        shard.breadth = done.breadth = breadth
        found = [{key for _, key, _ in shard.hits(query, 10)} for query in queries]
        done.recall = float(np.mean([len(a & b) / len(b) for a, b in zip(found, there, strict=True)]))
        if done.recall >= least:
            return


class Shard:
    """A published collection, open for searching.

    Parameters
    ----------
    address : where it lies
    prefix : what is put before its keys
    table : LanceDB's table, where it is open already

    Attributes
    ----------
    path, meta, dim, fingerprint, columns : as of a `Collection`; the path is the address
    breadth : cells of its index that are looked at; 0 without one
    """

    def __init__(self, address: str, prefix: str = "", table: Any = None):
        import lancedb

        self.path, self.prefix = address, prefix
        with _reached(address):
            self.table = lancedb.connect(address).open_table(Path(TABLE).stem) if table is None else table
            self.meta = read_meta(self.table.schema, Path(address))
            self.rows = self.table.count_rows()
            self.breadth = int(_read(address).get("breadth", 0)) if table is None and self.table.list_indices() else 0
        self.dim = self.table.schema.field("vector").type.list_size
        self.columns = {f.name: str(f.type) for f in self.table.schema if f.name not in ("vector", *INTERNAL)}

    @property
    def fingerprint(self) -> str:
        return self.meta["encoder"].get("fingerprint", "")

    def hits(
        self,
        query: np.ndarray,
        k: int,
        where: str | Mapping[str, Any] | None = None,
        columns: Sequence[str] = (),
        index: str = "auto",
    ) -> list[tuple[float, str, dict[str, Any]]]:
        """The k nearest rows to a query (dim,) as score, key and columns, best first.

        Scores are computed here from the rows' own vectors, as in a local collection. Without an index, or with
        index="exact", no row is missing: as many more are asked for as the rounding of LanceDB's products could hide.
        """
        check_choice("index", index, ("auto", "exact", "lance"))
        for name in columns:
            check_choice("columns", name, self.columns)
        if index == "lance" and not self.breadth:
            raise ClipworksError(f"index 'lance' was not built when {self.path!r} was published.")
        if not self.rows:
            return []
        condition = None if where is None else condition_of(where, self.columns)
        quick = self.breadth > 0 and index != "exact"
        wanted = min(self.rows, 2 * k + (16 if quick else 48))
        while True:
            found = self._ask(query, wanted, condition, quick, columns)
            vectors = vectors_of(found["vector"], self.dim).astype(np.float32)
            scores, keys = (vectors * query).sum(1), found["key"].to_pylist()
            order = sorted(range(len(keys)), key=lambda i: (-scores[i], keys[i]))[:k]
            if quick or len(keys) < wanted or wanted >= self.rows:
                break
            longest = float(np.linalg.norm(vectors, axis=1).max())
            slack = ROUNDING * longest * float(np.linalg.norm(query))
            if 1 - float(np.max(found["_distance"].to_numpy())) + slack < scores[order[-1]]:
                break
            wanted = min(self.rows, 8 * wanted)
        rows = found.select(list(columns)).take(order).to_pylist() if columns else [{} for _ in order]
        return [(float(scores[i]), keys[i], row) for i, row in zip(order, rows, strict=True)]

    def _ask(self, query: np.ndarray, count: int, condition: str | None, quick: bool, columns: Sequence[str]) -> Any:
        """The `count` rows that LanceDB finds nearest, each compared with its check."""
        names = list(dict.fromkeys([*CHECKED, *columns, "_distance"]))
        with _reached(self.path):
            asked: Any = self.table.search(query, vector_column_name="vector")
            asked = asked.distance_type("dot").limit(count)
            asked = asked.nprobes(self.breadth) if quick else asked.bypass_vector_index()
            try:
                asked = asked if condition is None else asked.where(condition, prefilter=True)
                found = asked.select(names).to_arrow()
            except (ValueError, RuntimeError) as error:
                if condition is None:
                    raise
                raise wrong_condition(condition, self.columns, error) from error
        if bad := bad_rows(found, self.dim):
            raise CollectionError(f"collection {self.path!r} is damaged: row {found['key'][bad[0]].as_py()!r} does "
                                  "not match its check. Publish it again.")  # fmt: skip
        return found


def published(address: str) -> list[Shard]:
    """The collection at an address, or those in the folder there, in the order of their names.

    Raises
    ------
    CollectionError
        If there is none, or one cannot be read.
    """
    address = address.rstrip("/")
    with _reached(address):
        if _exists(address):
            return [Shard(address)]
        system, place = _place(address)
        folders = sorted(entry["name"] for entry in system.ls(place, detail=True) if entry["type"] == "directory")
        names = [name.rstrip("/").rpartition("/")[2] for name in folders]
        places = [f"{address}/{name}" for name in names if not name.startswith(".") and _exists(f"{address}/{name}")]
    if not places:
        raise CollectionError(f"there is no published collection in {address!r}.")
    return list(together(lambda place: Shard(place, f"{place.rpartition('/')[2]}/"), places))


def together(work: Any, many: Sequence[Any]) -> Iterator[Any]:
    """`work` of each, some at a time since most of it is waiting for the store, in their order."""
    with ThreadPoolExecutor(TOGETHER, "clipworks-shards") as pool:
        yield from pool.map(work, many)


# -- the files beside the table ----------------------------------------------------------------------------------


def _place(address: str) -> tuple[Any, str]:
    """The file system of fsspec that an address belongs to, and the path in it."""
    return need("fsspec", "scale").core.url_to_fs(address)


def _exists(address: str) -> bool:
    system, place = _place(address)
    return bool(system.exists(f"{place}/{TABLE}/_versions"))


def _write(address: str, facts: dict[str, Any]) -> None:
    system, place = _place(address)
    system.pipe_file(f"{place}/{FACTS}", json.dumps(facts).encode())


def _read(address: str) -> dict[str, Any]:
    system, place = _place(address)
    if not system.exists(f"{place}/{FACTS}"):
        return {}
    facts = json.loads(system.cat_file(f"{place}/{FACTS}"))
    if not isinstance(facts, dict) or not isinstance(facts.get("breadth"), int) or not 0 <= facts["breadth"] < 1 << 20:
        raise CollectionError(f"{address}/{FACTS} has another form. Publish the collection again.")
    return facts


@contextmanager
def _reached(address: str) -> Iterator[None]:
    """What LanceDB, fsspec and the store raise, as an error that says what to look at."""
    try:
        yield
    except ClipworksError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise CollectionError(
            f"{address!r} cannot be read or written: {reason}. Credentials and endpoint are those of the environment, "
            "and fsspec needs the package of its protocol (s3fs, gcsfs, adlfs)."
        ) from error
