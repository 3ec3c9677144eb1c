"""Tables of images: a text file of paths, CSV and TSV. Paths are relative to the table and stay below its folder."""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ClipworksError, check_choice
from .decode import refuse_text
from .item import Item, text_key, valid_text
from .sources import Source, check_unique, existing, modified

# common column names, the first that is present wins
COLUMNS = {
    "image": (
        "path", "file", "filepath", "file_path", "filename", "file_name", "image_path", "image_file", "image",
        "img_path", "img", "jpg", "png", "bytes",
    ),
    "caption": ("caption", "text", "title", "description", "sentence", "prompt"),
    "label": ("label", "class", "class_name", "category", "target"),
    "key": ("key",),
}  # fmt: skip


class ListSource(Source):
    """A text file with one path per line; blank lines are skipped.

    Parameters
    ----------
    path : the text file
    allow_outside : accept absolute paths and `..` that leave its folder
    """

    def __init__(self, path: str | os.PathLike, *, allow_outside: bool = False):
        self.path = existing(path)
        super().__init__(str(self.path))
        self.resolve = Resolver(self.path.parent, allow_outside)
        self.count = check_unique(((item.key, f"line {n}") for n, item in self._rows()), self.name)

    def __len__(self) -> int:
        return self.count

    def _rows(self) -> Iterator[tuple[int, Item]]:
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, self.resolve.item(line.strip(), f"{self.path.name}#{number}")

    def __iter__(self) -> Iterator[Item]:
        for _, item in self._rows():
            item.mtime = modified(item.image) if item.error is None else None  # type: ignore[arg-type]
            yield item


class TableSource(Source):
    """A CSV or TSV file with a header.

    Parameters
    ----------
    path : the table; the delimiter is a tab for .tsv, else the commonest of , ; | and tab in the header
    image_column, caption_column, label_column, key_column : column names, guessed from common ones (`COLUMNS`);
        without a key column the key is the path
    allow_outside : accept absolute paths and `..` that leave the table's folder
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
        self.path = existing(path)
        super().__init__(str(self.path))
        self.resolve = Resolver(self.path.parent, allow_outside)
        with self.path.open("rb") as raw:
            if raw.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise ClipworksError(f"table {self.name!r} is UTF-16; save it as UTF-8.")
        with self._open() as stream:
            header = stream.readline()
            self.delimiter = "\t" if self.path.suffix.lower() == ".tsv" else max(",;|\t", key=header.count)
            self.header = next(csv.reader([header], delimiter=self.delimiter), [])
        given = {"image": image_column, "caption": caption_column, "label": label_column, "key": key_column}
        self.roles = guess_columns(self.header, given, self.name)
        keys = ((item.key, f"line {n}") for n, item in self._rows())
        self.count = check_unique(keys, self.name, "; a column of such keys is named with key_column=")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        for _, item in self._rows():
            item.mtime = modified(item.image) if item.error is None else None  # type: ignore[arg-type]
            yield item

    def _open(self):
        return self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")

    def _rows(self) -> Iterator[tuple[int, Item]]:
        with self._open() as stream:
            reader = csv.reader(stream, delimiter=self.delimiter, strict=True)
            try:
                next(reader, None)
                for row in reader:
                    if row:
                        yield reader.line_num, self._item(row, reader.line_num)
            except csv.Error as error:
                raise ClipworksError(f"table {self.name!r}, line {reader.line_num}: {error}.") from error

    def _item(self, row: list[str], number: int) -> Item:
        place = f"{self.path.name}#{number}"
        if len(row) != len(self.header):
            return Item(place, error=f"has {len(row)} fields where the header has {len(self.header)}")
        fields = dict(zip(self.header, (valid_text(value) for value in row), strict=True))
        item = self.resolve.item(row[self.header.index(self.roles["image"])], place)
        return with_columns(item, fields, self.roles)


class Resolver:
    """Turns a path written in a table into an item; refuses what leaves the folder unless that is allowed."""

    def __init__(self, folder: Path, allow_outside: bool):
        self.folder, self.allow_outside = folder, allow_outside
        self.root = os.path.realpath(folder)
        self.real_folder = functools.lru_cache(4096)(os.path.realpath)  # most rows share a few folders

    def item(self, text: str, place: str) -> Item:
        if not text:
            return Item(place, error="has an empty path")
        if refusal := refuse_text(text):
            return Item(text_key(text), error=refusal)
        key = text_key(os.path.normpath(text))
        path = os.path.normpath(os.path.join(self.folder, text))
        real = os.path.join(self.real_folder(os.path.dirname(path)), os.path.basename(path))
        if os.path.islink(real):
            real = os.path.realpath(real)
        if real == self.root or not real.startswith(self.root.rstrip(os.sep) + os.sep):
            if not self.allow_outside:
                outside = f"lies outside the folder {str(self.folder)!r}"
                return Item(key, error=f"{outside}; pass allow_outside=True if that is meant")
        elif os.path.isabs(text):
            key = text_key(os.path.relpath(real, self.root))
        return Item(key, Path(path))


def guess_columns(header: Sequence[str], given: dict[str, str | None], source: str) -> dict[str, str]:
    """Map the roles image, caption, label and key to column names: those given, else the first common name present."""
    for name in header:
        if list(header).count(name) > 1:
            raise ClipworksError(f"table {source!r} has the column {name!r} twice.")
    roles: dict[str, str] = {}
    lower = {name.strip().lower(): name for name in header}
    for role, wanted in given.items():
        if wanted is not None:
            roles[role] = check_choice(f"{role}_column", wanted, header)
        elif found := next((lower[name] for name in COLUMNS[role] if name in lower), None):
            roles[role] = found
    if "image" not in roles:
        present = ", ".join(map(repr, header)) or "no header"
        reason = f"has no column that looks like an image path; it has {present}"
        raise ClipworksError(f"table {source!r} {reason}. Name it with image_column=.")
    return roles


def with_columns(item: Item, fields: dict[str, Any], roles: dict[str, str]) -> Item:
    """Add caption, label, key and the remaining columns of a row to its item."""
    for role in ("caption", "label", "key"):
        value = fields.get(roles[role]) if role in roles else None
        if value is not None and value != "":
            setattr(item, role, str(value))
    item.columns = {name: value for name, value in fields.items() if name not in roles.values()}
    return item

