"""What a collection knows already, compared with what a source shows now; and the user's columns and their types."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.item import Item
from ..errors import BadImage
from .table import INTERNAL, OWN, literal, translated, vectors_of
from .writer import Writer

_TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}


class Known:
    """The rows of a collection without their vectors, by key.

    Parameters
    ----------
    writer : of the collection
    columns : the user's columns, to compare
    """

    def __init__(self, writer: Writer, columns: UserColumns):
        self.writer, self.columns, self.user = writer, columns, list(columns.types)
        table = writer.rows(["key", "digest", "mtime", "label", "caption", "_source", *self.user])
        self.data = {name: table[name].to_pylist() for name in table.column_names}
        self.row = {key: i for i, key in enumerate(self.data["key"])}
        self.seen = np.zeros(len(self.row), bool)

    def __contains__(self, key: str) -> bool:
        return key in self.row

    def source_of(self, key: str) -> str:
        return self.data["_source"][self.row[key]] or "elsewhere"

    def look(self, item: Item, source: str) -> str:
        """What to do with an item: "new", "same", "stale" (other values, same image), "changed", or "taken".

        An unchanged modification time is believed; otherwise the bytes decide. A key that came from another source
        is taken, unless the bytes are the same or that source is gone (a folder that was moved).
        """
        i = self.row.get(item.key)
        if i is None:
            return "new"
        self.seen[i] = True
        other = self.data["_source"][i] != source
        same_time = item.mtime is not None and item.mtime == self.data["mtime"][i] and not other
        if not same_time:
            try:
                same_bytes = item.digest == self.data["digest"][i]
            except BadImage:
                return "changed"  # the loader meets the same error and reports it
            if not same_bytes:
                former = self.data["_source"][i]
                lives = former and (not os.path.isabs(former) or Path(former).exists())
                return "taken" if other and lives else "changed"
        return "same" if same_time and self._same_values(i, item) else self._stale_or_same(i, item, other)

    def _stale_or_same(self, i: int, item: Item, other: bool) -> str:
        moved = other or item.mtime != self.data["mtime"][i]
        return "stale" if moved or not self._same_values(i, item) else "same"

    def _same_values(self, i: int, item: Item) -> bool:
        if self.data["label"][i] != item.label or self.data["caption"][i] != item.caption:
            return False
        given = self.columns.fit(item.columns)  # as they would be stored: a value that does not fit is empty
        return all(_equal(self.data[name][i], given.pop(name, None)) for name in self.user) and not given

    def unseen(self, source: str) -> list[str]:
        """Keys that came from `source` and that it did not show this time."""
        return [key for key, i in self.row.items() if not self.seen[i] and self.data["_source"][i] == source]

    def vectors(self, keys: Sequence[str]) -> np.ndarray:
        """The stored vectors of some keys, in their order."""
        with translated(self.writer.path):
            found = (
                self.writer.table.search()
                .where(f"key IN ({', '.join(map(literal, keys))})")
                .select(["key", "vector"])
                .limit(None)
                .to_arrow()
            )
        place = {key: i for i, key in enumerate(found["key"].to_pylist())}
        return vectors_of(found["vector"], self.writer.dim)[[place[key] for key in keys]]


class UserColumns:
    """The user's columns: a new one gets the type of its first value; a value that does not fit is left empty.

    Parameters
    ----------
    writer : of the collection
    """

    def __init__(self, writer: Writer):
        self.writer = writer
        self.types = dict(writer.columns())
        self.refused: dict[str, int] = {}

    def fit(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values under the names and types that the table has or will get."""
        fitted: dict[str, Any] = {}
        for key, value in values.items():
            if value is None:
                continue
            value = value.item() if isinstance(value, np.generic) else value
            name = column_name(key)
            kind = self.types.setdefault(name, _TYPES.get(type(value), pa.string()))
            try:
                fitted[name] = _convert(value, kind)
            except (ValueError, TypeError, OverflowError):
                self.refused[name] = self.refused.get(name, 0) + 1
        return fitted

    def widen(self) -> None:
        """Give the table the columns that were met since the last time."""
        there = self.writer.columns()
        new = [pa.field(name, kind) for name, kind in self.types.items() if name not in there]
        if new:
            self.writer.add_columns(new)

    def notes(self) -> list[str]:
        """A sentence per column in which values were left empty."""
        return [
            f"column {name!r} holds {self.types[name]}; {n} values of another type were left empty"
            for name, n in self.refused.items()
        ]


def column_name(name: str) -> str:
    """A user's column name as the table can hold it.

    >>> column_name("exif.width"), column_name("key")
    ('exif_width', 'key_')
    """
    plain = str(name).replace(".", "_").strip() or "column"
    return plain + "_" if plain in (*OWN, *INTERNAL) or plain.startswith("_row") else plain


def read_once(item: Item, limits: Any) -> Item:
    """The item, its digest computed by the thread that decodes it, and before it does.

    The order matters: should the file change in between, the recorded digest is the old one and the next run sees it.
    """
    return _Digesting(
        **{f.name: getattr(item, f.name) for f in dataclasses.fields(Item)}, most=getattr(limits, "max_bytes", None)
    )


@dataclasses.dataclass
class _Digesting(Item):
    most: int | None = None

    def source(self) -> Any:
        found = super().source()
        if "digest" not in self.__dict__:
            self.__dict__["digest"] = ""  # `digest` asks for the source itself
            too_large = self.most is not None and isinstance(found, (str, os.PathLike)) and _size(found) > self.most
            if not too_large:  # such a file is refused by its size; hashing it would take minutes
                self.__dict__["digest"] = Item(self.key, found).digest
        return found


def _size(path: Any) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def _convert(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_string(kind):
        return value if isinstance(value, str) else str(value)
    if pa.types.is_floating(kind) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if (
        pa.types.is_integer(kind)
        and isinstance(value, int)
        and not isinstance(value, bool)
        and -(1 << 63) <= value < 1 << 63
    ):
        return value
    if pa.types.is_boolean(kind) and isinstance(value, bool):
        return value
    raise ValueError(value)


def _equal(stored: Any, given: Any) -> bool:
    if given is None or stored is None:
        return (given is None) == (stored is None)
    return bool(stored == given) or (given != given and stored != stored)
