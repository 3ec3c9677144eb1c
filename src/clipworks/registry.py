"""The registry is the file system: one method, one file, one object marked `@method(...)`.

`methods()` reads the decorators from the source with `ast`, so listing costs milliseconds and imports neither torch
nor the methods; `get_method` imports the one file that is asked for.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import ClipworksError, check_choice, closest

AREAS = (
    "encoders", "zeroshot", "heads", "prompts", "tuning", "losses", "training", "pretraining", "segment", "anomaly",
    "ood", "retrieval", "caption", "edit", "video", "beyond", "connectors", "analysis", "metrics",
)  # fmt: skip
PACKAGE = Path(__file__).parent
T = TypeVar("T")


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method without importing it.

    Attributes
    ----------
    area, name : room (folder) and file stem; `area/name` is unique
    card : the specification it follows
    level : which of M (mechanism), R (real data), P (published number) holds, e.g. "MR"
    object : name of the public class or function
    summary : first line of the file's docstring
    """

    area: str
    name: str
    card: str
    level: str
    object: str
    summary: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def method(*, card: str, level: str) -> Callable[[T], T]:
    """Mark the one public class or function of a method file.

    Parameters
    ----------
    card : name of the method's card (its specification)
    level : the letters of M, R, P that hold today ("M", "MR", "MRP")
    """
    if not level or set(level) - set("MRP"):
        raise ClipworksError(f"level must be made of the letters M, R, P. Got {level!r}.")

    def mark(target: T) -> T:
        target.__clipworks_method__ = {"card": card, "level": level}  # type: ignore[attr-defined]
        return target

    return mark


def _read(path: Path) -> MethodInfo | None:
    source = path.read_text(encoding="utf-8")
    if "@method(" not in source:
        return None
    tree = ast.parse(source)
    for node in tree.body:
        for decorator in getattr(node, "decorator_list", []):
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "method":
                marks = {k.arg: ast.literal_eval(k.value) for k in decorator.keywords}
                summary = (ast.get_docstring(tree) or "").strip().split("\n")[0]
                return MethodInfo(path.parent.name, path.stem, marks["card"], marks["level"], node.name, summary)  # type: ignore[attr-defined]
    return None


@functools.lru_cache(maxsize=1)
def _all() -> tuple[MethodInfo, ...]:
    files = (f for area in AREAS for f in sorted((PACKAGE / area).glob("*.py")))
    return tuple(info for f in files if (info := _read(f)))


def methods(area: str | None = None) -> list[MethodInfo]:
    """List every registered method, or those of one area, sorted by area and name."""
    if area is not None:
        check_choice("area", area, AREAS)
    return [m for m in _all() if area in (None, m.area)]


def get_method(name: str, area: str | None = None) -> Any:
    """Import and return the class or function of a method by `name` or `area/name`.

    Raises
    ------
    ClipworksError
        If no method, or more than one, has that name; the message offers the closest match.
    """
    if "/" in name:
        area, name = name.split("/", 1)
    found = [m for m in methods(area) if m.name == name.replace("-", "_")]
    if not found:
        names = [m.name for m in methods(area)]
        hint = closest(name, names)
        raise ClipworksError(f"method must be a registered name (see `clipworks methods`). Got {name!r}.{hint}")
    if len(found) > 1:
        raise ClipworksError(f"method {name!r} is ambiguous: {', '.join(f'{m.area}/{m.name}' for m in found)}")
    info = found[0]
    return getattr(importlib.import_module(f"clipworks.{info.area}.{info.name}"), info.object)


def read_call(argument: str, text: str, example: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the keyword arguments of a method as a user writes it; nothing is run.

    Parameters
    ----------
    argument, example : name of the argument and a method that it may be, for the message
    text : "gda", or with literals as arguments "gda(alpha=1.0)"

    >>> read_call("methods", "gda(alpha=1.0)", "gda")
    ('gda', {'alpha': 1.0})
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Call) and not node.args:
            return ast.unparse(node.func), {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        if isinstance(node, ast.Name):
            return node.id, {}
    except (SyntaxError, ValueError):
        pass
    raise ClipworksError(f"{argument} must look like {example.partition('(')[0]!r} or {example!r}. Got {text!r}.")
