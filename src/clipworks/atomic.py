"""Files that are there in full or not at all, whatever stops the process or the power."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a new file beside `path`, bring it to the disk, and put it in place in one move.

    Several processes may write the same file: each fills one of its own, and the last to be done stays. Where `write`
    fails, what was there before is untouched and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)
    return path


def write_json(path: Path, value: Any, ensure_ascii: bool = True) -> Path:
    """Write JSON, one space deep."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=ensure_ascii) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write text in UTF-8."""
    return write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder on Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
