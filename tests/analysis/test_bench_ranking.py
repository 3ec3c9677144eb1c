"""Ranks, critical difference and intervals against scipy and plain computations."""

import time

import numpy as np
import pytest
from scipy import stats

from clipworks.analysis.bench.measure import Cost, calibration_error, score
from clipworks.analysis.bench.ranking import interval, rank
from clipworks.errors import ClipworksError


def table(k=5, n=12, seed=0):
    rng = np.random.default_rng(seed)
    return {f"m{i}": (rng.normal(size=n) + 0.8 * i).tolist() for i in range(k)}


def test_friedman_is_that_of_scipy():
    values = table()
    found = rank(values)
    chi, _ = stats.friedmanchisquare(*values.values())
    k, n = 5, 12
    assert found.statistic == pytest.approx((n - 1) * chi / (n * (k - 1) - chi))
    assert found.p == pytest.approx(stats.f.sf(found.statistic, k - 1, (k - 1) * (n - 1)))
    assert found.names[0] == "m4", "the highest values have the lowest rank"
    assert found.ranks.sum() == pytest.approx(k * (k + 1) / 2)


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_is_that_of_demsars_table(k, q):
    """Demsar 2006, table 5 a, alpha = 0.05."""
    assert rank(table(k)).difference == pytest.approx(q * np.sqrt(k * (k + 1) / (6 * 12)), rel=1e-3)


def test_ties_share_their_rank_and_all_alike_is_no_difference():
    found = rank({"a": [1, 2, 3], "b": [1, 2, 3], "c": [0, 0, 0]})
    assert found.ranks.tolist() == [1.5, 1.5, 3.0]
    alike = rank({"a": [1, 2, 3], "b": [1, 2, 3]})
    assert (alike.statistic, alike.p) == (0.0, 1.0)
    assert alike.alike() == [(0, 1)]


def test_groups_are_as_large_as_the_difference_allows():
    found = rank(table(k=6, n=30))
    for first, last in found.alike():
        assert found.ranks[last] - found.ranks[first] <= found.difference
        assert last == 5 or found.ranks[last + 1] - found.ranks[first] > found.difference
    apart = rank({name: [10.0 * i + j for j in range(30)] for i, name in enumerate("abc")})
    assert apart.alike() == []


@pytest.mark.parametrize(
    "wrong", [{"a": [1, 2]}, {"a": [1], "b": [2]}, {"a": [1, 2], "b": [2]}, {"a": [1, 2], "b": [1, np.nan]}]
)
def test_what_cannot_be_ranked(wrong):
    with pytest.raises(ClipworksError, match="ranking needs"):
        rank(wrong)


def test_the_interval_covers_as_often_as_it_says():
    """Means of 20 sets with 3 seeds each, of which the true mean is 0, lie in about 95 % of 200 intervals."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        blocks = rng.normal(size=(20, 1)) + 0.1 * rng.normal(size=(20, 3))
        low, high = interval(blocks.tolist(), draws=300)
        hits += low <= 0 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_the_interval_widens_with_the_differences_of_sets():
    narrow, wide = interval([[50.0, 51.0]] * 6), interval([[40.0 + 5 * i] * 2 for i in range(6)])
    assert narrow[1] - narrow[0] < 1 < wide[1] - wide[0]
    assert interval([[1.0, 2.0], [3.0]], seed=1) == interval([[1.0, 2.0], [3.0]], seed=1)


def test_scores_by_hand():
    y, found = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    given = score(y, found, probabilities)
    assert given["accuracy"] == 75.0
    assert given["mean_per_class"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert given["nll"] == pytest.approx(-np.log([0.9, 0.8, 0.3, 0.6]).mean())
    # four bins of one image each: |1 - .9|, |1 - .8|, |0 - .7|, |1 - .6|
    assert given["calibration_error"] == pytest.approx(100 * (0.1 + 0.2 + 0.7 + 0.4) / 4)
    assert set(score(y, found, None)) == {"accuracy", "mean_per_class", "images"}


def test_calibration_error_against_a_loop():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 500)
    y = rng.integers(0, 4, 500)
    total = 0.0
    for b in range(15):
        inside = [i for i in range(500) if b / 15 <= p[i].max() < (b + 1) / 15 or (b == 14 and p[i].max() == 1)]
        if inside:
            gap = np.mean([p[i].argmax() == y[i] for i in inside]) - np.mean([p[i].max() for i in inside])
            total += len(inside) / 500 * abs(gap)
    assert calibration_error(y, p) == pytest.approx(total)


def test_cost_sees_time_and_memory():
    cost = Cost()
    kept = cost.step("fit", lambda: np.ones(40 * 2**17))  # 40 MB
    assert len(kept)
    assert 0 < cost.seconds["fit"] < 10
    cost.step("sleep", lambda: time.sleep(0.2))
    assert cost.seconds["sleep"] < 0.1, "waiting costs nothing"
    peak = cost.peak_mb()
    assert peak is None or 30 < peak < 80
