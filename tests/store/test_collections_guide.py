"""The guide to collections runs as it stands, and its numbers are those of the committed measurement."""

import doctest
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "collections.md"


def test_guide():
    failed, tried = doctest.testfile(str(GUIDE), module_relative=False, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert failed == 0
    assert tried > 30


def test_speed():
    """Search is no slower than faiss on the same thread, and the guide says what was measured."""
    results = json.loads((ROOT / "benchmarks/results/search_speed.json").read_text())["results"]
    said = re.findall(r"^\| (\d+) \| ([\d.]+) ms \| ([\d.]+) ms \| ([\d.]+) \|$", GUIDE.read_text(), re.M)
    assert [int(row[0]) for row in said] == [1, 8, 100, 500]
    for count, *row in said:
        measured = results[f"{count} queries"]
        ours, theirs = measured["clipworks"], measured["faiss IndexFlatIP"]
        times = [entry["us_per_query_processor"] / 1000 for entry in (theirs, ours)]
        assert row == [f"{value:.2f}" for value in (*times, ours["ratio_processor"])]
        assert ours["ratio_processor"] >= 1
        assert ours["recall"] in (1.0, None)
