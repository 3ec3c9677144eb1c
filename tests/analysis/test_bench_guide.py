"""The guide to benchmarking runs as it stands, and its commands have no option that is not there."""

import doctest
import re
from pathlib import Path

from clipworks.analysis.bench.protocols import protocols
from clipworks.cli._command import discover, runner

GUIDE = Path(__file__).parents[2] / "docs" / "benchmarking.md"


def test_guide():
    failed, tried = doctest.testfile(str(GUIDE), module_relative=False)
    assert failed == 0
    assert tried > 20


def test_options_and_protocols_are_those_that_there_are():
    text = GUIDE.read_text(encoding="utf-8")
    known = {name.replace("_", "-") for name in runner(discover()["bench"]).__signature__.parameters}
    assert set(re.findall(r"(?<=--)[a-z][a-z-]*", text)) <= known
    assert set(re.findall(r"^\| ([a-z-]+) \| .* \| .* \| .* \|$", text, re.M)) - {"protocol"} == set(protocols())
