"""webdataset tar files: images with captions and labels beside them by stem. Nothing is unpacked, run or unpickled.

The headers are read first (names and places of the members), so that captions may stand anywhere in the file and
duplicates are found; the bytes of an image are read when its item is asked for. Links, devices, sparse members,
absolute names and `..` are refused one by one; members such as .pickle, .pyd or .pth are never opened.
"""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import ClipworksError, check_range
from .decode import DEFAULT_LIMITS, Limits
from .folder import IMAGE_SUFFIXES, MAX_SIDECAR, SIDECARS, read_json
from .item import Item, text_key
from .sources import Source, existing

MAX_HEADER = 1 << 20  # a longer name or extended header is no header but an attack


@dataclass(slots=True)
class _Member:
    """Where the bytes of one member lie; `error` instead, if it was refused."""

    name: str
    offset: int = 0
    size: int = 0
    mtime: float | None = None
    error: str | None = None


@dataclass
class _Index:
    images: list[_Member] = field(default_factory=list)
    sidecars: dict[str, _Member] = field(default_factory=dict)


class _Headers:
    """A file that refuses the oversized reads that a forged extended header asks for."""

    def __init__(self, stream: IO[bytes]):
        self.stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        return self.stream.read(count)


class TarSource(Source):
    """One or more plain tar files; keys are `<tar name>/<member name>`.

    Parameters
    ----------
    path : a tar file, a pattern such as "shards/*.tar", or a list of tar files
    max_members : most members in one file
    limits : what one image may cost
    """

    def __init__(self, path: Any, *, max_members: int = 1_000_000, limits: Limits = DEFAULT_LIMITS):
        self.paths = _paths(path)
        super().__init__(str(self.paths[0]) if len(self.paths) == 1 else f"{len(self.paths)} tar files")
        self.max_members = int(check_range("max_members", max_members, 1))
        self.limits = limits
        self._indexes: dict[Path, _Index] = {}
        names = [p.name for p in self.paths]
        for name in names:
            if names.count(name) > 1:
                both = ", ".join(str(p) for p in self.paths if p.name == name)
                raise ClipworksError(f"tar name {name!r} comes twice ({both}); keys would clash. Open them apart.")

    def __len__(self) -> int:
        return sum(len(self._index(path).images) for path in self.paths)

    def __iter__(self) -> Iterator[Item]:
        for path in self.paths:
            index = self._index(path)
            with path.open("rb") as stream:
                for member in index.images:
                    yield self._item(stream, path, member, index)

    def _item(self, stream: IO[bytes], path: Path, member: _Member, index: _Index) -> Item:
        key = f"{path.name}/{text_key(member.name)}" if member.name else path.name
        if member.error:
            return Item(key, error=member.error)
        stream.seek(member.offset)
        data = stream.read(member.size)
        if len(data) < member.size:
            return Item(key, error="is cut off: the archive ends inside it")
        item = Item(key, data, mtime=member.mtime)
        folder, _, file = member.name.rpartition("/")
        stems = (os.path.splitext(member.name)[0], f"{folder}/{file.split('.')[0]}" if folder else file.split(".")[0])
        for ending in (*SIDECARS, ".cls"):
            sidecar = next((index.sidecars[stem + ending] for stem in stems if stem + ending in index.sidecars), None)
            if sidecar is None:
                continue
            stream.seek(sidecar.offset)
            data = stream.read(sidecar.size)
            if ending == ".json":
                caption, label, item.columns = read_json(data)
                item.caption, item.label = item.caption or caption, item.label or label
            elif ending == ".cls":
                item.label = data.decode("utf-8", "replace").strip() or item.label
            else:
                item.caption = item.caption or data.decode("utf-8-sig", "replace").strip() or None
        return item

    def _index(self, path: Path) -> _Index:
        if path not in self._indexes:
            self._indexes[path] = self._scan(path)
        return self._indexes[path]

    def _scan(self, path: Path) -> _Index:
        index, seen, last = _Index(), {}, -1  # type: ignore[var-annotated]
        with path.open("rb") as stream:
            try:
                archive = tarfile.TarFile(fileobj=_Headers(stream), mode="r")  # type: ignore[arg-type]
            except (tarfile.TarError, OSError, ValueError) as error:
                raise ClipworksError(f"source {str(path)!r} is not a plain tar file: {error}.") from error
            try:
                for number, member in enumerate(iter(archive.next, None), 1):
                    archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all
                    if number > self.max_members:
                        most = f"{self.max_members:,} members (max_members)"
                        raise ClipworksError(f"tar file {str(path)!r} has more than {most}.")
                    if member.offset <= last or member.size < 0:
                        raise tarfile.ReadError("headers that point backwards")
                    last = member.offset
                    if member.isdir():
                        continue
                    name = member.name.removeprefix("./")
                    if name in seen:
                        both = f"numbers {seen[name]} and {number}"
                        raise ClipworksError(f"duplicate member {name!r} in {str(path)!r}: {both}.")
                    seen[name] = number
                    place = (member.offset_data, member.size, float(member.mtime))
                    self._file(index, _Member(name, *place, _refusal(member)))
                stream.seek(archive.offset)
                if stream.read(512).strip(b"\0"):  # tarfile takes a damaged header for the end of the archive
                    raise tarfile.ReadError("a damaged header")
            except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
                if isinstance(error, ClipworksError):
                    raise
                reason = f"the archive is damaged after member number {len(seen)}: {error}"
                index.images.append(_Member("", error=reason))
        return index

    def _file(self, index: _Index, member: _Member) -> None:
        suffix = os.path.splitext(member.name)[1].lower()
        file = member.name.rpartition("/")[2]
        if member.error:
            index.images.append(member)
        elif file.startswith("._") or "__MACOSX" in member.name.split("/"):
            self.ignore(member.name)
        elif suffix in IMAGE_SUFFIXES:
            if member.size > self.limits.max_bytes:
                member.error = f"has {member.size:,} bytes; the limit is {self.limits.max_bytes:,} (Limits.max_bytes)"
            index.images.append(member)
        elif suffix in (*SIDECARS, ".cls") and member.size <= MAX_SIDECAR:
            index.sidecars[member.name] = member
        else:
            self.ignore(member.name)


def _refusal(member: tarfile.TarInfo) -> str | None:
    """Why a member is not touched, or None for an ordinary file with an ordinary name."""
    if member.issym() or member.islnk():
        return "is a link; links in archives are never followed"
    if not member.isreg() or member.issparse():
        return "is not a regular file (a device, a pipe or a sparse file)"
    parts = member.name.replace("\\", "/").split("/")
    if parts[0] == "" or ":" in parts[0] or ".." in parts or "\0" in member.name:
        return "has an absolute path or '..' in its name"
    return None


def _paths(spec: Any) -> list[Path]:
    if isinstance(spec, (list, tuple)):
        if not spec:
            raise ClipworksError("source must hold at least one tar file. Got an empty list.")
        return [existing(path) for path in spec]
    text = os.fspath(spec)
    if "*" in text and not os.path.exists(text):
        found = sorted(glob.glob(text))
        if not found:
            raise ClipworksError(f"source {text!r} matches no file.")
        return [Path(path) for path in found]
    return [existing(text)]
