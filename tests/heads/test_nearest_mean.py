"""Nearest class mean against loops over images, scikit-learn's NearestCentroid and its limits."""

import numpy as np
import pytest
from few_shots import assert_sklearn_accepts, nll, shots, unit
from sklearn.neighbors import NearestCentroid

from clipworks.heads.common import ALPHAS, fit_temperature
from clipworks.heads.nearest_mean import NearestMean


def oracle(x, y, held, metric):
    """Scores (m, C) by loops."""
    scores = np.empty((len(held), y.max() + 1))
    for c in range(y.max() + 1):
        mean = x[y == c].mean(0)
        for i, v in enumerate(held):
            cos = v @ mean / np.linalg.norm(v) / np.linalg.norm(mean)
            scores[i, c] = 100 * cos if metric == "cosine" else -50 * np.linalg.norm(v - mean) ** 2
    return scores


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_scores_are_the_formula(metric):
    x, y, _ = shots(noise=0.5)
    held = shots(noise=0.5, draw=4)[0]
    np.testing.assert_allclose(NearestMean(metric=metric).fit(x, y).logits(held), oracle(x, y, held, metric), atol=1e-9)


def test_predictions_are_those_of_nearest_centroid():
    x, y, _ = shots(classes=9, noise=1.5)
    held = shots(classes=9, noise=1.5, draw=5)[0]
    ours = NearestMean().fit(x, y)
    theirs = NearestCentroid().fit(x, y)
    np.testing.assert_allclose(ours.means_, theirs.centroids_)
    np.testing.assert_array_equal(ours.predict(held), theirs.predict(held))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("views", [1, 3])
def test_weight_and_temperature_come_from_images_left_out_one_by_one(metric, views):
    x, y, words = shots(noise=1.5, word_noise=1.5)
    groups = np.empty(len(y), int)
    for c in range(6):  # three views of each image
        groups[y == c] = np.arange(8) // views
    image = y * 100 + groups
    scores = np.stack([
        oracle(x[image != image[i]], y[image != image[i]], x[i : i + 1], metric)[0] for i in range(len(y))
    ])  # fmt: skip
    zero = 100 * x @ words.T
    right = [np.mean((zero + a * scores).argmax(1) == y) for a in ALPHAS]
    head = NearestMean(text=words, metric=metric).fit(x, y, groups=groups)
    assert head.alpha_ == ALPHAS[int(np.argmax(right))]
    assert head.temperature_ == pytest.approx(fit_temperature(zero + head.alpha_ * scores, y), rel=1e-6)


def test_validation_images_choose_instead():
    x, y, words = shots(noise=1.5)
    xv, yv, _ = shots(noise=1.5, draw=9)
    head = NearestMean(text=words).fit(x, y, validation=(xv, yv))
    scores, zero = oracle(x, y, xv, "euclidean"), 100 * xv @ words.T
    assert head.alpha_ == ALPHAS[int(np.argmax([np.mean((zero + a * scores).argmax(1) == yv) for a in ALPHAS]))]
    logits = zero + head.alpha_ * scores
    grid = np.exp(np.linspace(-3, 3, 2001))
    assert head.temperature_ == pytest.approx(grid[np.argmin([nll(logits / t, yv) for t in grid])], rel=0.01)


def test_alpha_zero_is_zero_shot_and_a_large_one_is_the_means():
    x, y, words = shots(noise=1.5, word_noise=1.5)
    held = shots(noise=1.5, draw=3)[0]
    zero = NearestMean(text=words, alpha=0.0).fit(x, y)
    np.testing.assert_allclose(zero.logits(held), 100 * held @ words.T, atol=1e-9)
    only = NearestMean(text=words, alpha=1e9).fit(x, y)
    np.testing.assert_array_equal(only.predict(held), NearestMean().fit(x, y).predict(held))


def test_one_shot_is_the_nearest_shot():
    x, y, _ = shots(per_class=1)
    held = shots(noise=1.5, draw=7)[0]
    head = NearestMean().fit(x, y)
    nearest = ((held[:, None] - x) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(head.predict(held), y[nearest])
    assert head.temperature_ == 1.0  # nothing can be left out


def test_perpendicular_bisector():
    x = np.array([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0]])
    head = NearestMean().fit(x, [0, 0, 1, 1])
    assert head.predict([[1.99, 9.0], [2.01, -9.0]]).tolist() == [0, 1]
    np.testing.assert_allclose(head.predict_proba([[2.0, 5.0]]), 0.5)


def test_rows_of_any_length_point_the_same_way_for_the_cosine():
    x, y, _ = shots()
    head = NearestMean(metric="cosine").fit(x, y)
    np.testing.assert_allclose(head.logits(7 * x), head.logits(x))
    np.testing.assert_allclose(head.logits(x), 100 * x @ unit(head.means_).T)


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(NearestMean())
