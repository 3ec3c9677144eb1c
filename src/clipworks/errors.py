"""Errors a user can cause. Every message names the argument, what is allowed, what was given, the closest match.

All derive from `ClipworksError`, which is a `ValueError`, so `except ValueError` keeps working. The command line
prints them in one line without a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class ClipworksError(ValueError):
    """Base of every error that a user's input can cause."""


class UnknownName(ClipworksError):
    """A name that is not among the allowed ones; the message offers the closest match."""


class BadImage(ClipworksError):
    """An image that cannot be used. `key` names it, `reason` says why; pickles across processes."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"image {self.key!r}: {self.reason}"


class BadWeights(ClipworksError):
    """A weights file that cannot be read safely or whose layout is unknown."""


class CollectionError(ClipworksError):
    """A collection that is damaged, locked by another writer or made by another encoder."""


class MissingExtra(ClipworksError, ImportError):
    """An optional library is not installed; the message carries the command that installs it."""


def closest(given: str, allowed: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest allowed name, or an empty string."""
    match = difflib.get_close_matches(str(given), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def check_choice(argument: str, given: Any, allowed: Iterable[Any]) -> Any:
    """Return `given` if it is one of `allowed`, else raise `UnknownName` naming argument, choices and closest match.

    >>> check_choice("metric", "cosine", ["cosine", "dot"])
    'cosine'
    """
    allowed = list(allowed)
    if given in allowed:
        return given
    shown = ", ".join(repr(a) for a in allowed[:20]) + (" ..." if len(allowed) > 20 else "")
    raise UnknownName(f"{argument} must be one of {shown}. Got {given!r}.{closest(given, allowed)}")


def check_range(argument: str, given: float, low: float | None = None, high: float | None = None) -> float:
    """Return `given` if it lies in [low, high] (either end may be None), else raise naming the bounds."""
    if (low is not None and not given >= low) or (high is not None and not given <= high):
        bounds = f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
        raise ClipworksError(f"{argument} must lie in {bounds}. Got {given!r}.")
    return given


@contextlib.contextmanager
def naming(argument: str) -> Iterator[None]:
    """Put an argument's name before the errors of what reads it; those of a single image already say which.

    >>> with naming("shots"):
    ...     raise ClipworksError("source not found: 'labeled'.")
    Traceback (most recent call last):
    clipworks.errors.ClipworksError: shots: source not found: 'labeled'.
    """
    try:
        yield
    except BadImage:
        raise
    except ClipworksError as error:
        raise type(error)(f"{argument}: {error}") from error


def check_folder(argument: str, given: str | os.PathLike) -> Path:
    """Return a folder to write to, made if it is missing, or raise before any work is done for it."""
    path = Path(given)
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(path, os.W_OK) else "permission denied"
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror
    if reason:
        raise ClipworksError(f"{argument} must be a folder that can be written to. Got {str(path)!r}: {reason}.")
    return path


def need(module: str, extra: str) -> Any:
    """Import an optional library or raise `MissingExtra` with the command that installs it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"this needs the library {module!r}, which is not installed. "
            f"Install it with: pip install 'clipworks[{extra}]'"
        ) from error
