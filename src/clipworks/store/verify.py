"""`verify` finds damage and says what to do, with `repair=True` it keeps every intact row; `info` describes.

Three checks, from the outside in: every recorded file has the bytes it was written with; every row matches the check
it was written with; the copy for searching matches its own checksums.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import CollectionError
from . import indexed, snapshot
from .collection import Collection
from .journal import NAME as JOURNAL
from .journal import TABLE, Journal, newest_manifest, sha256, table_files
from .lock import WriterLock, owner
from .table import DTYPES, INTERNAL, OWN, bad_rows, is_collection, open_table, translated

WORK = ".repair"
FRAGMENTS = 1 << 20  # fragment numbers tried at most


@dataclass
class Damage:
    """One damaged part: its name, what is wrong, what to do about it."""

    part: str
    reason: str
    remedy: str


@dataclass
class Verification:
    """What `verify` found.

    Attributes
    ----------
    path : the collection
    n_rows, n_files : rows that are intact, here or in the copy for searching; files compared with their checksums
    damage : the damaged parts
    lost : keys of rows that match their check nowhere, as far as their keys can be read
    repaired : whether the damage was repaired
    """

    path: str
    n_rows: int = 0
    n_files: int = 0
    damage: list[Damage] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    repaired: bool = False

    @property
    def ok(self) -> bool:
        return not self.damage

    def as_rows(self) -> list[dict[str, str]]:
        """One dictionary per damaged part (part, reason, remedy)."""
        return [vars(part) for part in self.damage]

    def __str__(self) -> str:
        if self.ok:
            return f"{self.path}: intact; {self.n_rows} rows, {self.n_files} files"
        state = "repaired" if self.repaired else "damaged"
        return (
            f"{self.path}: {state}; {len(self.damage)} damaged parts, {self.n_rows} rows intact, {len(self.lost)} lost"
        )


def verify(path: str | os.PathLike, *, repair: bool = False) -> Verification:
    """Check every byte of a collection.

    Parameters
    ----------
    path : the collection's folder
    repair : write the table anew from all intact rows (also from those in the copy for searching); lost rows are
        made again by the next `embed`. What was damaged is kept in `.damaged-<time>` inside the folder.

    Returns
    -------
    Verification

    Raises
    ------
    CollectionError
        If there is no collection, or another process writes it.
    """
    place = Path(path)
    if not (place / TABLE).exists() and is_collection(place / WORK):
        os.rename(place / WORK / TABLE, place / TABLE)  # a repair that was killed in its last step
    if not is_collection(place) and not Journal.read(place).files:
        Collection(place)  # says what is wrong with the path
    held = owner(place)
    if held is not None:
        raise CollectionError(f"collection {str(place)!r} is being written by {held}; verify it when that is done.")
    found = Verification(str(place))
    _check_files(place, found)
    intact = _check_rows(place, found)
    found.n_rows = sum(len(part) for part in intact)
    for part, reason in snapshot.damage(place).items():
        found.damage.append(
            Damage(part, reason, "nothing is lost: it is made anew by `--repair` or after the next change")
        )
    table = bool(found.damage)  # damage of an index is no reason to write the table anew
    for part, reason in indexed.damage(place).items():
        found.damage.append(Damage(part, reason, "nothing is lost: searches are exact until `clipworks index` is run"))
    if table and repair:
        _repair(place, found, intact)
    if found.damage and repair:
        indexed.discard_damaged(place)
        found.repaired = True
    return found


def _check_files(place: Path, found: Verification) -> None:
    journal = Journal.read(place)
    again = "`--repair` keeps every intact row; embed again for the rest"
    missing = {} if journal.cleaning else journal.missing()
    for name, reason in missing.items():
        found.damage.append(Damage(name, reason, again))
    for name, (_, digest) in sorted(journal.files.items()):
        if name in missing or not (place / name).exists():
            continue
        found.n_files += 1
        if sha256(place / name) != digest:
            found.damage.append(Damage(name, "does not match its checksum", again))
    what = "`--repair` or the next `embed` checks all rows and writes it anew"
    if not journal.files and not journal.broken and any("/data/" in name for name in table_files(place)):
        found.damage.append(Damage(JOURNAL, "is missing", what))
    for number in journal.broken:
        found.damage.append(Damage(f"{JOURNAL} line {number}", "does not match its own check", what))


def _check_rows(place: Path, found: Verification) -> list[pa.Table]:
    """All rows that can be read and match their checks: of the table fragment by fragment, else of the copy."""
    intact: list[pa.Table] = []
    again = "`--repair` keeps every other row; embed again for these"
    newest = newest_manifest(place)
    version, spare = _spare(place) if found.damage else ("", None)
    if spare is not None and (newest is None or version < newest):
        return [spare]  # the table has lost its last changes; names count down
    try:
        table = open_table(place)
        dim = table.schema.field("vector").type.list_size
        total = int(table.stats()["fragment_stats"]["num_fragments"])
    except Exception as error:  # as below
        found.damage.append(Damage(TABLE, f"cannot be opened ({str(error)[:200]})", again))
        return [spare] if spare is not None else []
    met = unreadable = 0
    for number in range(FRAGMENTS):
        if met + unreadable >= total:
            break
        try:
            part = _fragment(table, number)
        except Exception:  # LanceDB raises almost anything for damaged files, panics of its own among them
            unreadable += 1
            continue
        if not len(part):
            continue
        met += 1
        bad = bad_rows(part, dim)
        if bad:
            keys = [part["key"][i].as_py() for i in bad]
            found.lost += [str(key) for key in keys]
            reason = f"{len(bad)} rows do not match their checks, the first is {keys[0]!r}"
            found.damage.append(Damage(f"rows of fragment {number}", reason, again))
            part = part.take(pa.array(np.setdiff1d(np.arange(len(part)), bad)))
        intact.append(part)
    if unreadable:
        found.damage.append(Damage(TABLE, f"{unreadable} of {total} fragments cannot be read", again))
    if spare is None and found.damage:
        version, spare = _spare(place)
    if spare is not None and version == newest:
        have = {key for part in intact for key in part["key"].to_pylist()}
        fresh = [i for i, key in enumerate(spare["key"].to_pylist()) if key not in have]
        found.lost = []  # the copy has every row
        if fresh:
            intact.append(spare.take(pa.array(fresh)))
    return intact


def _fragment(table: Any, number: int) -> pa.Table:
    """All columns of one fragment, in such a way that the files of the others are not opened."""
    where = f"_rowaddr >= {number << 32} AND _rowaddr < {(number + 1) << 32}"
    rows = table.search().where(where).select(["key"]).with_row_id(True).limit(None).to_arrow()
    return table.take_row_ids(rows["_rowid"].to_pylist()).to_arrow() if len(rows) else rows


def _spare(place: Path) -> tuple[str, pa.Table | None]:
    """Version and rows of the newest copy for searching; rows that do not match their checks are left out."""
    for folder in sorted((place / snapshot.SNAPSHOT).glob("[0-9]*")):  # names count down: the newest first
        found = snapshot.read(folder, folder.name + ".manifest", place, compare=0)  # every row has its own check
        if found is None:
            continue
        dim = found.vectors.shape[1]
        flat = pa.array(np.ascontiguousarray(found.vectors).reshape(-1))
        kind = pa.list_(DTYPES[str(found.vectors.dtype)], dim)
        column = pa.FixedSizeListArray.from_arrays(flat, dim)
        rows = found.table.append_column(pa.field("vector", kind, nullable=False), column)
        bad = bad_rows(rows, dim)
        return found.version, rows.take(pa.array(np.setdiff1d(np.arange(len(rows)), bad)))
    return "", None


def _repair(place: Path, found: Verification, parts: list[pa.Table]) -> None:
    """Write a new table from intact rows beside the old one, and exchange them."""
    if not parts:
        raise CollectionError(f"no row of collection {str(place)!r} can be read; remove the folder and embed again.")
    schema = parts[0].schema
    order = [f.name for f in schema if f.name not in ("_rowaddr", "_rowid")]
    with WriterLock(place), translated(place, sum(part.nbytes for part in parts)):
        import lancedb

        work = place / WORK
        shutil.rmtree(work, ignore_errors=True)
        names = [name for name in (*OWN, *INTERNAL) if name in order]
        names += [name for name in order if name not in names]
        wanted = pa.schema([schema.field(name) for name in names], metadata=schema.metadata)
        made = lancedb.connect(str(work)).create_table(Path(TABLE).stem, schema=wanted)
        for part in parts:
            made.add(part.select(names).cast(wanted))
        aside = place / f".damaged-{time.strftime('%Y%m%d-%H%M%S')}"
        aside.mkdir()
        # from here on a crash leaves the old table in `aside` and the new one in `work`: verify again
        if (place / TABLE).exists():
            os.rename(place / TABLE, aside / TABLE)
        if (place / JOURNAL).exists():
            os.rename(place / JOURNAL, aside / JOURNAL)
        os.rename(work / TABLE, place / TABLE)
        shutil.rmtree(work, ignore_errors=True)
        snapshot.discard(place)
        journal = Journal(place)
        journal.append(table_files(place), [])
    kept = {key for part in parts for key in part["key"].to_pylist()}
    found.n_rows, found.repaired = len(kept), True


def info(path: str | os.PathLike) -> dict[str, Any]:
    """Describe a collection without loading a model.

    Parameters
    ----------
    path : the collection's folder

    Returns
    -------
    dict: path, rows, dim, dtype, encoder, fingerprint, precision, image_size, labels, captions, columns, indexes
    (kind -> recall and rows; None if there is none), bytes, created, clipworks, version, writer
    """
    opened = Collection.open(path)
    recorded = opened.meta["encoder"]
    filled = {name: sum(v is not None for v in opened.column(name)) for name in ("label", "caption")}
    place = opened.path
    return {
        "path": str(place),
        "rows": len(opened),
        "dim": opened.dim,
        "dtype": opened.dtype,
        "encoder": recorded.get("source") or recorded.get("name") or "unknown",
        "fingerprint": opened.fingerprint or "unknown",
        "precision": recorded.get("precision", "unknown"),
        "image_size": recorded.get("config", {}).get("vision", {}).get("image_size"),
        "labels": filled["label"],
        "captions": filled["caption"],
        "columns": {name: kind for name, kind in opened.columns.items() if name not in OWN},
        "indexes": _indexes(place) or None,
        "bytes": sum(f.stat().st_size for f in place.rglob("*") if f.is_file()),
        "created": opened.meta.get("created"),
        "clipworks": opened.meta.get("clipworks"),
        "version": (1 << 64) - 1 - int(Path(opened.version).stem),
        "writer": owner(place),
    }


def _indexes(place: Path) -> dict[str, str]:
    found = indexed.indexes(place)
    return {k: f"recall {v['recall']:.3f}, {v['rows']:,} rows" if v else "damaged" for k, v in found.items()}
