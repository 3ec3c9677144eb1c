"""The Lance table under a collection: columns, metadata, and the writer that changes it one safe step at a time.

Every change is one atomic commit of LanceDB, after which the new files are brought to the disk and their checksums
are recorded. A crash between the two leaves files without a record; the next writer checks and records them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import ClipworksError, CollectionError, check_choice
from .journal import NAME as JOURNAL
from .journal import TABLE, Journal, newest_manifest, table_files
from .lock import NAME as LOCK
from .lock import WriterLock

FORMAT = 1
META = b"clipworks"
DTYPES = {"float16": pa.float16(), "float32": pa.float32()}
OWN = ("key", "vector", "digest", "mtime", "label", "caption")  # what every collection has
INTERNAL = ("_source", "_check")
SNAPSHOT = "snapshot"
SMALL_FILES = 500  # commits after which small files are merged while embedding


FULL = ("os error 28", "os error 27", "os error 122", "Errno 28", "Errno 27", "Errno 122")
READ_ONLY = ("os error 30", "os error 13", "os error 1)", "Errno 30", "Errno 13")


def make_schema(dim: int, dtype: str, meta: dict[str, Any], columns: Iterable[pa.Field] = ()) -> pa.Schema:
    """The Arrow schema of a collection; `meta` goes into its metadata as JSON."""
    check_choice("dtype", dtype, DTYPES)
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("vector", pa.list_(DTYPES[dtype], dim), nullable=False),
            pa.field("digest", pa.string()),
            pa.field("mtime", pa.float64()),
            pa.field("label", pa.string()),
            pa.field("caption", pa.string()),
            pa.field("_source", pa.string()),
            pa.field("_check", pa.int64(), nullable=False),
            *columns,
        ],
        metadata={META: json.dumps(meta, sort_keys=True).encode()},
    )


def read_meta(schema: pa.Schema, path: Path) -> dict[str, Any]:
    """The metadata of a collection, refused where another program or a newer format wrote it."""
    try:
        meta = json.loads((schema.metadata or {})[META])
    except (KeyError, ValueError) as error:
        raise CollectionError(f"{str(path)!r} holds a Lance table that clipworks did not write.") from error
    if meta.get("format") != FORMAT:
        raise CollectionError(
            f"collection {str(path)!r} has format {meta.get('format')!r}; this version of clipworks reads {FORMAT}."
        )
    return meta


def row_check(
    key: str, digest: str | None, mtime: float | None, label: str | None, caption: str | None, vector: bytes
) -> int:
    """64 bits over what belongs together in a row, so that damage shows and says which row it is."""
    state = hashlib.blake2b(vector, digest_size=8)
    state.update(b"" if mtime is None else struct.pack("<d", mtime))
    state.update("\0".join(("-" if part is None else "+" + part) for part in (key, digest, label, caption)).encode())
    return int.from_bytes(state.digest(), "little", signed=True)


def vectors_of(column: pa.Array | pa.ChunkedArray, dim: int) -> np.ndarray:
    """The (rows, dim) matrix inside a vector column."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)


def bad_rows(batch: pa.RecordBatch | pa.Table, dim: int) -> list[int]:
    """Positions of rows that do not match their check."""
    vectors = np.ascontiguousarray(vectors_of(batch.column("vector"), dim))
    given = [batch.column(name).to_pylist() for name in ("key", "digest", "mtime", "label", "caption", "_check")]
    return [
        i
        for i, (key, digest, mtime, label, caption, check) in enumerate(zip(*given, strict=True))
        if key is None or row_check(key, digest, mtime, label, caption, vectors[i].tobytes()) != check
    ]


def is_collection(path: Path) -> bool:
    """Whether there is a table inside (nothing is opened)."""
    return newest_manifest(path) is not None


def open_table(path: Path) -> Any:
    """LanceDB's table of a collection."""
    import lancedb

    with translated(path):
        return lancedb.connect(str(path)).open_table(Path(TABLE).stem)


@contextmanager
def translated(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn what LanceDB and the system raise into a `CollectionError` that says what to do."""
    try:
        yield
    except ClipworksError:
        raise
    except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        text = str(error)
        size = f" About {max(needed, 1 << 16):,} bytes are needed." if needed else ""
        if any(mark in text for mark in FULL):
            free = shutil.disk_usage(path if path.exists() else path.parent).free
            why = f"cannot be written: the disk is full or a size limit is reached ({free:,} bytes free).{size}"
            what = "What was written before is intact; run the same command again when there is room."
        elif any(mark in text for mark in READ_ONLY):
            why = "cannot be written: the folder is read-only for this user."
            what = "Change its permissions or choose another place."
        else:
            why = f"cannot be read or written: {text.splitlines()[0][:300]}"
            what = f"`clipworks verify {path}` names the damaged parts."
        raise CollectionError(f"collection {str(path)!r} {why} {what}") from error


class Writer:
    """The only way to change a collection; a context manager that holds its lock.

    Parameters
    ----------
    path : the collection's folder; made if it is not there
    schema : of a collection to be made; None opens an existing one
    overwrite : replace what is there, in one atomic step
    """

    def __init__(self, path: Path, schema: pa.Schema | None = None, *, overwrite: bool = False):
        self.path, self._schema, self._overwrite = path, schema, overwrite
        self._lock = WriterLock(path)
        self.table: Any = None
        self.meta: dict[str, Any] = {}
        self.commits = 0

    def __enter__(self) -> Writer:
        if not is_collection(self.path):
            _check_place(self.path)
            if self._schema is None:
                raise CollectionError(f"there is no collection at {str(self.path)!r}.")
            with translated(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
        self._lock.__enter__()
        try:
            self._open()
        except BaseException:
            self._lock.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.__exit__()

    def _open(self) -> None:
        for remains in self.path.glob(f".{JOURNAL}.*"):  # of a writer that died while it replaced the checksums
            remains.unlink(missing_ok=True)
        self.journal = Journal.read(self.path)
        fresh = not is_collection(self.path)
        if fresh or self._overwrite:
            import lancedb

            with translated(self.path, 1 << 16):
                if fresh:  # at most the remains of a writer that died while making it
                    shutil.rmtree(self.path / TABLE, ignore_errors=True)
                self.table = lancedb.connect(str(self.path)).create_table(
                    Path(TABLE).stem, schema=self._schema, mode="create" if fresh else "overwrite"
                )
            self._record()
        else:
            self._recover()
        self.meta = read_meta(self.table.schema, self.path)
        self.dim = self.table.schema.field("vector").type.list_size
        self.dtype = {v: k for k, v in DTYPES.items()}[self.table.schema.field("vector").type.value_type]

    def _recover(self) -> None:
        """Open what a writer left, however it ended; refuse what is damaged."""
        damage = self.journal.missing()
        if damage and not self.journal.cleaning:
            raise damaged(self.path, damage)
        self.table = open_table(self.path)
        unrecorded = self.journal.unrecorded()
        if not (unrecorded or damage or self.journal.cleaning or self.journal.broken):
            return
        # somebody died between a commit and its record: believe rows only after checking them
        dim = self.table.schema.field("vector").type.list_size
        for batch in scan(self.table, self.path):
            if bad := bad_rows(batch, dim):
                key = batch.column("key")[bad[0]].as_py()
                raise damaged(self.path, {f"row {key!r}": f"and {len(bad) - 1} others do not match their checks"})
        self.tidy(force=True)
        self.journal.rewrite()

    # -- reading -------------------------------------------------------------------------------------------------

    def rows(self, columns: Sequence[str]) -> pa.Table:
        """Some columns of all rows."""
        with translated(self.path):
            return self.table.search().select(list(columns)).limit(None).to_arrow()

    def columns(self) -> dict[str, pa.DataType]:
        """The user's columns and their types."""
        return {f.name: f.type for f in self.table.schema if f.name not in (*OWN, *INTERNAL)}

    # -- changing ------------------------------------------------------------------------------------------------

    def append(self, rows: pa.Table) -> None:
        """Add rows whose keys are new."""
        with translated(self.path, rows.nbytes):
            self.table.add(rows)
        self._record()

    def merge(self, rows: pa.Table) -> None:
        """Replace rows by key."""
        with translated(self.path, rows.nbytes):
            self.table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all().execute(rows)
        self._record()

    def delete(self, keys: Sequence[str]) -> None:
        """Remove rows by key."""
        with translated(self.path, 1 << 16):
            for start in range(0, len(keys), 1000):
                listed = ", ".join(literal(key) for key in keys[start : start + 1000])
                self.table.delete(f"key IN ({listed})")
        self._record()

    def add_columns(self, fields: Sequence[pa.Field]) -> None:
        """Add user columns, empty for the rows that are there."""
        with translated(self.path, 1 << 16):
            self.table.add_columns(list(fields))
        self._record()

    def build(self, rows: Sequence[dict[str, Any]], vectors: np.ndarray) -> pa.Table:
        """Rows of the table's schema from dictionaries without `vector` and `_check`, and their vectors."""
        exact = np.ascontiguousarray(vectors, dtype=np.dtype(self.dtype))
        if not np.isfinite(exact).all():
            key = rows[int(np.flatnonzero(~np.isfinite(exact).all(1))[0])]["key"]
            raise ClipworksError(f"the vector of {key!r} holds values that are no finite {self.dtype} numbers.")
        checks = [
            row_check(r["key"], r.get("digest"), r.get("mtime"), r.get("label"), r.get("caption"), v.tobytes())
            for r, v in zip(rows, exact, strict=True)
        ]
        arrays: dict[str, pa.Array] = {}
        for field in self.table.schema:
            if field.name == "vector":
                arrays["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(exact.reshape(-1)), self.dim)
            elif field.name == "_check":
                arrays["_check"] = pa.array(checks, pa.int64())
            else:
                arrays[field.name] = pa.array([r.get(field.name) for r in rows], field.type)
        return pa.table(arrays, schema=self.table.schema)

    def tidy(self, force: bool = False) -> None:
        """Merge small files and remove old versions, when there are enough of them."""
        self.commits = 0
        versions = len(list((self.path / TABLE / "_versions").glob("*.manifest")))
        if not force and versions <= 8:
            return
        self.journal.mark_cleaning(True)
        with translated(self.path, self.table.stats()["total_bytes"]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # readers use the snapshot, not old versions
            self.table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
        self._record()
        self.journal.mark_cleaning(False)
        self.journal.rewrite()

    def _record(self) -> None:
        with translated(self.path, 1 << 16):
            self.journal.append(self.journal.unrecorded(), self.journal.gone())
        self.commits += 1
        if self.commits > SMALL_FILES:
            self.tidy(force=True)


def scan(
    table: Any, path: Path, columns: Sequence[str] | None = None, rows: int = 8192, row_id: bool = False
) -> Iterator[pa.RecordBatch]:
    """All rows, a few thousand at a time."""
    query = table.search().limit(None)
    query = query.select(list(columns)) if columns else query
    query = query.with_row_id(True) if row_id else query
    with translated(path):
        yield from query.to_batches(batch_size=rows)


def damaged(path: Path, parts: dict[str, str]) -> CollectionError:
    """The error for damage, naming the first part and what to do."""
    name, reason = next(iter(parts.items()))
    more = f" ({len(parts) - 1} more)" if len(parts) > 1 else ""
    return CollectionError(
        f"collection {str(path)!r} is damaged: {name} {reason}{more}. `clipworks verify {path}` lists all damage, "
        "`--repair` keeps every intact row, and embedding again makes the rest."
    )


def literal(value: Any) -> str:
    """A value as an SQL literal."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, (int, float)):
        return repr(value)
    return "'" + str(value).replace("'", "''") + "'"


def _check_place(path: Path) -> None:
    """Refuse a folder that holds something else."""
    if path.exists() and not path.is_dir():
        raise CollectionError(f"{str(path)!r} is a file; a collection is a folder of its own.")
    own = {TABLE, LOCK, JOURNAL, SNAPSHOT}
    found = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    strange = [name for name in found if name not in own and not name.startswith(".")]
    if strange:
        held = f"it holds {strange[0]!r}"
        raise CollectionError(f"{str(path)!r} is no collection and not empty ({held}); choose a new folder.")
    if JOURNAL in found and table_files(path) and Journal.read(path).files:
        raise damaged(path, {TABLE: "has lost all its versions"})
