"""The package as a whole: quick and light to import, public names that load when they are asked for."""

import ast
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

import clipworks

PACKAGE = Path(clipworks.__file__).parent


def test_importing_is_quick_and_brings_no_torch():
    code = (
        "import sys, time; started = time.process_time(); import clipworks; "
        "print(time.process_time() - started, *[m for m in ('torch', 'numpy', 'lancedb') if m in sys.modules])"
    )
    best = 9.0
    for _ in range(3):
        words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert words[1:] == []
        best = min(best, float(words[0]))
    assert best < 0.3


@pytest.mark.parametrize("name", clipworks.__all__)
def test_every_public_name_is_there(name):
    assert getattr(clipworks, name) is not None
    assert name in dir(clipworks)


def test_a_wrong_name_is_told_the_closest():
    with pytest.raises(AttributeError, match="Did you mean 'search'"):
        clipworks.serch  # noqa: B018


def test_python_m_clipworks():
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "clipworks", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"clipworks {clipworks.__version__}\n"
    assert time.perf_counter() - started < 10


def files():
    return sorted(PACKAGE.rglob("*.py"))


def test_no_file_is_long():
    assert {str(f): n for f in files() if (n := len(f.read_text(encoding="utf-8").splitlines())) >= 400} == {}


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_every_file_says_what_it_is(file):
    """A docstring at the top, for every public class too; no bare print and no assert on what users give."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
        assert not isinstance(node, ast.Assert), node.lineno
        if "cli" not in file.parts:
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), node.lineno


@pytest.mark.parametrize("module", ["errors", "types", "registry", "progress", "zeroshot.templates", "store.changes"])
def test_examples_in_docstrings_run(module):
    import doctest

    assert doctest.testmod(importlib.import_module(f"clipworks.{module}")).failed == 0
