"""The registry is the file system: what it reads from files, and what it says of wrong names."""

import pytest

from clipworks import registry
from clipworks.errors import ClipworksError, UnknownName
from clipworks.registry import get_method, method, methods

FILE = '''"""One line that says what it is.

Claim: none.
"""
from clipworks.registry import method

LIMIT = 3

def helper():
    return 0

@method(card="a-card", level="MR")
class Thing:
    """It."""
'''


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A package with two methods of one name in two areas, and files that are none."""
    for area in ("heads", "losses"):
        (tmp_path / area).mkdir()
        (tmp_path / area / "thing.py").write_text(FILE)
        (tmp_path / area / "common.py").write_text('"""Shared. @method( in words is no method."""\n')
    (tmp_path / "losses" / "other.py").write_text(FILE.replace("class Thing", "def other()"))
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "lost.py").write_text(FILE)
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    registry._all.cache_clear()
    yield tmp_path
    registry._all.cache_clear()


def test_what_is_read_from_the_files(house):
    assert [(m.area, m.name, m.object) for m in methods()] == [
        ("heads", "thing", "Thing"),
        ("losses", "other", "other"),
        ("losses", "thing", "Thing"),
    ]
    assert methods("heads")[0].as_dict() == {
        "area": "heads", "name": "thing", "card": "a-card", "level": "MR", "object": "Thing",
        "summary": "One line that says what it is.",
    }  # fmt: skip


def test_a_name_in_two_areas_is_ambiguous(house):
    with pytest.raises(ClipworksError, match="ambiguous: heads/thing, losses/thing"):
        get_method("thing")


def test_names_are_looked_up():
    assert get_method("zeroshot/classifier").__name__ == "class_vectors"
    assert get_method("tip-adapter") is get_method("heads/tip_adapter")
    with pytest.raises(ClipworksError, match=r"clipworks methods.*Did you mean 'infonce'"):
        get_method("infonse")
    with pytest.raises(UnknownName, match="Did you mean 'losses'"):
        methods("loses")


@pytest.mark.parametrize("level", ["", "X", "MX"])
def test_levels_are_m_r_and_p(level):
    with pytest.raises(ClipworksError, match="letters M, R, P"):
        method(card="c", level=level)
