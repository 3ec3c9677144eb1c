"""Folders that are derived from a collection: made beside their place, sealed with checksums, put there in one step.

A reader sees such a folder in full or not at all. What a maker that was killed has left behind is removed by the next
one; the folder of a maker that lives is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .journal import sha256, sync
from .lock import take

FACTS, MAKING, MAKER = "facts.json", ".making-", "maker.lock"


def make(place: Path, target: Path, write: Callable[[Path], bool]) -> bool:
    """Let `write` fill a new folder inside `place` and put it at `target`; False if it says that it did not."""
    folder = Path(tempfile.mkdtemp(prefix=MAKING, dir=place))
    try:
        with open(folder / MAKER, "wb") as stream:  # shows the others that this folder's maker lives
            take(stream)
            if not write(folder):
                return False
        if target.exists():
            shutil.rmtree(target, ignore_errors=True)  # it was not whole, or another maker was faster
        with contextlib.suppress(OSError):  # another maker was faster
            os.rename(folder, target)
        (target / MAKER).unlink(missing_ok=True)
        sync(place)
        return True
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear(folders: Iterable[Path]) -> None:
    """Remove folders, apart from those in which something is being made now."""
    for folder in folders:
        if not in_work(folder):
            shutil.rmtree(folder, ignore_errors=True)


def in_work(folder: Path) -> bool:
    """Whether something is being made there now; a maker that was killed has left its folder behind."""
    if not folder.name.startswith(MAKING):
        return False
    try:
        with open(folder / MAKER, "r+b") as stream:
            return not take(stream)
    except OSError:
        return True  # just begun


def seal(folder: Path, names: Iterable[str], **facts: Any) -> None:
    """Bring files to the disk and record their checksums, last of all, with further facts."""
    names = list(names)
    facts = {"files": {name: ((folder / name).stat().st_size, sha256(folder / name)) for name in names}, **facts}
    text = json.dumps(facts)
    (folder / FACTS).write_text(f"{text}\n{_digest(text)}\n", encoding="utf-8")
    paths = [folder / name for name in (*names, FACTS)]
    for path in (*paths, *{path.parent for path in paths}):
        sync(path)


def read_facts(folder: Path) -> dict[str, Any]:
    """What is recorded of a folder whose files have the right sizes.

    Raises
    ------
    OSError, ValueError
        If something is missing, the record does not match its own checksum, in the line below it, or has another form.
    """
    facts = _facts(folder)
    for name, (size, _) in facts["files"].items():
        actual = (folder / name).stat().st_size
        if actual != size:
            raise ValueError(f"{name} has {actual} bytes instead of {size}")
    return facts


def damage(folder: Path) -> dict[str, str]:
    """Files of a folder that do not match their checksums, with the reason; the folder itself if it tells nothing."""
    try:
        files = _facts(folder)["files"]
    except (OSError, ValueError, RecursionError) as error:
        return {folder.name: f"cannot be read ({error})"}
    found: dict[str, str] = {}
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            found[f"{folder.name}/{name}"] = "is missing"
        elif path.stat().st_size != size or sha256(path) != digest:
            found[f"{folder.name}/{name}"] = "does not match its checksum"
    return found


def _facts(folder: Path) -> dict[str, Any]:
    text, _, digest = (folder / FACTS).read_text(encoding="utf-8").partition("\n")
    if digest.strip() != _digest(text):
        raise ValueError("its record does not match its own checksum")
    facts = json.loads(text)
    files = facts.get("files") if isinstance(facts, dict) else None
    if not isinstance(files, dict) or not all(_plain(name) and _told(told) for name, told in files.items()):
        raise ValueError("its record has another form")
    return facts


def _plain(name: str) -> bool:
    """Whether a name stays inside its folder."""
    return bool(name) and not name.startswith("/") and ".." not in Path(name).parts and "\0" not in name


def _told(told: Any) -> bool:
    return isinstance(told, list) and len(told) == 2 and type(told[0]) is int and isinstance(told[1], str)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
