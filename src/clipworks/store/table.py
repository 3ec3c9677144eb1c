"""The Lance table under a collection: its columns and metadata, checks of rows, errors in words."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import ClipworksError, CollectionError, check_choice
from .journal import TABLE, newest_manifest

FORMAT = 1
META = b"clipworks"
DTYPES = {"float16": pa.float16(), "float32": pa.float32()}
OWN = ("key", "vector", "digest", "mtime", "label", "caption")  # what every collection has
INTERNAL = ("_source", "_check")
SNAPSHOT, INDEXES = "snapshot", "indexes"
MEMORY = 256 * 2**20  # of working memory of a search, unless the caller says otherwise

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
    except (KeyError, ValueError, RecursionError) as error:
        raise CollectionError(f"{str(path)!r} holds a Lance table that clipworks did not write.") from error
    if not isinstance(meta, dict):
        raise damaged(path, {TABLE: "has metadata of another form"})
    if meta.get("format") != FORMAT:
        raise CollectionError(
            f"collection {str(path)!r} has format {meta.get('format')!r}; this version of clipworks reads {FORMAT}."
        )
    encoder = meta.get("encoder")
    vision = encoder.get("config", {}) if isinstance(encoder, dict) else None
    vision = vision.get("vision", {}) if isinstance(vision, dict) else None
    if not isinstance(encoder, dict) or not isinstance(vision, dict) or not all(
        isinstance(encoder.get(name) or "", str) for name in ("fingerprint", "name", "source", "precision", "weights")
    ):  # fmt: skip
        raise damaged(path, {TABLE: "says of its encoder what cannot be read"})
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
    except Exception as error:
        if not isinstance(error, (OSError, RuntimeError, ValueError, pa.ArrowException)) and not _is_panic(error):
            raise
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


def _is_panic(error: Exception) -> bool:
    """Whether LanceDB stumbled over a damaged file."""
    return type(error).__name__ == "RustPanic"


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
