"""The writer of a collection: changes the Lance table one safe step at a time.

Every change is one atomic commit of LanceDB, after which the new files are brought to the disk and their checksums
are recorded. A crash between the two leaves files without a record; the next writer checks and records them. A commit
whose files are not whole is taken back: on a full disk LanceDB loses the end of a file without an error.
"""

from __future__ import annotations

import errno
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import ClipworksError, CollectionError
from .journal import HINTS, TABLE, Journal, newest_manifest, table_files
from .journal import NAME as JOURNAL
from .lock import NAME as LOCK
from .lock import WriterLock
from .table import (
    DTYPES,
    INDEXES,
    INTERNAL,
    OWN,
    SNAPSHOT,
    bad_rows,
    damaged,
    is_collection,
    literal,
    open_table,
    read_meta,
    row_check,
    scan,
    translated,
)

END = b"LANC"  # closes every data file and manifest of Lance
SMALL_FILES = 500  # commits after which small files are merged while embedding


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

            if fresh:  # at most the remains of a writer that died while making it
                shutil.rmtree(self.path / TABLE, ignore_errors=True)
            with self._change(1 << 16):
                self.table = lancedb.connect(str(self.path)).create_table(
                    Path(TABLE).stem, schema=self._schema, mode="create" if fresh else "overwrite"
                )
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
        unrecorded = self.journal.unrecorded()
        self.table = open_table(self.path)
        if not (unrecorded or damage or self.journal.cleaning or self.journal.broken):
            return
        # somebody died between a commit and its record: believe rows only after checking them
        recorded = [Path(name).name for name in self.journal.files if "/_versions/" in name]
        if recorded and any(map(_is_cut, (self.path / name for name in unrecorded))):
            self._take_back(min(recorded))
            self.table = open_table(self.path)
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
        with self._change(rows.nbytes):
            self.table.add(rows)

    def merge(self, rows: pa.Table) -> None:
        """Replace rows by key."""
        with self._change(rows.nbytes):
            self.table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove rows by key."""
        for start in range(0, len(keys), 1000):
            listed = ", ".join(literal(key) for key in keys[start : start + 1000])
            with self._change(1 << 16):
                self.table.delete(f"key IN ({listed})")

    def add_columns(self, fields: Sequence[pa.Field]) -> None:
        """Add user columns, empty for the rows that are there."""
        with self._change(1 << 16):
            self.table.add_columns(list(fields))

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
        versions = len(list((self.path / TABLE / "_versions").glob("*.manifest")))
        if not force and versions <= 8:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # readers use the snapshot, not old versions
            with self._change(self.table.stats()["total_bytes"]):
                self.table.optimize(cleanup_older_than=timedelta(days=36500))  # merges, removes nothing
            with translated(self.path, 1 << 16):
                self.journal.mark_cleaning(True)
                self.table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
                self._record()
                self.journal.mark_cleaning(False)
                self.journal.rewrite()
        self.commits = 0

    @contextmanager
    def _change(self, needed: int) -> Iterator[None]:
        """One commit: recorded when its files are whole and on the disk, else taken back."""
        before, there = newest_manifest(self.path), set(table_files(self.path))
        with translated(self.path, needed):
            yield
            try:
                for name in set(self.journal.unrecorded()) - there:
                    if _is_cut(self.path / name):  # the error that LanceDB did not raise
                        raise OSError(errno.ENOSPC, f"[Errno {errno.ENOSPC}] {name} could not be written to its end")
                self._record()
            except OSError:
                self._take_back(before)
                raise
        self.commits += 1
        if self.commits > SMALL_FILES:
            self.tidy(force=True)

    def _record(self) -> None:
        self.journal.append(self.journal.unrecorded(), self.journal.gone())

    def _take_back(self, before: str | None) -> None:
        """Remove the versions after `before`, which makes that one the newest again; needs no room on the disk."""
        for path in (self.path / TABLE / "_versions").iterdir():
            if path.name in HINTS or before is None or path.name < before:  # names count down
                path.unlink(missing_ok=True)


def _is_cut(path: Path) -> bool:
    """Whether a data file or a manifest lacks its closing mark."""
    if path.suffix not in (".lance", ".manifest"):
        return False
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - len(END)))
        return stream.read() != END


def _check_place(path: Path) -> None:
    """Refuse a folder that holds something else."""
    if path.exists() and not path.is_dir():
        raise CollectionError(f"{str(path)!r} is a file; a collection is a folder of its own.")
    own = {TABLE, LOCK, JOURNAL, SNAPSHOT, INDEXES}
    found = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    strange = [name for name in found if name not in own and not name.startswith(".")]
    if strange:
        held = f"it holds {strange[0]!r}"
        raise CollectionError(f"{str(path)!r} is no collection and not empty ({held}); choose a new folder.")
    if JOURNAL in found and table_files(path) and Journal.read(path).files:
        raise damaged(path, {TABLE: "has lost all its versions"})
