"""A memory-mapped copy of one version of the table, for search: vectors as one matrix, the other columns beside it.

It is derived: made when it is first needed, replaced when the table has changed, made again when it is damaged. Rows
are sorted by key, so that results do not depend on the order in which rows came. Reading it needs no LanceDB.

The rows are compared with their checksum whenever they are opened, the vectors as long as this takes no noticeable
time (`READ`); those of a larger collection are by `verify`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import CollectionError
from . import derived
from .journal import TABLE, Journal, newest_manifest, sha256
from .table import (
    DTYPES,
    INTERNAL,
    OWN,
    SNAPSHOT,
    bad_rows,
    damaged,
    open_table,
    read_meta,
    scan,
    translated,
    vectors_of,
)

ROWS, VECTORS = "rows.arrow", "vectors.npy"
READ = 128 << 20  # bytes that are compared with their checksum at every opening, some 0.1 s


@dataclass
class Snapshot:
    """One version of a collection, memory-mapped.

    Attributes
    ----------
    version : file name of the manifest it was made from
    vectors : (rows, dim) float16 or float32
    table : the other columns, row by row
    meta : metadata of the collection
    norm : length of the longest vector
    """

    version: str
    vectors: np.ndarray
    table: pa.Table
    meta: dict[str, Any]
    norm: float


def current(path: Path) -> Snapshot:
    """The snapshot of the newest version, made if need be."""
    for _ in range(5):
        version = newest_manifest(path)
        if version is None:
            raise CollectionError(f"there is no collection at {str(path)!r}.")
        found = read(path / SNAPSHOT / Path(version).stem, version, path)
        if found is None:
            found = _make(path, version)
        if found is not None:
            return found
    raise CollectionError(f"collection {str(path)!r} changes too fast to be read; try again when the writer is done.")


def read(folder: Path, version: str, path: Path, compare: int = READ) -> Snapshot | None:
    """The snapshot in a folder, or None if it is not there or not whole; vectors up to `compare` bytes are compared."""
    try:
        facts = derived.read_facts(folder)
        for name in (ROWS, VECTORS):  # Arrow trusts what it maps: a wrong offset would end the process
            size, digest = facts["files"][name]
            if (name == ROWS or size <= compare) and sha256(folder / name) != digest:
                return None
        table = pa.ipc.open_file(pa.memory_map(str(folder / ROWS))).read_all()
        vectors = np.load(folder / VECTORS, mmap_mode="r" if table.num_rows else None, allow_pickle=False)
        norm = float(facts["norm"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, pa.ArrowException):
        return None
    has = {*OWN, *INTERNAL} - {"vector"} <= set(table.column_names)
    shaped = vectors.ndim == 2 and len(vectors) == table.num_rows and str(vectors.dtype) in DTYPES
    if not (has and shaped and norm >= 0):
        return None
    return Snapshot(version, vectors, table, read_meta(table.schema, path), norm)


def _make(path: Path, version: str) -> Snapshot | None:
    """Write the snapshot at its place, or in a temporary folder where the place is full or read-only."""
    try:
        (path / SNAPSHOT).mkdir(exist_ok=True)
        return _make_in(path / SNAPSHOT, path, version)
    except OSError:
        size = sum(file.stat().st_size for file in (path / TABLE).rglob("*.lance"))
        spare = tempfile.TemporaryDirectory(prefix="clipworks-", ignore_cleanup_errors=True)
        with translated(path, size), spare as folder:
            return read(Path(folder), version, path) if _write(path, Path(folder), version) else None  # stays mapped


def _make_in(place: Path, path: Path, version: str) -> Snapshot | None:
    target = place / Path(version).stem
    if not derived.make(place, target, lambda folder: _write(path, folder, version)):
        return None
    derived.clear(old for old in place.iterdir() if old.name != target.name)
    return read(target, version, path)


def _write(path: Path, folder: Path, version: str) -> bool:
    table = open_table(path)
    if newest_manifest(path) != version:
        return False
    schema = table.schema
    read_meta(schema, path)  # a table of another program is refused here
    dim, dtype = schema.field("vector").type.list_size, schema.field("vector").type.value_type.to_pandas_dtype()
    names = [f.name for f in schema if f.name != "vector"]
    parts = list(scan(table, path, names, row_id=True))
    rows = pa.Table.from_batches(parts) if parts else schema.remove(schema.get_field_index("vector")).empty_table()
    ids = rows["_rowid"].to_numpy() if parts else np.empty(0, np.uint64)
    keys = np.array(rows["key"].to_pylist(), dtype=object)
    order = np.argsort(keys, kind="stable")
    place = np.empty(len(order), np.int64)  # row of the table -> row of the snapshot
    place[order] = np.arange(len(order))
    norm = 0.0
    by_id = np.argsort(ids, kind="stable")
    if len(keys):
        vectors = np.lib.format.open_memmap(folder / VECTORS, mode="w+", dtype=dtype, shape=(len(keys), dim))
        _reserve(folder / VECTORS)
        for batch in scan(table, path, row_id=True):
            if bad := bad_rows(batch, dim):
                key = batch.column("key")[bad[0]].as_py()
                raise damaged(path, {f"row {key!r}": f"does not match its check, nor do {len(bad) - 1} others"})
            where = by_id[np.searchsorted(ids[by_id], batch.column("_rowid").to_numpy())]
            part = vectors_of(batch.column("vector"), dim)
            vectors[place[where]] = part
            norm = max(norm, float(np.linalg.norm(part.astype(np.float32), axis=1).max()))
        vectors.flush()
        del vectors
    else:
        np.save(folder / VECTORS, np.empty((0, dim), dtype))
    check_table(path, version)
    plain = rows.drop_columns(["_rowid"]) if parts else rows
    plain = plain.take(pa.array(order)).combine_chunks().replace_schema_metadata(schema.metadata)
    with pa.OSFile(str(folder / ROWS), "wb") as stream, pa.ipc.new_file(stream, plain.schema) as writer:
        writer.write_table(plain)
    derived.seal(folder, (ROWS, VECTORS), norm=norm)
    return True


def check_table(path: Path, version: str, most: int | None = None) -> None:
    """Refuse a table whose files are not what was written; the rows' own checks do not cover a user's columns.

    Of more than `most` bytes none is read.
    """
    journal = Journal.read(path)
    names = journal.behind(version)
    if most is not None and sum(journal.files[name][0] for name in names) > most:
        return
    if found := journal.changed(names):
        raise damaged(path, found)


def _reserve(path: Path) -> None:
    """Take the room of a sparse file now: on a full disk, writing to its map later would end the process."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)


def damage(path: Path) -> dict[str, str]:
    """Parts of the present snapshot that do not match their checksums."""
    folder = path / SNAPSHOT / Path(newest_manifest(path) or "none").stem
    found = derived.damage(folder) if folder.exists() else {}
    return {f"{SNAPSHOT}/{name}": reason for name, reason in found.items()}


def discard(path: Path) -> None:
    """Remove every snapshot; the next reader makes a new one."""
    shutil.rmtree(path / SNAPSHOT, ignore_errors=True)
