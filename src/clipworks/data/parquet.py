"""Parquet tables: images as bytes, as {"bytes", "path"} structs (the Hugging Face layout) or as paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ..errors import ClipworksError
from .item import Item, text_key
from .sources import Source, check_unique, existing, modified
from .tables import COLUMNS, Resolver, guess_columns, with_columns

ROWS_AT_ONCE = 64


class ParquetSource(Source):
    """A Parquet file with one image per row.

    The key is the key column, else the path (of a path column, or of the structs if every row has its own), else
    `<file name>#<row>`. Columns of plain values are kept; lists, structs and further bytes are not.

    Parameters
    ----------
    path : the file
    image_column, caption_column, label_column, key_column : column names, guessed from common ones; a column of
        bytes or {"bytes", "path"} structs is preferred as the image
    allow_outside : accept paths that leave the file's folder
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        label_column: str | None = None,
        key_column: str | None = None,
        allow_outside: bool = False,
    ):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = existing(path)
        super().__init__(str(self.path))
        self.resolve = Resolver(self.path.parent, allow_outside)
        try:
            with pq.ParquetFile(self.path) as file:
                schema, self.count = file.schema_arrow, file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ClipworksError(f"table {self.name!r} is not a readable Parquet file: {error}") from error
        embedded = [f.name for f in schema if is_embedded(f.type)]
        image = image_column or _embedded_column(embedded)
        given = {"image": image, "caption": caption_column, "label": label_column, "key": key_column}
        self.roles = guess_columns(schema.names, given, self.name)
        nested = {f.name for f in schema if is_embedded(f.type) or pa.types.is_nested(f.type)}
        self.columns = [n for n in schema.names if n in self.roles.values() or n not in nested]
        self.embedded = self.roles["image"] in embedded
        self.struct_keys = False
        self._check_keys(schema.field(self.roles["image"]).type)

    def _check_keys(self, image_type: Any) -> None:
        import pyarrow as pa

        places = (f"{self.path.name}#{n}" for n in range(self.count))
        if "key" in self.roles:
            values = zip(places, self._column(self.roles["key"]), strict=True)
            keys = (place if value in (None, "") else str(value) for place, value in values)
        elif not self.embedded:
            values = zip(places, self._column(self.roles["image"]), strict=True)
            keys = (self.resolve.item(str(value or ""), place).key for place, value in values)
        else:
            if pa.types.is_struct(image_type) and image_type.get_field_index("path") >= 0:
                paths = list(self._column(self.roles["image"], "path"))
                self.struct_keys = all(paths) and len(set(paths)) == len(paths)
            return
        check_unique(((key, f"row {n}") for n, key in enumerate(keys)), self.name)

    def _column(self, name: str, field: str | None = None) -> Iterator[Any]:
        """The values of one column, or of one field of a struct column, without reading the others."""
        for batch in self._batches([f"{name}.{field}" if field else name], 4096):
            for value in batch.column(0).to_pylist():
                yield value[field] if field and value is not None else value

    def _batches(self, columns: list[str], size: int) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                yield from file.iter_batches(batch_size=size, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise ClipworksError(f"table {self.name!r} is damaged: {error}") from error

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        row = 0
        for batch in self._batches(self.columns, ROWS_AT_ONCE):
            for fields in batch.to_pylist():
                yield self._item(fields, f"{self.path.name}#{row}")
                row += 1

    def _item(self, fields: dict[str, Any], place: str) -> Item:
        value = fields[self.roles["image"]]
        if self.embedded:
            item = embedded_item(value, place, self.resolve)
            if self.struct_keys:
                item.key = text_key(value["path"])
        else:
            item = self.resolve.item(str(value or ""), place)
        if item.error is None and not isinstance(item.image, bytes):
            item.mtime = modified(item.image)  # type: ignore[arg-type]
        return with_columns(item, fields, self.roles)


def is_embedded(kind: Any) -> bool:
    """Whether an Arrow type holds encoded images: bytes, or a struct with the field "bytes"."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _embedded_column(embedded: list[str]) -> str | None:
    """The one column to take images from: a common name, or the only candidate."""
    named = [name for name in COLUMNS["image"] if name in embedded]
    return named[0] if named else embedded[0] if len(embedded) == 1 else None


def embedded_item(value: Any, place: str, resolve: Resolver | None) -> Item:
    """The item of one cell: bytes, {"bytes", "path"}, or nothing; a path is followed only through `resolve`."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is not None:
        return Item(place, bytes(data))
    if not path:
        return Item(place, error="has neither bytes nor a path")
    if resolve is None:
        return Item(place, path)
    item = resolve.item(path, place)
    item.key = place
    return item
