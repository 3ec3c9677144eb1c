"""The examples of the guide run."""

import doctest
from pathlib import Path


def test_guide():
    guide = Path(__file__).parents[2] / "docs" / "data.md"
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    failed, tried = doctest.testfile(str(guide), module_relative=False, optionflags=flags)
    assert failed == 0
    assert tried > 15
