"""Rows as table, CSV and JSON."""

import csv
import io
import json

import pytest

from clipworks.cli._output import emit, facts, table
from clipworks.errors import ClipworksError

ROWS = [
    {"rank": 1, "key": 'a,"b".jpg', "score": 0.25},
    {"rank": 10, "key": "日本.jpg", "score": -1.0, "top": {"cat": 0.5, "dog": 0.25}, "tags": ["x", "y"], "none": None},
]


def test_json_round_trip(capsys):
    emit(ROWS, as_json=True)
    assert json.loads(capsys.readouterr().out) == ROWS


def test_csv_round_trip_with_the_union_of_the_columns(capsys):
    emit(ROWS, as_csv=True)
    back = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [r["key"] for r in back] == [r["key"] for r in ROWS]
    assert list(back[0]) == ["rank", "key", "score", "top", "tags", "none"]
    assert float(back[0]["score"]) == 0.25
    assert back[0]["top"] == ""


def test_table_is_aligned_with_numbers_right():
    assert table(["n", "word"], [["1", "a"], ["-10.5", "bcd"]]) == "    n  word\n-----  ----\n    1  a\n-10.5  bcd"


def test_control_characters_cannot_reach_the_terminal(capsys):
    emit([{"key": "a\x1b[2Jb\nc"}])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("\n") == 3


def test_nothing_found_is_said_on_stderr_and_is_an_empty_list_in_json(capsys):
    emit([], empty="no such thing")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "no such thing\n")
    emit([], as_json=True)
    assert json.loads(capsys.readouterr().out) == []


def test_both_formats_are_refused():
    with pytest.raises(ClipworksError, match="not both"):
        emit([], as_json=True, as_csv=True)


def test_facts(capsys):
    facts({"a": 1, "long": {"x": 1, "y": 2}})
    assert capsys.readouterr().out == "a     1\nlong  x 1, y 2\n"
