"""Fault and abuse tests, counted row by row of the table in docs/reliability.md.

    python benchmarks/faults.py --minutes 4                    # the same command goes on where it was stopped
    python benchmarks/faults.py --slow --rows 9 --minutes 4    # the slow tests of a row

Runs pytest in this process, one test after the other, and keeps of each whether it passed, its seconds, and how many
faults it injected if it tells (`record_property("injected", n)`; the mutants of tests/faults/fuzzing.py are counted by
themselves). A test that did not fail is not run again while its file is the same. One that takes longer than `--limit`
is given up and counted as unfinished. What is there is recorded at any time, beside how many tests a row has.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from common import RESULTS, record

ROOT = Path(__file__).resolve().parents[1]
WORK = Path(tempfile.gettempdir()) / "clipworks-benchmarks" / "faults.jsonl"
OUTCOMES = ("passed", "failed", "skipped", "unfinished")
ROWS = {  # row of the table -> how the names of its tests begin; a test belongs to the first row that has it
    1: ["tests/store/test_faults.py::test_(killed|2000)"],
    2: ["tests/store/test_faults.py::test_a_crash", "tests/store/test_index.py::test_a_build_that_dies"],
    3: ["tests/store/test_faults.py::test_(files_that_cannot_grow|a_full_disk)"],
    4: ["tests/store/test_verify.py", "tests/store/test_index.py::test_damage",
        "tests/faults/test_fuzz_collections.py"],
    5: ["tests/store/test_faults.py::test_(two_writers|the_second_writer)"],
    6: ["tests/store/test_embed.py::test_another_encoder"],
    7: ["tests/faults/test_data_faults.py::test_(each_is_used|truncated)", "tests/data/test_decode.py"],
    8: ["tests/faults/test_data_faults.py::test_a_(bomb|tile|film|file)",
        "tests/faults/test_fuzz_images.py::test_a_bomb"],
    9: ["tests/faults/test_data_faults.py::test_(mutants|twenty)", "tests/faults/test_fuzz_images.py"],
    10: ["tests/faults/test_weights_faults.py", "tests/faults/test_fuzz_weights.py"],
    11: ["tests/encoders/test_export_folder.py"],
    12: ["tests/data/test_webdataset.py", "tests/faults/test_data_faults.py::test_archives"],
    13: ["tests/faults/test_data_faults.py::test_nothing_in_a_table"],
    14: ["tests/server/test_server_abuse.py::test_(no_path|a_link_out)",
         "tests/faults/test_fuzz_requests.py::test_paths"],
    15: [r"tests/server/test_server_abuse.py::test_limits_of_fields\[.*nothing is fetched"],
    18: ["tests/server/test_server_process.py::test_lack_of_memory",
         "tests/server/test_engine.py::test_(a_batch_that_needs|a_request_that_needs|allocation)"],
    16: ["tests/server/test_server_abuse.py", "tests/server/test_server_process.py",
         "tests/server/test_schemathesis.py", "tests/faults/test_fuzz_requests.py"],
    19: ["tests/training/test_resume.py", "tests/training/test_checkpoint.py"],
    20: ["tests/contracts/test_behaviour.py", "tests/contracts/test_estimators.py"],
}  # fmt: skip


def row_of(test: str) -> int | None:
    """The row that a test belongs to."""
    return next((row for row, names in ROWS.items() if any(re.match(name, test) for name in names)), None)


@functools.cache
def digest(file: str) -> str:
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:16]


def kept() -> dict[str, dict[str, Any]]:
    """What is known of each test that did not fail and whose file has not changed since."""
    lines = map(json.loads, WORK.read_text(encoding="utf-8").splitlines()) if WORK.exists() else []
    found = {line["test"]: line for line in lines if line["digest"] == digest(line["test"].partition("::")[0])}
    return {test: line for test, line in found.items() if line["outcome"] != "failed"}


class Recorder:
    """Pytest's plugin: leaves out what is known, writes down what every other test comes to, ends in time.

    Parameters
    ----------
    rows : whose tests are run
    minutes : after so long no further test begins
    limit : seconds after which a test is given up
    """

    def __init__(self, rows: Sequence[int], minutes: float, limit: float):
        self.rows, self.known, self.limit = rows, kept(), limit
        self.end = time.monotonic() + 60 * minutes
        self.tests: dict[int, list[str]] = {}  # of each row, known or not
        self.parts: dict[str, list[Any]] = defaultdict(list)

    @pytest.hookimpl(trylast=True)  # after the slow ones, or the others, were left out
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for row in self.rows:
            self.tests[row] = [item.nodeid for item in items if row_of(item.nodeid) == row]
        wanted = {test for tests in self.tests.values() for test in tests} - set(self.known)
        items[:] = [item for item in items if item.nodeid in wanted]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if time.monotonic() > self.end:
            pytest.exit("the minutes are over; the same command goes on", 0)
        signal.signal(signal.SIGALRM, lambda *_: self.give_up(item.nodeid))
        signal.setitimer(signal.ITIMER_REAL, self.limit)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.parts[report.nodeid].append(report)
        if report.when == "teardown":
            parts = self.parts.pop(report.nodeid)
            if self.known.get(report.nodeid, {}).get("outcome") == "unfinished":  # its end is ours, and no failure
                return
            outcomes = [part.outcome for part in parts]
            outcome = next((bad for bad in ("failed", "skipped") if bad in outcomes), "passed")
            injected = sum(value for name, value in report.user_properties if name == "injected")
            self.write(report.nodeid, outcome, sum(part.duration for part in parts), injected)

    def give_up(self, test: str) -> None:
        self.write(test, "unfinished", self.limit)
        pytest.exit(f"{test} is not finished after {self.limit:.0f} s; the same command goes on behind it", 0)

    def write(self, test: str, outcome: str, seconds: float, injected: Any = 0) -> None:
        line = {"test": test, "digest": digest(test.partition("::")[0]), "outcome": outcome,
                "seconds": round(seconds, 2), "injected": int(injected)}  # fmt: skip
        self.known[test] = line
        with WORK.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


    def counts(self, row: int) -> dict[str, Any]:
        """What became of the tests of a row."""
        lines = [self.known[test] for test in self.tests[row] if test in self.known]
        outcomes = Counter(line["outcome"] for line in lines)
        return {
            "files": sorted({test.partition("::")[0] for test in self.tests[row]}), "tests": len(self.tests[row]),
            **{outcome: outcomes[outcome] for outcome in OUTCOMES}, "injected": sum(line["injected"] for line in lines),
            "seconds": round(sum(line["seconds"] for line in lines), 1),
        }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--slow", action="store_true", help="the slow tests, in the place of the others")
    options.add_argument("--rows", type=int, nargs="+", choices=sorted(ROWS), default=sorted(ROWS), help="of the table")
    options.add_argument("--minutes", type=float, default=1e9, help="after which no further test begins")
    options.add_argument("--limit", type=float, default=240.0, help="seconds after which a test is given up")
    given = options.parse_args()
    WORK.parent.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(given.rows, given.minutes, given.limit)
    files = sorted({name.partition("::")[0] for row in given.rows for name in ROWS[row]})
    chosen = ["-m", "slow" if given.slow else "not slow"]
    pytest.main(["--rootdir", str(ROOT), "-p", "no:cacheprovider", *chosen, *(str(ROOT / file) for file in files)],
                plugins=[recorder])  # fmt: skip
    path = RESULTS / "faults.json"
    found = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {"default": {}, "slow": {}}
    rows = found["slow" if given.slow else "default"]
    rows |= {str(row): recorder.counts(row) for row in recorder.tests if recorder.tests[row]}
    for row in sorted(rows, key=int):
        print(row, {name: count for name, count in rows[row].items() if name != "files"})
    print(record("faults", found, 0))


if __name__ == "__main__":
    main()
