"""Where images come from: `open_source(spec)` looks at what it is given and returns an iterable of `Item`s.

A folder, a list of paths, a text file of paths, a CSV / TSV / Parquet table, webdataset tar files, a Hugging Face
dataset or a video. Every source has a stable order and unique keys, and yields refused entries as items with `error`
set, so that the caller's policy (raise, skip, report) decides, not the source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ClipworksError, check_choice, closest
from .decode import DEFAULT_LIMITS, Limits, refuse_text
from .item import Item, text_key

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
LIST_SUFFIXES = (".txt", ".lst", ".list")
TABLE_SUFFIXES = (".csv", ".tsv")
PARQUET_SUFFIXES = (".parquet", ".pq")

# kind -> the options of `open_source` that mean something to it
OPTIONS = {
    "folder": ("captions", "label_from"),
    "remote": ("captions", "label_from"),
    "paths": (),
    "list": ("allow_outside",),
    "table": ("image_column", "caption_column", "label_column", "key_column", "allow_outside"),
    "parquet": ("image_column", "caption_column", "label_column", "key_column", "allow_outside"),
    "webdataset": ("max_members",),
    "huggingface": ("image_column", "caption_column", "label_column", "key_column", "split"),
    "video": ("every",),
}


class Source(Iterable[Item]):
    """Base of all sources: iterate for items; `len` when the number is known, a `TypeError` otherwise.

    Attributes
    ----------
    name : what was opened, for messages
    ignored : file ending -> number of files that are no images or sidecars and were left out
    """

    name: str = ""

    def __init__(self, name: str):
        self.name = name
        self.ignored: dict[str, int] = {}

    def __iter__(self) -> Iterator[Item]:
        raise TypeError(f"{type(self).__name__} yields no items by itself")

    def ignore(self, name: str) -> None:
        ending = os.path.splitext(name)[1].lower() or "(no ending)"
        self.ignored[ending] = self.ignored.get(ending, 0) + 1


class PathSource(Source):
    """Images given as a list of paths (keys are the normalised paths) or of ready `Item`s."""

    def __init__(self, entries: Iterable[Any]):
        super().__init__("list of paths")
        self.items = [self._item(entry) for entry in entries]
        check_unique(((item.key, f"entry {i}") for i, item in enumerate(self.items, 1)), self.name)

    @staticmethod
    def _item(entry: Any) -> Item:
        if isinstance(entry, Item):
            return entry
        if not isinstance(entry, (str, os.PathLike)):
            raise ClipworksError(f"a list of images must hold paths or Items. Got {type(entry).__name__}.")
        text = os.fspath(entry)
        if refusal := refuse_text(text) if text else "is empty":
            return Item(text_key(text) or "(empty)", error=refusal)
        path = Path(os.path.normpath(text))
        return Item(text_key(path.as_posix()), path, mtime=modified(path))

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


def open_source(
    spec: Any,
    *,
    kind: str = "auto",
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    key_column: str | None = None,
    captions: bool = True,
    label_from: str = "none",
    allow_outside: bool = False,
    split: str = "train",
    every: float = 1.0,
    max_members: int = 1_000_000,
    limits: Limits = DEFAULT_LIMITS,
) -> Source:
    """Open anything that holds images.

    Parameters
    ----------
    spec : a folder, an image file, a list of paths, a text file with one path per line, a CSV / TSV / Parquet file,
        one or more webdataset tar files, a video file, a `datasets.Dataset`, a folder made by its `save_to_disk`, or
        "hf:org/name", or with kind="remote" an address such as "s3://bucket/photos" (these two use the network). An
        open `Source` is returned as it is.
    kind : "auto" or one of "folder", "remote", "paths", "list", "table", "parquet", "webdataset", "huggingface",
        "video"
    image_column, caption_column, label_column, key_column : column names of a table; guessed from common names
    captions : folder and remote: read the caption beside each image (same stem; .txt, .caption, or .json with
        "caption")
    label_from : folder and remote: "none", or "folder" to take the name of the first folder as the label
    allow_outside : tables and lists: accept paths that leave the folder of the table
    split : Hugging Face: which split
    every : video: seconds between frames
    max_members : webdataset: most members in one tar file
    limits : what one image may cost

    Returns
    -------
    Source: iterable of `Item`

    Raises
    ------
    ClipworksError
        If nothing is there, the kind cannot be told, an option does not apply, or two items have the same key.

    Examples
    --------
    >>> [item.key for item in open_source(["cats/1.jpg", "./dogs//1.jpg"])]
    ['cats/1.jpg', 'dogs/1.jpg']
    """
    if isinstance(spec, Source):
        return spec
    kind = check_choice("kind", kind, ("auto", *OPTIONS))
    kind = _kind(spec) if kind == "auto" else kind
    defaults = {
        "captions": True, "label_from": "none", "allow_outside": False, "split": "train", "every": 1.0,
        "max_members": 1_000_000,
    }  # fmt: skip
    given = {
        "image_column": image_column, "caption_column": caption_column, "label_column": label_column,
        "key_column": key_column, "captions": captions, "label_from": label_from, "allow_outside": allow_outside,
        "split": split, "every": every, "max_members": max_members,
    }  # fmt: skip
    taken = {name: value for name, value in given.items() if name in OPTIONS[kind]}
    for name, value in given.items():
        if name not in taken and value != defaults.get(name):
            uses = ", ".join(OPTIONS[kind]) or "no options"
            raise ClipworksError(f"{name} does not apply to a {kind} source ({shown(spec)}), which takes: {uses}.")
    return _open(kind, spec, taken, limits)


def _open(kind: str, spec: Any, options: dict[str, Any], limits: Limits) -> Source:
    if kind == "paths":
        return PathSource([spec] if isinstance(spec, (str, os.PathLike)) else spec)
    if kind == "folder":
        from .folder import FolderSource

        return FolderSource(spec, **options)
    if kind == "remote":
        from .remote import RemoteSource

        return RemoteSource(spec, limits=limits, **options)
    if kind in ("list", "table"):
        from .tables import ListSource, TableSource

        return ListSource(spec, **options) if kind == "list" else TableSource(spec, **options)
    if kind == "parquet":
        from .parquet import ParquetSource

        return ParquetSource(spec, **options)
    if kind == "webdataset":
        from .webdataset import TarSource

        return TarSource(spec, limits=limits, **options)
    if kind == "huggingface":
        from .huggingface import HuggingFaceSource

        return HuggingFaceSource(spec, **options)
    from .video import VideoSource

    return VideoSource(spec, limits=limits, **options)


def _kind(spec: Any) -> str:
    """Tell the kind of a source from what it is and, for files, from the ending."""
    if isinstance(spec, (list, tuple)):
        endings = {Path(entry).suffix.lower() for entry in spec if isinstance(entry, (str, os.PathLike))}
        return "webdataset" if endings == {".tar"} else "paths"
    if type(spec).__module__.split(".")[0] == "datasets":
        return "huggingface"
    if not isinstance(spec, (str, os.PathLike)):
        raise ClipworksError(f"source must be a path, a list of paths or a dataset. Got {type(spec).__name__}.")
    text = os.fspath(spec)
    if text.startswith("hf:"):
        return "huggingface"
    if refusal := refuse_text(text):
        raise ClipworksError(f"source {text!r} {refusal}.")
    path = Path(text)
    if path.is_dir():
        saved = (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
        return "huggingface" if saved or (path / "dataset_dict.json").is_file() else "folder"
    suffix = path.suffix.lower()
    if not path.exists() and not (suffix == ".tar" and "*" in path.name):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ClipworksError(f"source not found: {text!r}.{closest(path.name, siblings)}")
    from .folder import IMAGE_SUFFIXES

    known = {
        "list": LIST_SUFFIXES, "table": TABLE_SUFFIXES, "parquet": PARQUET_SUFFIXES, "webdataset": (".tar",),
        "video": VIDEO_SUFFIXES, "paths": IMAGE_SUFFIXES,
    }  # fmt: skip
    for kind, suffixes in known.items():
        if suffix in suffixes:
            return kind
    if path.name.lower().endswith((".zip", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")):
        raise ClipworksError(f"source {text!r} is a compressed archive; unpack it to a folder or a plain .tar first.")
    listed = ", ".join(ending for suffixes in known.values() for ending in suffixes)
    raise ClipworksError(
        f"source {text!r} has an unknown ending. Known are a folder and {listed}; or name the kind with kind=."
    )


def check_unique(keys: Iterable[tuple[str, str]], source: str, hint: str = "") -> int:
    """Count the keys, or raise with both places (`where`) of the first key that comes twice."""
    seen: dict[str, str] = {}
    for key, where in keys:
        if key in seen:
            both = f"{seen[key]} and {where}"
            raise ClipworksError(f"duplicate key {key!r} in {source}: {both}. Every image needs its own key{hint}.")
        seen[key] = where
    return len(seen)


def modified(path: str | os.PathLike) -> float | None:
    """Modification time in seconds, or None if there is no such file."""
    try:
        return os.stat(path).st_mtime
    except (OSError, ValueError):
        return None


def existing(spec: Any) -> Path:
    """`spec` as the path of a file that is there."""
    path = Path(spec)
    if not path.is_file():
        raise ClipworksError(f"source not found: {os.fspath(spec)!r} is not a file.")
    return path


def shown(spec: Any) -> str:
    """A source in a message: its path, or its type."""
    return os.fspath(spec) if isinstance(spec, (str, os.PathLike)) else type(spec).__name__
