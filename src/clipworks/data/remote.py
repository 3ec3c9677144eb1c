"""A folder in an object store: what fsspec can list and open, such as `s3://bucket/photos` (with `pip install s3fs`).

Opened only by kind="remote", so that no text of a table or a list ever makes anything go to the network. The listing
is read once; images are read one by one by whoever decodes them, which with `embed(..., engine="ray")` is another
machine. Credentials are those of the environment, as fsspec's file systems find them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import ClipworksError, check_choice, need
from .decode import DEFAULT_LIMITS, Limits
from .folder import IMAGE_SUFFIXES, MAX_SIDECAR, SIDECARS, FolderSource, hidden
from .item import Item, Remote, text_key

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")  # as the stores call it


class RemoteSource(FolderSource):
    """All images below an address, with the keys that the same folder would give on a disk.

    Parameters
    ----------
    address : protocol and path; of every protocol that fsspec knows but http, which has no folders
    captions, label_from : as for `FolderSource`; a caption beside an image costs a request of its own
    limits : a larger file is refused by its listed size, unread
    """

    def __init__(
        self, address: Any, *, captions: bool = True, label_from: str = "none", limits: Limits = DEFAULT_LIMITS
    ):
        text = os.fspath(address) if isinstance(address, (str, os.PathLike)) else repr(address)
        if not _ADDRESS.match(text) or text.startswith("http") or "::" in text:
            raise ClipworksError(
                f"source of kind 'remote' must be an address such as 's3://bucket/folder' (not http). Got {text!r}."
            )
        self.name, self.root, self.limits = text, Path(text), limits
        self.ignored = {}
        self.captions = captions
        self.label_from = check_choice("label_from", label_from, ("none", "folder"))
        try:
            self.system, place = need("fsspec", "scale").core.url_to_fs(text)
            found = self.system.find(place, detail=True)
        except Exception as error:  # every kind of store has errors of its own
            raise ClipworksError(f"source {text!r} cannot be listed: {error}") from error
        self.files = {os.path.relpath(path, place).replace(os.sep, "/"): (path, i) for path, i in found.items()}
        self.names, self.sidecars = self._scan()
        if not self.names:
            raise ClipworksError(f"no images at {text!r}. Images end in {', '.join(IMAGE_SUFFIXES)}.")

    def _scan(self) -> tuple[list[str], set[str]]:
        names: list[str] = []
        sidecars: set[str] = set()
        for name in self.files:
            if any(map(hidden, name.split("/"))):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                names.append(name)
            elif suffix in SIDECARS:
                sidecars.add(name)
            else:
                self.ignore(name)
        return sorted(names, key=text_key), sidecars

    def __iter__(self) -> Iterator[Item]:
        for name in self.names:
            key, (path, facts) = text_key(name), self.files[name]
            if (size := facts.get("size") or 0) > self.limits.max_bytes:
                most = f"{self.limits.max_bytes:,} (Limits.max_bytes)"
                yield Item(key, error=f"has {size:,} bytes; the limit is {most}")
                continue
            caption, columns = self._caption(name) if self.captions else (None, {})
            label = key.split("/")[0] if self.label_from == "folder" and "/" in key else None
            image = Remote(self.system.unstrip_protocol(path))
            yield Item(key, image, caption, label, columns, _modified(facts))

    def _sidecar(self, name: str) -> bytes | None:
        path, facts = self.files[name]
        return self.system.cat_file(path) if (facts.get("size") or 0) <= MAX_SIDECAR else None


def _modified(facts: dict[str, Any]) -> float | None:
    """The modification time among what a store tells of a file, in seconds since 1970."""
    value = next((facts[name] for name in _TIMES if facts.get(name)), None)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return None
    return value.timestamp() if isinstance(value, datetime) else value
