"""Options read from source against what Python itself says of the same function."""

import ast
import importlib
import inspect
from typing import Literal

import pytest

from clipworks.cli import _signature
from clipworks.cli._signature import documented, parameters, shell_type
from clipworks.errors import ClipworksError

SOURCE = '''
BATCH = 32

def work(source: "str | Path", out, *, names: Sequence[str] = ("a", "b"), batch_size: int = BATCH,
         rate: float | None = None, kind: Literal["x", "y"] = "x", fast: bool = True, encoder: Encoder | str = "small",
         hook: Callable | None = None, sizes: list[int] = (), progress=None):
    """Do it.

    Parameters
    ----------
    source : where from
    out : path
        Where to.
    names : the names,
        all of them
    batch_size, rate : numbers
    kind : "x" or "y"

    Returns
    -------
    sizes : not a parameter
    """

class Head:
    """A head.

    Parameters
    ----------
    seed : int
        Makes it repeatable.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "area").mkdir()
    (tmp_path / "area" / "file.py").write_text(SOURCE)
    monkeypatch.setattr(_signature, "PACKAGE", tmp_path)
    return tmp_path


def test_types_defaults_and_help(package):
    found = parameters("area.file.work")
    assert "progress" not in found
    expected = {
        "source": (str, None, "where from"),
        "out": (None, None, "Where to."),
        "names": (list[str], "a,b", "the names, all of them"),
        "batch_size": (int, "32", "numbers"),
        "rate": (float, None, "numbers"),
        "kind": (Literal["x", "y"], "x", '"x" or "y"'),
        "fast": (bool, "True", ""),
        "encoder": (str, "small", ""),
        "hook": (None, None, ""),
        "sizes": (list[int], None, ""),
    }
    assert {n: (p.type, p.default, p.help) for n, p in found.items()} == expected


def test_a_class_gives_its_constructor(package):
    (seed,) = parameters("area.file.Head").values()
    assert (seed.name, seed.type, seed.default, seed.help) == ("seed", int, "0", "Makes it repeatable.")


@pytest.mark.parametrize("target", ["area.file.nothing", "area.nofile.work"])
def test_a_wrong_target_is_named(package, target):
    with pytest.raises(ClipworksError, match=target.rsplit(".", 1)[1] if "nothing" in target else "nofile"):
        parameters(target)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("int", int),
        ("Path", str),
        ("str | None", str),
        ("int | float", int),
        ("Tensor | str", str),
        ("Optional[float]", float),
        ("list[float]", list[float]),
        ("tuple[int, ...]", list[int]),
        ("Mapping[str, int]", None),
        ("Callable[[int], str]", None),
        ("'str | int'", str),
    ],
)
def test_shell_types(text, kind):
    assert shell_type(ast.parse(text, mode="eval").body) == kind


def test_a_docstring_without_parameters_gives_none():
    assert documented("Do it.\n\nReturns\n-------\nx : y\n") == {}


def public_functions():
    """Every function of the package that a command calls, by the target its command names."""
    from clipworks.cli._command import discover

    return sorted({entry.calls for entry in discover().values() if entry.calls})


@pytest.mark.parametrize("target", public_functions())
def test_what_is_read_from_source_is_what_python_says(target):
    module, name = target.rsplit(".", 1)
    signature = inspect.signature(getattr(importlib.import_module(f"clipworks.{module}"), name))
    read = parameters(target)
    named = [n for n, p in signature.parameters.items() if p.kind != p.VAR_KEYWORD]
    assert list(read) == [n for n in named if n not in ("self", "progress")]
    for name, parameter in read.items():
        default = signature.parameters[name].default
        if isinstance(default, str | int | float) and default != "":
            assert parameter.default == str(default)
