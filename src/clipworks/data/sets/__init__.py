"""Published labelled sets, one file each: its name is the set's name, its docstring says the layout and the source,
its `read(folder)` reads it. Nothing else lists them: adding a set is adding a file.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ClipworksError

if TYPE_CHECKING:
    from ..labelled import LabelledSet


class Absent(Exception):
    """What a reader did not find in the folder it was given."""


def set_names() -> list[str]:
    """Names of all known sets."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def known_set(name: str) -> str | None:
    """The known set that a name means, whatever its case and underscores: "OxfordPets" is "oxford_pets"."""
    return {_plain(known): known for known in set_names()}.get(_plain(name))


def describe(name: str) -> str:
    """Layout and source of a set, from its file."""
    return inspect.getdoc(importlib.import_module(f"{__name__}.{name}")) or ""


def read_set(name: str, folder: Path) -> LabelledSet:
    """Read a known set from its folder; what is missing becomes an error that tells the layout."""
    try:
        return importlib.import_module(f"{__name__}.{name}").read(folder)
    except Absent as absent:
        raise ClipworksError(f"data {name}={folder}: {absent}. {describe(name)}") from None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
