"""Read a library function's options from its source: names, types, defaults and help, without importing it.

The signature gives names, types and defaults, the NumPy docstring gives the help; so command line, documentation
and Python cannot drift apart, and `clipworks search --help` does not wait for torch.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ClipworksError

PACKAGE = Path(__file__).parent.parent
_SCALARS = {"str": str, "int": int, "float": float, "bool": bool, "Path": str}
_ARITHMETIC = {ast.Mult: operator.mul, ast.Pow: operator.pow, ast.LShift: operator.lshift, ast.Sub: operator.sub}
_LISTS = ("list", "tuple", "Sequence", "Iterable", "Mapping")
_TYPE_WORDS = re.compile(
    r"^((str|int|float|bool|path|list|tuple|array|sequence|optional|callable)\b|\{|[A-Z]\w+$)", re.I
)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a library function, as far as a shell can give it.

    Attributes
    ----------
    name : its name in Python
    type : the type on the command line, or None where a shell cannot write such a value
    default : the default as text, for the help; None where there is none to show
    help : its line of the docstring
    """

    name: str
    type: Any
    default: str | None
    help: str


def parameters(target: str) -> dict[str, Parameter]:
    """Return the parameters of `target` such as `"store.search.search"`; of a class, those of its constructor."""
    module, name = target.rsplit(".", 1)
    path = PACKAGE / (module.replace(".", "/") + ".py")
    if not path.exists():
        raise ClipworksError(f"calls must name a function of the package. Got {target!r}: there is no {path.name}.")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    node = next((n for n in tree.body if getattr(n, "name", None) == name), None)
    if node is None:
        raise ClipworksError(f"calls must name a function of the package. Got {target!r}: no {name!r} there.")
    docs = documented(ast.get_docstring(node) or "")  # type: ignore[arg-type]
    if isinstance(node, ast.ClassDef):
        node = next((n for n in node.body if getattr(n, "name", None) == "__init__"), None)
    if node is None:  # a class that takes the constructor of its base
        return {}
    constants = _constants(tree, path)
    found = {}
    for argument, default in _with_defaults(node.args):  # type: ignore[attr-defined]
        if argument.arg in ("self", "progress"):
            continue
        kind, shown = shell_type(argument.annotation), _shown(default, constants)
        found[argument.arg] = Parameter(argument.arg, kind, shown, docs.get(argument.arg, ""))
    return found


def united(targets: Mapping[str, str], leave: Iterable[str] = ()) -> dict[str, Parameter]:
    """Return the parameters of several targets together, with help and defaults that say whose they are.

    Parameters
    ----------
    targets : name -> target, as for `parameters`
    leave : parameters that are left out

    Returns
    -------
    a parameter that the targets disagree on has the type str: whoever takes it has to convert it
    """
    owners: dict[str, dict[str, Parameter]] = {}
    for title, target in targets.items():
        for name, parameter in parameters(target).items():
            if name not in leave and parameter.type is not None:
                owners.setdefault(name, {})[title] = parameter
    found = {}
    for name, by in owners.items():
        kinds = {repr(p.type): p.type for p in by.values()}
        defaults: dict[str, list[str]] = {}
        for title, parameter in by.items():
            defaults.setdefault(parameter.default or "", []).append(title)
        shown = "; ".join(", ".join(titles) + (f": {value}" if value else "") for value, titles in defaults.items())
        kind = next(iter(kinds.values())) if len(kinds) == 1 else str
        found[name] = Parameter(name, kind, None, f"{next(iter(by.values())).help} [{shown}]")
    return found


def _with_defaults(arguments: ast.arguments) -> list[tuple[ast.arg, ast.expr | None]]:
    plain = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults))
    defaults = [*missing, *arguments.defaults, *arguments.kw_defaults]
    return list(zip([*plain, *arguments.kwonlyargs], defaults, strict=True))


def _constants(tree: ast.Module, path: Path) -> dict[str, ast.expr]:
    """Constants of a file by name, those that it imports from files of the package too."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            found |= {t.id: node.value for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.level and any(a.name.isupper() for a in node.names):
            other = path.parents[node.level - 1].joinpath(*(node.module or "").split(".")).with_suffix(".py")
            if other.exists():
                there = _constants(ast.parse(other.read_text(encoding="utf-8")), other)
                found |= {a.asname or a.name: there[a.name] for a in node.names if a.name in there}
    return found


def _shown(default: ast.expr | None, constants: dict[str, ast.expr]) -> str | None:
    if isinstance(default, ast.Name):
        default = constants.get(default.id)
    if default is None or (isinstance(default, ast.Constant) and default.value in (None, "")):
        return None
    try:
        value = _computed(default)
    except (ValueError, KeyError):
        return ast.unparse(default)
    return ",".join(map(str, value)) or None if isinstance(value, list | tuple) else str(value)


def _computed(node: ast.expr) -> Any:
    """A literal, or arithmetic of literals such as 256 * 2**20."""
    if isinstance(node, ast.BinOp):
        return _ARITHMETIC[type(node.op)](_computed(node.left), _computed(node.right))
    return ast.literal_eval(node)


def shell_type(annotation: ast.expr | None) -> Any:
    """Return the type a shell word can be turned into, or None: `str | Path | None` is str, a Tensor None."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        parts = [shell_type(annotation.left), shell_type(annotation.right)]
        known = [p for p in parts if p is not None]
        return str if str in known else next(iter(known), None)
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value).rsplit(".", 1)[-1]
        if outer == "Literal":
            return Literal[ast.literal_eval(annotation.slice)]  # type: ignore[misc]
        if outer == "Optional":
            return shell_type(annotation.slice)
        if outer in _LISTS and outer != "Mapping":
            inner = annotation.slice.elts[0] if isinstance(annotation.slice, ast.Tuple) else annotation.slice
            kind = shell_type(inner)
            return list[kind] if kind in (str, int, float) else None  # type: ignore[valid-type]
        return None
    return _SCALARS.get(annotation.id) if isinstance(annotation, ast.Name) else None


def documented(docstring: str) -> dict[str, str]:
    """Return the help of every entry of the docstring's `Parameters` section."""
    match = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", docstring, re.M | re.S)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", match.group(1).strip("\n")) if match else []:
        head, _, below = entry.partition("\n")
        names, _, first = head.partition(":")
        below = " ".join(below.split())
        # "name : int, default 5" over an indented description: the type is already known from the signature
        text = below if below and _TYPE_WORDS.match(first.strip()) else f"{first.strip()} {below}".strip()
        for name in names.split(","):
            found[name.strip().lstrip("*")] = text
    return found


def summary(docstring: str) -> str:
    """Return the first sentence of a docstring."""
    return docstring.strip().split("\n")[0].rstrip(".")
