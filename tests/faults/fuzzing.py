"""Mutants of good files, and the rule that each of them has to keep: read, or refused with an error of ours.

A short run draws the same mutants every time, a long one others each time; what breaks the rule is made as small as
it can be by hypothesis and shown.
"""

from __future__ import annotations

import contextlib
import gc
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipworks.errors import ClipworksError

SECONDS = 1.0  # of processor time for one mutant
MEMORY = 192 << 20  # bytes by which the process may grow at any moment of a run
INJECTED: Counter = Counter()  # inputs that `run` gave in the test that runs now, see conftest.py
NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


@st.composite
def edits(draw: st.DrawFn, data: bytes, most: int = 6, keep: int = 0) -> bytes:
    """Up to `most` places of `data` overwritten, cut out, doubled or given a telling number; `keep` bytes stay."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(keep, max(keep, len(made) - 1)))
        way = draw(st.sampled_from(["byte", "bit", "number", "fill", "cut", "double", "insert", "end"]))
        if way == "byte":
            made[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif way == "bit" and place < len(made):
            made[place] ^= 1 << draw(st.integers(0, 7))
        elif way == "number":
            form = draw(st.sampled_from(["<B", "<H", ">H", "<I", ">I", "<Q", ">Q"]))
            value = draw(st.sampled_from(NUMBERS)) & (256 ** struct.calcsize(form) - 1)
            made[place : place + struct.calcsize(form)] = struct.pack(form, value)
        elif way == "fill":
            made[place : place + draw(st.integers(1, 32))] = draw(st.sampled_from([b"\0", b"\xff"])) * 8
        elif way == "cut":
            del made[place : place + draw(st.integers(1, 64))]
        elif way == "double":
            made[place:place] = made[place : place + draw(st.integers(1, 64))]
        elif way == "insert":
            made[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif way == "end" and draw(st.integers(0, 3)) == 0:
            del made[place:]
    return bytes(made)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**400])
    | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


@st.composite
def edited_json(draw: st.DrawFn, value: object, most: int = 3) -> object:
    """A JSON value with some of its parts removed, doubled under another name, or something else altogether."""
    for _ in range(draw(st.integers(1, most))):
        value = _edited(draw, value)
    return value


def _edited(draw: st.DrawFn, value: object) -> object:
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        way = draw(st.sampled_from(["into", "into", "into", "drop", "rename"]))
        if way == "into":
            return {**value, key: _edited(draw, value[key])}
        rest = {k: v for k, v in value.items() if k != key}
        return rest if way == "drop" else rest | {draw(st.text(max_size=6)): value[key]}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], _edited(draw, value[place]), *value[place + 1 :]]
    return draw(json_values)


@contextlib.contextmanager
def bounded_memory(limit: int = MEMORY) -> Iterator[None]:
    """Fail if the process grows by more than `limit` bytes at any moment inside; nothing is measured off Linux."""
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return int(status.read_text().split(f"{name}:")[1].split()[0]) * 1024

    try:
        gc.collect()
        before = field("VmRSS")  # first: what another thread gives back in between has not grown here
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        yield
        return
    yield
    grown = field("VmHWM") - before
    assert grown < limit, f"grew by {grown >> 20} MiB"


def run(
    strategy: st.SearchStrategy,
    work: Callable[[object], object],
    count: int,
    error: type[ClipworksError] = ClipworksError,
    seconds: float = SECONDS,
) -> Counter:
    """Give `count` drawn inputs to `work`; each is answered, or refused by an `error`, within `seconds`.

    Returns
    -------
    how many were read and how many refused
    """
    found: Counter = Counter()

    @settings(max_examples=count, deadline=None, derandomize=count <= 1000, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def test(drawn: object) -> None:
        start, said = time.thread_time(), None
        INJECTED["drawn"] += 1
        try:
            work(drawn)
        except error as refused:
            said = str(refused).strip()
        assert time.thread_time() - start < seconds
        assert said != ""
        found["read" if said is None else "refused"] += 1

    with bounded_memory():
        test()
    return found
