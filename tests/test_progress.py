"""The progress bar: what it counts, what it shows, and when it is silent."""

import contextlib
import io
import sys
import time

import pytest

from clipworks.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock(seconds)` moves."""
    now = [100.0]
    monkeypatch.setattr("clipworks.progress.time.perf_counter", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


def slow(count, seconds, wait=time.sleep):
    for i in range(count):
        wait(seconds)
        yield i


def test_elements_pass_through_and_units_are_counted(clock):
    bar = Progress([[1, 2], [3]], 3, "work", unit=len, enabled=False)
    for _ in bar:
        clock(2.0)
    assert (bar.done, bar.elapsed, bar.rate, bar.wait_share) == (3, 4.0, 0.75, 0.0)
    assert list(Progress([[1, 2], [3]])) == [[1, 2], [3]]
    assert Progress([]).rate == Progress([]).wait_share == 0


def test_waiting_is_the_time_inside_the_iterator(clock):
    bar = Progress(slow(4, 3.0, clock))
    for _ in bar:
        clock(1.0)
    assert (bar.elapsed, bar.waited, bar.wait_share, bar.rate) == (16.0, 12.0, 0.75, 0.25)


def test_silent_without_a_terminal(capsys):
    assert list(Progress(range(3), 3, "work")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_it_shows_count_rate_eta_and_waiting(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    for _ in Progress(slow(6, 0.06), 6, "embedding"):
        pass
    shown = terminal.getvalue()
    for part in ("embedding", "/6", "/s", "data wait", "0:00:0"):
        assert part in shown
    assert not Progress([], enabled=False)._bar()


def test_an_error_or_an_early_end_takes_the_bar_away(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = Progress(range(10), 10, "work")
    for i in bar:
        if i == 3:
            break
    assert bar.done == 3  # the element that was left is not finished
    bar = Progress(slow(2, 0.001), 2, "work")
    with contextlib.suppress(ZeroDivisionError):
        for i in bar:
            i / i
    assert bar.done == 0
    assert bar.elapsed > 0
