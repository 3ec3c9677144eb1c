"""Labelled sets in the usual layouts, told by looking: CoOp's split json, folders per class, tables, Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ClipworksError
from .item import Item
from .labelled import LabelledSet, Row, file_item, in_words, part_of
from .sources import PARQUET_SUFFIXES, TABLE_SUFFIXES, open_source

EXPECTED = (
    "Expected one of: split_zhou_*.json (CoOp) beside a folder of images; train/ and test/ (and val/) with a folder "
    "per class; a folder per class; a CSV, TSV or Parquet table with a column of images and one of labels (and perhaps "
    "'split'); a Hugging Face folder (data/train-00000-of-00001.parquet, or one made by save_to_disk)"
)


def read_any(name: str, place: Path) -> LabelledSet:
    """Read a folder or a table in whatever layout it has.

    Parameters
    ----------
    name : what to call the set
    place : the folder or file

    Raises
    ------
    ClipworksError
        If it is none of the known layouts; the message lists them.
    """
    from .sets import Absent
    from .sets._read import found, read_coop

    try:
        if place.is_file():
            return _table(name, place)
        split = found(place, "split_zhou_*.json")
        if split is not None:
            return read_coop(name, split, _images_of(place, split))
        parquet = sorted([*place.glob("*.parquet"), *place.glob("data/*.parquet")])
        if parquet:
            return _parquet(name, parquet)
        if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
            return _saved(name, place)
        tables = [path for path in sorted(place.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES]
        folders = [path for path in sorted(place.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        if len(tables) == 1:
            return _table(name, tables[0])
        return _folders(name, place, folders)
    except Absent as absent:
        raise ClipworksError(f"data {name}={place}: {absent}. {EXPECTED}.") from None


def _folders(name: str, place: Path, folders: list[Path]) -> LabelledSet:
    """Folders per class, below folders of parts where there are any."""
    from .sets import Absent
    from .sets._read import class_folders

    parts = {path: part_of(path.name) for path in folders if part_of(path.name)}
    roots: dict[Path, str | None] = dict(parts) if parts else {place: None}
    rows = [Row(file_item(place, path), in_words(label), part) for root, part in roots.items()
            for label, path in class_folders(root)]  # fmt: skip
    if not rows:
        raise Absent("there are no folders with images")
    return LabelledSet.of(name, rows)


def _images_of(place: Path, split: Path) -> Path:
    """The folder that the split's paths are relative to: the one where the first is found."""
    from .sets import Absent

    try:
        triples = next(iter(json.loads(split.read_text(encoding="utf-8")).values()))
        first = str(triples[0][0])
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
        raise Absent(f"{split.name} is not a split file of CoOp") from None
    candidates = [place, *sorted(path for path in place.iterdir() if path.is_dir())]
    for folder in candidates:
        if (folder / first).is_file():
            return folder
    raise Absent(f"{split.name} names {first}, which is in none of {', '.join(str(c) for c in candidates[:5])}")


def _table(name: str, path: Path) -> LabelledSet:
    if path.suffix.lower() in PARQUET_SUFFIXES:
        return _parquet(name, [path])
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise ClipworksError(f"data {name}={path}: a file must be a table. {EXPECTED}.")
    return LabelledSet.of(name, _labelled(name, open_source(path)))


def _parquet(name: str, paths: list[Path]) -> LabelledSet:
    """Parquet files; the part is the first word of a file's name, class names are in Hugging Face's metadata."""
    import pyarrow.parquet as pq

    rows, classes = [], None
    for path in paths:
        source = open_source(path)
        column = source.roles.get("label")  # type: ignore[attr-defined]
        names = _class_names(pq.read_schema(path).metadata, column)
        classes = names or classes
        part = part_of(path.stem.split("-")[0]) if len(paths) > 1 else None
        for row in _labelled(name, source):
            row.label = names[int(row.label)] if names else row.label
            row.part = row.part or part
            row.item.key = f"{path.name}:{row.item.key}"  # two files may use the same names inside
            rows.append(row)
    words = None if classes is None else [in_words(c) for c in classes]
    return LabelledSet.of(name, (_in_words(row) for row in rows), words)


def _class_names(metadata: dict[bytes, bytes] | None, column: str | None) -> list[str] | None:
    """Names of the class numbers, as the `datasets` library writes them into the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(n) for n in features[column]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _saved(name: str, place: Path) -> LabelledSet:
    """A folder made by save_to_disk; needs the `datasets` library."""
    rows = []
    splits = ["train"]
    if (place / "dataset_dict.json").is_file():
        splits = json.loads((place / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    for split in splits:
        source = open_source(place, kind="huggingface", split=split)
        for row in _labelled(name, source):
            row.part = part_of(split) if len(splits) > 1 else row.part
            rows.append(row)
    return LabelledSet.of(name, rows)


def _labelled(name: str, source: Iterable[Item]) -> Iterator[Row]:
    """Rows of a table: its label column, and the part where a column "split" says it."""
    for item in source:
        if item.label is None:
            raise ClipworksError(f"data {name}: image {item.key!r} has no label. A table needs one in every row, in a "
                                 "column such as 'label' or 'class'.")  # fmt: skip
        columns: dict[str, Any] = {key.lower(): value for key, value in item.columns.items()}
        part = next((part_of(str(columns[key])) for key in ("split", "part", "subset") if key in columns), None)
        yield Row(item, in_words(item.label), part)


def _in_words(row: Row) -> Row:
    row.label = in_words(row.label)
    return row
