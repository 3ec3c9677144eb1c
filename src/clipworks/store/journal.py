"""The checksums of a collection's files: one line per file, each line with its own check, only ever appended to.

A line cut off by a crash is dropped by the next writer. A file that is in no line was written by a writer that died
before it could say so; the next writer checks its rows one by one and then adds it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CollectionError

NAME = "checksums.txt"
TABLE = "items.lance"
HINTS = ("latest_version_hint.json",)  # rewritten in place and never needed
MANIFEST = re.compile(r"[0-9]{20}\.manifest")
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass
class Journal:
    """What `checksums.txt` says.

    Attributes
    ----------
    files : path below the collection -> (bytes, SHA-256)
    torn : whether the last line is incomplete
    cleaning : a writer began to remove old versions and has not said that it finished; files may be missing by right
    broken : numbers of lines, counted from 1, that do not match their own check
    """

    folder: Path
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    torn: bool = False
    cleaning: bool = False
    broken: list[int] = field(default_factory=list)
    length: int = 0

    @classmethod
    def read(cls, folder: Path) -> Journal:
        journal = cls(folder)
        path = folder / NAME
        if not path.exists():
            return journal
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CollectionError(
                f"{str(path)!r} cannot be read ({error.strerror}). Make it readable, or remove it: "
                f"`clipworks verify {folder} --repair` then checks every row and writes it anew."
            ) from error
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                journal.torn = True
                break
            journal.length += len(line)
            entry = _parse(line)
            if entry is None:
                journal.broken.append(number)
            elif "cleaning" in entry:
                journal.cleaning = entry["cleaning"]
            elif "sha256" in entry:
                journal.files[entry["file"]] = (entry["bytes"], entry["sha256"])
            else:
                journal.files.pop(entry["file"], None)
        return journal

    def append(self, added: Iterable[str], removed: Iterable[str]) -> None:
        """Hash and record new files, after bringing them to the disk; forget removed ones."""
        entries: list[dict] = [{"file": name, "removed": True} for name in removed]
        folders = set()
        for name in added:
            path = self.folder / name
            sync(path)
            folders.add(path.parent)
            entries.append({"file": name, "bytes": path.stat().st_size, "sha256": sha256(path)})
        for folder in folders:
            sync(folder)
        self._write(entries)
        for entry in entries:
            if "sha256" in entry:
                self.files[entry["file"]] = (entry["bytes"], entry["sha256"])
            else:
                self.files.pop(entry["file"], None)

    def mark_cleaning(self, begun: bool) -> None:
        """Say that old versions are about to be removed, or that this is done."""
        self._write([{"cleaning": begun}])
        self.cleaning = begun

    def _write(self, entries: list[dict]) -> None:
        if not entries:
            return
        text = b"".join(map(_line, entries))
        with open(self.folder / NAME, "r+b" if (self.folder / NAME).exists() else "w+b") as stream:
            stream.seek(self.length)
            stream.truncate()
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        self.length += len(text)
        self.torn = False

    def rewrite(self) -> None:
        """Write the present files only, in one atomic step."""
        entries = [{"file": f, "bytes": n, "sha256": h} for f, (n, h) in sorted(self.files.items())]
        text = b"".join(map(_line, entries))
        replace(self.folder / NAME, text)
        self.length, self.broken, self.torn, self.cleaning = len(text), [], False, False

    def missing(self) -> dict[str, str]:
        """Files that are gone or have another size, with the reason; cheap enough for every opening."""
        found: dict[str, str] = {}
        for name, (size, _) in self.files.items():
            try:
                actual = (self.folder / name).stat().st_size
            except OSError:
                found[name] = "is missing"
                continue
            if actual != size:
                found[name] = f"has {actual} bytes instead of {size}"
        return found

    def changed(self, names: Iterable[str]) -> dict[str, str]:
        """Which of some files do not match their checksums, with the reason; reads all of them."""
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a writer may be removing old versions
                if name in self.files and sha256(self.folder / name) != self.files[name][1]:
                    found[name] = "does not match its checksum"
        return found

    def behind(self, version: str) -> list[str]:
        """Recorded files that one version may be read from: all but the manifests and transactions of others."""
        past = (f"{TABLE}/_versions/", f"{TABLE}/_transactions/")
        return [name for name in self.files if name == past[0] + version or not name.startswith(past)]

    def unrecorded(self) -> list[str]:
        """Files of the table that no line tells of."""
        return sorted(set(table_files(self.folder)) - set(self.files))

    def gone(self) -> list[str]:
        """Recorded files that are no longer there."""
        return sorted(set(self.files) - set(table_files(self.folder)))


def table_files(folder: Path) -> list[str]:
    """All files of the table that matter, as paths below the collection."""
    found = []
    for place, folders, files in os.walk(folder / TABLE):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            if file not in HINTS and not file.startswith("."):
                found.append(os.path.relpath(os.path.join(place, file), folder).replace(os.sep, "/"))
    return found


def newest_manifest(folder: Path) -> str | None:
    """File name of the table's newest version, found without opening the table; None if there is no table."""
    try:
        names = [n for n in os.listdir(folder / TABLE / "_versions") if MANIFEST.fullmatch(n)]
    except OSError:
        return None
    # names count down from 2^64 - 1, so the newest sorts first
    return min(names, default=None)


def sha256(path: Path) -> str:
    state = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def sync(path: Path) -> None:
    """Bring a file or a folder to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except (OSError, PermissionError):  # a folder on Windows
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # where there is nothing to bring to a disk
            raise
    finally:
        os.close(handle)


def replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there either in full or as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def _line(entry: dict) -> bytes:
    text = json.dumps(entry, sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict | None:
    check, _, text = line.rstrip(b"\n").partition(b" ")
    try:
        if int(check, 16) != zlib.crc32(text):
            return None
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return entry if _sound(entry) else None


def _sound(entry: object) -> bool:
    """Whether an entry has the form of one that `Journal` wrote, and speaks of the table only."""
    if not isinstance(entry, dict):
        return False
    if "cleaning" in entry:
        return isinstance(entry["cleaning"], bool)
    name = entry.get("file")
    if not isinstance(name, str) or not name.startswith(f"{TABLE}/") or ".." in name.split("/") or "\0" in name:
        return False
    if "sha256" not in entry:
        return entry.get("removed") is True
    size, digest = entry.get("bytes"), entry["sha256"]
    return type(size) is int and size >= 0 and isinstance(digest, str) and bool(DIGEST.fullmatch(digest))
