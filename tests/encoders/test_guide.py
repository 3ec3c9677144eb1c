"""The examples of the guide and of the docstrings run."""

import doctest
import importlib
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "encoders.md"


def test_guide():
    failed, tried = doctest.testfile(str(GUIDE), module_relative=False, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert failed == 0
    assert tried > 40


@pytest.mark.parametrize("name", ["config", "efficientnet", "positions"])
def test_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(f"clipworks.encoders.{name}"), extraglobs=None)
    assert failed == 0
    assert tried > 0
