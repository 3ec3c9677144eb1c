"""Calibration against loops, scikit-learn and the checkable facts of its card."""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from clipworks.errors import ClipworksError
from clipworks.heads.common import fit_temperature
from clipworks.metrics.calibration import (
    adaptive_calibration_error,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def made(n=400, classes=5, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, classes))
    y = np.array([rng.choice(classes, p=p) for p in softmax(z)])
    return scale * z, y


def binned(confidence, right, bins):
    """The definition, bin by bin."""
    total = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)]
        if inside:
            total += len(inside) / len(right) * abs(np.mean(right[inside]) - np.mean(confidence[inside]))
    return total


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_expected_and_classwise_error_are_their_definitions(bins):
    z, y = made()
    p = softmax(z)
    assert expected_calibration_error(p, y, bins) == pytest.approx(binned(p.max(1), p.argmax(1) == y, bins), abs=1e-12)
    by_class = [binned(p[:, c], y == c, bins) for c in range(5)]
    assert classwise_calibration_error(p, y, bins) == pytest.approx(np.mean(by_class), abs=1e-12)
    assert max(by_class) > 0.01 or bins == 1


def test_the_bins_of_two_classes_are_those_of_scikit_learn():
    z, y = made(classes=2)
    p = softmax(z)
    for spacing, strategy in (("width", "uniform"), ("count", "quantile")):
        share, mean = calibration_curve(p.argmax(1) == y, p.max(1), n_bins=8, strategy=strategy)
        found = reliability(p, y, 8, spacing)
        np.testing.assert_allclose(found.accuracy, share, atol=1e-12)
        np.testing.assert_allclose(found.confidence, mean, atol=1e-12)


def test_adaptive_bins_hold_equally_many():
    z, y = made(n=300)
    p = softmax(z)
    found = reliability(p, y, 15, "count")
    assert found.count.tolist() == [20] * 15
    order = np.argsort(p.max(1))
    parts = [abs((p.argmax(1) == y)[rows].mean() - p.max(1)[rows].mean()) for rows in np.split(order, 15)]
    assert adaptive_calibration_error(p, y) == pytest.approx(np.mean(parts), abs=1e-12)
    assert (found.low[1:] > found.high[:-1]).all()
    np.testing.assert_allclose(found.high, [p.max(1)[rows].max() for rows in np.split(order, 15)])


def test_equal_confidences_stay_together_in_any_order():
    p = np.repeat([[0.7, 0.3], [0.9, 0.1]], [6, 2], axis=0)
    y = np.array([0, 0, 0, 1, 1, 1, 0, 0])
    found = reliability(p, y, 4, "count")
    assert found.count.tolist() == [6, 2]
    for order in (np.arange(8)[::-1], np.random.default_rng(0).permutation(8)):
        assert reliability(p[order], y[order], 4, "count").count.tolist() == [6, 2]
    assert adaptive_calibration_error(p, y, 4) == pytest.approx((6 * 0.2 + 2 * 0.1) / 8)


def test_an_edge_belongs_to_the_bin_below():
    found = reliability([[0.8, 0.2], [0.81, 0.19]], [0, 0], bins=5)
    assert found.count.tolist() == [1, 1]
    np.testing.assert_allclose([found.low, found.high], [[0.6, 0.8], [0.8, 1.0]])
    assert found.as_rows()[0] == {"low": pytest.approx(0.6), "high": pytest.approx(0.8), "count": 1,
                                  "confidence": pytest.approx(0.8), "accuracy": 1.0}  # fmt: skip
    assert reliability([[1.0, 0.0]], [1]).worst == 1


def test_brier_and_likelihood_are_those_of_scikit_learn():
    z, y = made()
    p = softmax(z)
    assert negative_log_likelihood(p, y) == pytest.approx(log_loss(y, p))
    target = np.eye(5)[y]
    assert brier_score(p, y) == pytest.approx(np.mean([((a - b) ** 2).sum() for a, b in zip(p, target, strict=True)]))
    two = np.column_stack([1 - p[:, 0], p[:, 0]])
    assert brier_score(two, (y == 0).astype(int)) == pytest.approx(2 * brier_score_loss(y == 0, p[:, 0]))
    assert np.isfinite(negative_log_likelihood([[1.0, 0.0]], [1]))


@pytest.mark.parametrize(("confidence", "right"), [(0.8, 0.8), (0.9, 0.5), (0.55, 1.0)])
def test_constant_confidence_errs_by_its_distance_from_the_accuracy(confidence, right):
    """Card: always 0.8 sure and right in 80 % gives 0; in general |c - a|."""
    p = np.tile([confidence, 1 - confidence], (20, 1))
    y = (np.arange(20) >= 20 * right).astype(int)
    for error in (expected_calibration_error, adaptive_calibration_error):
        assert error(p, y) == pytest.approx(abs(confidence - right), abs=1e-12)


def test_a_perfectly_calibrated_simulation_has_next_to_no_error():
    """Card: n = 1e5, below 0.01."""
    rng = np.random.default_rng(0)
    p = softmax(2 * rng.normal(size=(100_000, 4)))
    y = (rng.random((100_000, 1)) > p.cumsum(1)).sum(1)
    for error in (expected_calibration_error, adaptive_calibration_error, classwise_calibration_error):
        assert 0 < error(p, y) < 0.01
    assert expected_calibration_error(p**3 / (p**3).sum(1, keepdims=True), y) > 0.1


def test_temperature_keeps_the_accuracy_and_lowers_likelihood_and_error():
    """Card: the argmax stays, NLL at tau* <= NLL at 1."""
    z, y = made(n=2000)
    t = fit_temperature(z, y)
    before, after = softmax(z), softmax(z / t)
    np.testing.assert_array_equal(before.argmax(1), after.argmax(1))
    assert negative_log_likelihood(after, y) < negative_log_likelihood(before, y)
    assert expected_calibration_error(after, y) < expected_calibration_error(before, y) / 3


def test_errors_lie_between_0_and_1_and_tensors_are_read():
    rng = np.random.default_rng(1)
    for _ in range(20):
        p, y = softmax(rng.normal(size=(7, 3)) * 9), rng.integers(0, 3, 7)
        for error in (expected_calibration_error, adaptive_calibration_error, classwise_calibration_error):
            assert 0 <= error(p, y) <= 1
    assert brier_score(torch.tensor(p), torch.tensor(y)) == brier_score(p, y)


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([[0.5, 0.6]], [0], "Row 0 does not"),
        ([[0.5, 0.5], [-0.1, 1.1]], [0, 0], "Row 1 does not"),
        ([[np.nan, 0.5]], [0], "Row 0 does not"),
        ([0.5, 0.5], [0], "shape"),
        (np.zeros((0, 2)), [], "at least one row"),
        ([[0.5, 0.5]], [2], r"labels must lie in \[0, 1\].*Got 2"),
        ([[0.5, 0.5]], [0, 1], "1 numbers of classes"),
        ([[0.5, 0.5]], ["cat"], "numbers of classes"),
        ([["a", "b"]], [0], "matrix of numbers"),
    ],
)
def test_what_is_no_probability_is_refused(p, y, message):
    with pytest.raises(ClipworksError, match=message):
        expected_calibration_error(p, y)


def test_bins_and_spacing_are_checked():
    with pytest.raises(ClipworksError, match="bins"):
        expected_calibration_error([[0.5, 0.5]], [0], bins=0)
    with pytest.raises(ClipworksError, match="Did you mean 'count'"):
        reliability([[0.5, 0.5]], [0], spacing="counts")
