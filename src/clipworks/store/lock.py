"""One writer at a time: a lock the operating system gives back when its owner dies, with the owner's name inside."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from ..errors import CollectionError

NAME = "writer.lock"


class WriterLock:
    """Hold `<collection>/writer.lock`; a second writer is refused at once and told who holds it.

    The lock belongs to the open file, not to its existence: a killed writer leaves nothing to clean up.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._file: IO[bytes] | None = None

    def __enter__(self) -> WriterLock:
        try:
            stream = open(self.path, "a+b")  # kept open as long as the lock is held
        except OSError as error:
            place = str(self.path.parent)
            raise CollectionError(f"collection {place!r} cannot be written: {error.strerror}.") from error
        while not self._taken(stream):
            if who := owner(self.path.parent):  # else it was given back before its owner could be named
                stream.close()
                raise CollectionError(
                    f"collection {str(self.path.parent)!r} is being written by {who}. "
                    "Wait until it is done, or stop it; what it has written so far is kept."
                )
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, only the name is missing
            stream.seek(0)
            stream.truncate()
            stream.write(json.dumps(_myself()).encode())
            stream.flush()
        self._file = stream
        return self

    @staticmethod
    def _taken(stream: IO[bytes]) -> bool:
        for wait in (0.0, 0.02, 0.1):  # somebody may only be asking who holds it
            time.sleep(wait)
            if take(stream):
                return True
        return False

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def owner(folder: Path) -> str | None:
    """Who holds the lock of a collection, in words; None if nobody does."""
    path = folder / NAME
    for wait in (0.0, 0.01, 0.05, 0.2):  # the owner may be about to write its name
        time.sleep(wait)
        try:
            with open(path, "rb") as stream:
                if take(stream, shared=True):
                    return None
                who = json.loads(stream.read())
            return f"process {who['pid']} on {who['host']} since {who['since']}"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return "another process"


def _myself() -> dict[str, object]:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def take(stream: IO[bytes], shared: bool = False) -> bool:
    """Try to lock an open file, until it is closed; False if another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows: one byte far behind the text, so that the owner's name stays readable
        import msvcrt

        try:
            stream.seek(1 << 30)
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            if shared:
                stream.seek(1 << 30)
                msvcrt.locking(stream.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
            return True
        except OSError:
            return False
        finally:
            stream.seek(0)
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
