"""Nearest neighbours against sorting by loops, scikit-learn's KNeighborsClassifier, and their limits."""

import numpy as np
import pytest
from few_shots import assert_sklearn_accepts, calibrated, shots
from sklearn.neighbors import KNeighborsClassifier

from clipworks.errors import ClipworksError
from clipworks.heads import knn
from clipworks.heads.common import ALPHAS
from clipworks.heads.knn import KNN, NEIGHBOURS


def oracle(x, y, held, k, weights="uniform", classes=6):
    """Shares of votes (m, C) by loops, for unit rows."""
    scores = np.zeros((len(held), classes))
    for i, v in enumerate(held):
        for j in sorted(range(len(x)), key=lambda j: -(v @ x[j]))[:k]:
            scores[i, y[j]] += 1 if weights == "uniform" else np.exp(v @ x[j] / 0.07)
    return 100 * scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("k", [1, 4, 40])
@pytest.mark.parametrize("weights", ["uniform", "similarity"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_scores_are_the_formula(k, weights, metric):
    x, y, _ = shots(noise=1.5)
    held = shots(noise=1.5, draw=1)[0]
    head = KNN(k=k, weights=weights, metric=metric).fit(x, y)
    np.testing.assert_allclose(head.logits(held), oracle(x, y, held, k, weights), atol=1e-9)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [1, 5, 48])
def test_equals_scikit_learn_also_for_rows_of_any_length(metric, k):
    x, y, _ = shots(noise=1.5)
    lengths = np.random.default_rng(0).uniform(0.5, 2, (len(x), 1))
    held = shots(noise=1.5, draw=1)[0] * lengths
    ours = KNN(k=k, metric=metric).fit(lengths[::-1] * x, y)
    theirs = KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(lengths[::-1] * x, y)
    np.testing.assert_allclose(ours.logits(held) / 100, theirs.predict_proba(held))
    np.testing.assert_array_equal(ours.predict(held), theirs.predict(held))


@pytest.mark.parametrize("views", [1, 2])
def test_k_and_weight_come_from_images_left_out_with_all_their_views(views):
    x, y, words = shots(noise=1.8, word_noise=1.5)
    image = np.empty(len(y), int)
    for c in range(6):
        image[y == c] = 100 * c + np.arange(8) // views
    best, zero = (-1.0,), 100 * x @ words.T
    for k in (k for k in NEIGHBOURS if k < len(x)):
        scores = np.concatenate([
            oracle(x[image != image[i]], y[image != image[i]], x[i : i + 1], k) for i in range(len(x))
        ])  # fmt: skip
        for alpha in ALPHAS:
            logits = zero + alpha * scores
            best = max(best, (np.mean(logits.argmax(1) == y), -calibrated(logits, y), k, alpha))
    head = KNN(text=words).fit(x, y, groups=image)
    assert (head.k_, head.alpha_) == best[2:]


def test_all_shots_vote_the_share_of_their_class():
    x, y, _ = shots()
    keep = (y > 0) | (np.arange(len(y)) % 2 == 0)
    x, y = x[keep], y[keep]
    head = KNN(k=len(y)).fit(x, y)
    np.testing.assert_allclose(head.logits(x), np.tile(100 * np.bincount(y) / len(y), (len(x), 1)))


def test_chunks_change_nothing(monkeypatch):
    x, y, words = shots(noise=1.5)
    whole = KNN(text=words).fit(x, y)
    monkeypatch.setattr(knn, "CELLS", 5 * len(x))
    parts = KNN(text=words).fit(x, y)
    assert (parts.k_, parts.alpha_) == (whole.k_, whole.alpha_)
    np.testing.assert_allclose(parts.predict_proba(x), whole.predict_proba(x), atol=1e-9)


def test_nearest_is_a_stable_sort():
    near = np.random.default_rng(0).integers(0, 40, (30, 200)).astype(float)
    for k in (1, 7, 60, 200):
        found = np.take_along_axis(near, knn.nearest(near, k), 1)
        np.testing.assert_array_equal(found, -np.sort(-near, axis=1)[:, :k])


def test_limits_of_the_weight_and_one_shot():
    x, y, words = shots(noise=1.5, word_noise=1.5)
    np.testing.assert_allclose(KNN(text=words, alpha=0.0).fit(x, y).logits(x), 100 * x @ words.T, atol=1e-9)
    only = KNN(text=words, alpha=1e9, k=3).fit(x, y).logits(x).argmax(1)
    votes = oracle(x, y, x, 3)
    assert (votes[np.arange(len(x)), only] == votes.max(1)).all()
    x, y, _ = shots(per_class=1)
    head = KNN().fit(x, y)
    assert (head.k_, head.temperature_, head.score(x, y)) == (1, 1.0, 1.0)


def test_settings_out_of_range_are_named():
    x, y, _ = shots()
    for settings in (dict(k=0), dict(k=49), dict(metric="cosinus"), dict(weights="uniforme")):
        with pytest.raises(ClipworksError, match=next(iter(settings))):
            KNN(**settings).fit(x, y)


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(KNN())
