"""How many faults a test injects is written beside its result, where `benchmarks/faults.py` reads it."""

import fuzzing
import pytest


@pytest.fixture(autouse=True)
def injected(record_property):
    """The inputs that `fuzzing.run` drew."""
    fuzzing.INJECTED.clear()
    yield
    if fuzzing.INJECTED.total():
        record_property("injected", fuzzing.INJECTED.total())
