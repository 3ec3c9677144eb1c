"""The learning rate's closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from clipworks.errors import ClipworksError
from clipworks.training.schedule import learning_rate, warmup_steps


def _rates(**options):
    return [learning_rate(s, lr=5e-4, total=100, warmup=10, **options) for s in range(100)]


def test_cosine_facts():
    rates = _rates()
    assert rates[0] == pytest.approx(5e-4 / 10)
    assert rates[9] == rates[10] == pytest.approx(5e-4)
    assert rates[55] == pytest.approx(0.5 * 5e-4 * (1 + math.cos(math.pi * 45 / 90)))
    assert rates[-1] < 5e-4 * 1e-3
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert all(a < b for a, b in pairwise(rates[:10]))


def test_constant_linear_and_ends():
    assert set(_rates(schedule="constant")[10:]) == {5e-4}
    assert _rates(schedule="linear")[55] == pytest.approx(2.5e-4)
    slip = _rates(start=1e-6, end=1e-5)
    assert slip[0] == pytest.approx(1e-6 + (5e-4 - 1e-6) / 10)
    assert slip[-1] == pytest.approx(1e-5, rel=0.02)
    assert learning_rate(5, lr=1.0, total=5) == pytest.approx(0.0)


def test_warmup_counts_steps_or_a_share():
    assert [warmup_steps(w, 200) for w in (0, 0.05, 1, 30, 1000)] == [0, 10, 1, 30, 199]
    with pytest.raises(ClipworksError, match="warmup must lie in"):
        warmup_steps(-1, 10)


def test_unknown_schedule_names_the_closest():
    with pytest.raises(ClipworksError, match="Did you mean 'cosine'"):
        learning_rate(0, lr=1.0, total=1, schedule="cosin")
