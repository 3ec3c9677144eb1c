"""A folder of images: recursive, keys are relative paths, captions beside the images by stem in the same folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ClipworksError, check_choice
from .item import Item, text_key
from .regions import COLUMN
from .sources import Source, modified

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
)  # fmt: skip
SIDECARS = (".txt", ".caption", ".json")  # in order of preference
MAX_SIDECAR = 1 << 20


class FolderSource(Source):
    """All images below a folder, sorted by key.

    Hidden files and folders (a leading dot, `__MACOSX`) are left out. A link to a file is followed, a link to a
    folder is not. Files with other endings are counted in `ignored`.

    Parameters
    ----------
    path : the folder
    captions : read `<stem>.txt`, `<stem>.caption` or `<stem>.json` (its "caption") in the image's own folder
    label_from : "none", or "folder": the first folder of the key is the label
    """

    def __init__(self, path: str | os.PathLike, *, captions: bool = True, label_from: str = "none"):
        self.root = Path(path)
        if not self.root.is_dir():
            raise ClipworksError(f"source not found: {os.fspath(path)!r} is not a folder.")
        super().__init__(str(self.root))
        self.captions = captions
        self.label_from = check_choice("label_from", label_from, ("none", "folder"))
        self.names, self.sidecars = self._scan()
        if not self.names:
            found = ", ".join(f"{count} x {ending}" for ending, count in sorted(self.ignored.items())) or "nothing"
            endings = ", ".join(IMAGE_SUFFIXES)
            raise ClipworksError(f"no images in folder {self.name!r}; found: {found}. Images end in {endings}.")

    def _scan(self) -> tuple[list[str], set[str]]:
        names: list[str] = []
        sidecars: set[str] = set()
        for folder, folders, files in os.walk(self.root, onerror=_unreadable):
            folders[:] = [f for f in folders if not hidden(f)]
            for file in files:
                if hidden(file):
                    continue
                name = os.path.relpath(os.path.join(folder, file), self.root)
                suffix = os.path.splitext(file)[1].lower()
                if suffix in IMAGE_SUFFIXES:
                    names.append(name)
                elif suffix in SIDECARS:
                    sidecars.add(name)
                else:
                    self.ignore(file)
        return sorted(names, key=text_key), sidecars

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Item]:
        for name in self.names:
            key, path = text_key(name), self.root / name
            caption, columns = self._caption(name) if self.captions else (None, {})
            label = key.split("/")[0] if self.label_from == "folder" and "/" in key else None
            yield Item(key, path, caption, label, columns, modified(path))

    def _sidecar(self, name: str) -> bytes | None:
        return _read(self.root / name)

    def _caption(self, name: str) -> tuple[str | None, dict[str, Any]]:
        stem = os.path.splitext(name)[0]
        for ending in SIDECARS:
            if stem + ending in self.sidecars:
                data = self._sidecar(stem + ending)
                if data is None:
                    continue
                if ending != ".json":
                    return data.decode("utf-8-sig", "replace").strip() or None, {}
                caption, _, columns = read_json(data)
                if caption is not None:
                    return caption, columns
        return None, {}


def read_json(data: bytes) -> tuple[str | None, str | None, dict[str, Any]]:
    """Caption, label, other plain values and regions of a JSON sidecar; nothing if it is not a JSON object."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None, None, {}
    if not isinstance(fields, dict):
        return None, None, {}
    plain = {k: v for k, v in fields.items() if isinstance(v, (str, int, float, bool))}
    if isinstance(fields.get(COLUMN), list):  # boxes with words, as the text that every table can hold
        plain[COLUMN] = json.dumps(fields[COLUMN])
    columns = {k: v for k, v in plain.items() if k not in ("caption", "label")}
    caption, label = fields.get("caption"), fields.get("label")
    return caption if isinstance(caption, str) else None, None if label is None else str(label), columns


def _read(path: Path) -> bytes | None:
    try:
        if not path.is_file() or path.stat().st_size > MAX_SIDECAR:
            return None
        return path.read_bytes()
    except OSError:
        return None


def hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _unreadable(error: OSError) -> None:
    raise ClipworksError(f"folder {error.filename!r} cannot be read: {error.strerror}.") from error
