"""Few-shot inspection against scikit-learn, loops, and the checkable facts of its card."""

import numpy as np
import pytest
from few_shots import assert_sklearn_accepts, nll, shots, softmax, unit
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from clipworks.errors import ClipworksError
from clipworks.heads.common import ALPHAS
from clipworks.heads.few_shot_inspection import FewShotInspection
from clipworks.metrics.conformal import conformal_quantile


def oracle(x, y, held):
    """Largest cosine per class, by loops."""
    return np.array([[max(unit(v) @ unit(w) for w in x[y == c]) for c in np.unique(y)] for v in held])


def test_scores_are_the_largest_cosines_and_predictions_scikit_learns():
    """Card, fact 1."""
    x, y, _ = shots(noise=1.5)
    x = x * np.random.default_rng(0).uniform(0.5, 2, (len(x), 1))  # lengths do not matter
    held = shots(noise=1.5, draw=1)[0]
    head = FewShotInspection().fit(x, y)
    np.testing.assert_allclose(head.logits(held), oracle(x, y, held), atol=1e-12)
    neighbour = KNeighborsClassifier(1, metric="cosine").fit(x, y)
    np.testing.assert_array_equal(head.predict(held), neighbour.predict(held))


def test_the_nearest_stored_images_are_named():
    x, y, _ = shots(noise=1.5)
    held = shots(noise=1.5, draw=1)[0]
    rows, similarity = FewShotInspection().fit(x, y).nearest(held)
    assert (y[rows] == np.arange(6)).all()
    np.testing.assert_allclose((x[rows] * held[:, None]).sum(2), similarity)
    np.testing.assert_allclose(similarity, oracle(x, y, held))


def test_a_stored_image_gets_its_own_label():
    """Card, fact 2."""
    x, y, _ = shots(noise=3.0)
    head = FewShotInspection().fit(x, y)
    np.testing.assert_array_equal(head.predict(x), y)
    np.testing.assert_allclose(head.logits(x).max(1), 1)


def test_probabilities_of_two_classes_keep_within_their_bounds():
    """Card, fact 3: softmax of two cosines."""
    x, y, _ = shots(classes=2, noise=2.0)
    held = shots(classes=2, noise=2.0, draw=1)[0]
    head = FewShotInspection().fit(x, y)
    p, s = head.predict_proba(held), oracle(x, y, held)
    np.testing.assert_allclose(p[:, 1], expit(s[:, 1] - s[:, 0]))
    np.testing.assert_array_equal(p[:, 1] > 0.5, head.predict(held) == 1)
    apart = FewShotInspection().fit(np.array([[1.0, 0], [-1, 0]]), [0, 1]).predict_proba([[1.0, 0]])
    np.testing.assert_allclose(apart, [[0.8808, 0.1192]], atol=1e-4)


def test_order_and_copies_do_not_matter_and_more_images_only_raise():
    """Card, fact 4."""
    x, y, _ = shots(noise=1.5)
    held = shots(noise=1.5, draw=1)[0]
    plain = FewShotInspection().fit(x, y).logits(held)
    twice = np.tile(np.random.default_rng(0).permutation(len(x)), 2)
    np.testing.assert_allclose(FewShotInspection().fit(x[twice], y[twice]).logits(held), plain, atol=1e-12)
    more, of = shots(noise=1.5, draw=2)[:2]
    rise = FewShotInspection().fit(np.concatenate([x, more]), np.concatenate([y, of])).logits(held) - plain
    assert rise.min() > -1e-12
    assert rise.max() > 0.01


def test_the_area_under_the_curve_does_not_depend_on_the_temperature():
    """Card, fact 5."""
    x, y, _ = shots(classes=2, per_class=20, noise=2.5, dim=8)
    held, own, _ = shots(classes=2, per_class=20, noise=2.5, dim=8, draw=1)
    areas = [roc_auc_score(own, FewShotInspection(temperature=t).fit(x, y).predict_proba(held)[:, 1])
             for t in (0.05, 1.0, 20.0)]  # fmt: skip
    assert areas[0] == pytest.approx(areas[1], abs=1e-12) == areas[2]
    assert 0.5 < areas[0] < 1


@pytest.mark.parametrize("per_class", [False, True])
def test_prediction_sets_hold_the_true_class_as_often_as_promised(per_class):
    """Card, fact 6."""
    n, rate, hits = 19, 0.2, []
    for draw in range(300):
        x, y, _ = shots(classes=2, per_class=5, noise=2.5, dim=8, seed=draw)
        held, own, _ = shots(classes=2, per_class=n + 5, noise=2.5, dim=8, seed=draw, draw=1)
        rows = np.concatenate([np.flatnonzero(own == c)[:n] for c in (0, 1)])
        rest = np.setdiff1d(np.arange(len(own)), rows)
        found = FewShotInspection().fit(x, y).sets(held[rows], own[rows], new=held[rest], rate=rate,
                                                   per_class=per_class)  # fmt: skip
        hits.append([found[own[rest] == c, c].mean() for c in (0, 1)])
    covered, error = np.mean(hits), np.std(np.mean(hits, 1)) / len(hits) ** 0.5
    counted = n if per_class else 2 * n
    assert 1 - rate - 3 * error < covered < 1 - rate + 1 / (counted + 1) + 3 * error
    x, y, _ = shots(classes=2)
    full = FewShotInspection().fit(x, y).sets(x, y, new=x, rate=0.9 / (len(y) + 1))
    assert full.all()


def test_the_quantile_is_that_of_the_card():
    values = np.random.default_rng(0).permutation(np.arange(1, 20)) / 20.0
    assert conformal_quantile(values, 0.1) == 18 / 20  # ceil(0.9 * 20) = 18
    assert conformal_quantile(values, 0.05) == 19 / 20
    assert conformal_quantile(values, 0.049) == np.inf


def test_blobs_apart_are_told_apart_until_something_they_share_drowns_them():
    """Card, fact 7: blobs at six deviations; then every image also shows the same large object."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 40)
    blobs = rng.normal(size=(2, 80, 16))
    blobs[:, :, 0] += np.where(y == 0, -3, 3) * 2
    shared = 60 * unit(rng.normal(size=16))
    noise = 0.05 * rng.normal(size=(2, 80, 16))  # of the encoder, the same on unit vectors of either scene
    plain, crowded = (unit(unit(blobs + extra) + noise) for extra in (0, shared))
    first, second = (FewShotInspection().fit(v[0], y).score(v[1], y) for v in (plain, crowded))
    assert first == 1
    assert second < 0.95


def test_weight_and_temperature_come_from_images_left_out():
    x, y, words = shots(per_class=5, noise=1.6, word_noise=1.5)
    groups = np.arange(len(y)) // 2  # some pairs are views of one image
    scores = np.array([[max(x[i] @ x[j] for j in np.flatnonzero(y == c) if (y[j], groups[j]) != (y[i], groups[i]))
                        for c in range(6)] for i in range(len(y))])  # fmt: skip
    zero = 100 * x @ words.T
    right = [np.mean((zero + 100 * a * scores).argmax(1) == y) for a in ALPHAS]
    head = FewShotInspection(text=words, temperature=None).fit(x, y, groups=groups)
    assert head.alpha_ == 100 * ALPHAS[int(np.argmax(right))]
    logits = zero + head.alpha_ * scores
    assert nll(logits / head.temperature_, y) <= min(nll(logits / t, y) for t in np.geomspace(0.01, 100, 400)) + 1e-6
    held = shots(noise=1.6, draw=1)[0]
    expected = softmax((100 * held @ words.T + head.alpha_ * oracle(x, y, held)) / head.temperature_)
    np.testing.assert_allclose(head.predict_proba(held), expected, atol=1e-9)


def test_the_protocol_has_temperature_1_whatever_is_left_out():
    x, y, _ = shots()
    assert FewShotInspection().fit(x, y).temperature_ == 1
    assert FewShotInspection(temperature=None).fit(x, y).temperature_ != 1


def test_what_cannot_be_used_is_named():
    x, y, _ = shots()
    head = FewShotInspection().fit(x, y)
    for call, message in (
        (lambda: FewShotInspection(temperature=0).fit(x, y), "temperature must lie in"),
        (lambda: head.sets(x, y, new=x, rate=2), "rate must lie in"),
        (lambda: head.sets(x, y[:-1], new=x), "one label per row"),
        (lambda: head.sets(x, y + 1, new=x), "labels of the 6 classes"),
    ):
        with pytest.raises(ClipworksError, match=message):
            call()


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(FewShotInspection())
