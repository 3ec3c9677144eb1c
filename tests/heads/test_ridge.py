"""Ridge against the normal equations, scikit-learn's Ridge, and images left out by fitting again without them."""

import numpy as np
import pytest
from few_shots import assert_equal_say, assert_sklearn_accepts, shots
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV

from clipworks.errors import ClipworksError
from clipworks.heads.common import ALPHAS, fit_temperature
from clipworks.heads.ridge import STRENGTHS, Path, Ridge


def oracle(x, y, strength, classes):
    """Weights (C, dim) and intercepts from the normal equations with a column of ones that carries no penalty."""
    wide = np.column_stack([x, np.ones(len(x))])
    penalty = strength * np.eye(wide.shape[1])
    penalty[-1, -1] = 0
    solved = np.linalg.solve(wide.T @ wide + penalty, wide.T @ np.eye(classes)[y])
    return solved[:-1].T, solved[-1]


def left_out(x, y, image, strength, classes):
    scores = np.empty((len(x), classes))
    for k in np.unique(image):
        weights, intercept = oracle(x[image != k], y[image != k], strength, classes)
        scores[image == k] = x[image == k] @ weights.T + intercept
    return scores


@pytest.mark.parametrize("per_class", [1, 3, 20])  # fewer rows than columns, and more
@pytest.mark.parametrize("strength", [1e-3, 1.0, 300.0])
def test_weights_are_those_of_the_normal_equations_and_of_scikit_learn(per_class, strength):
    x, y, _ = shots(per_class=per_class)
    head = Ridge(strength=strength).fit(x, y)
    weights, intercept = oracle(x, y, strength, 6)
    np.testing.assert_allclose(head.coef_, weights, atol=1e-9)
    np.testing.assert_allclose(head.intercept_, intercept, atol=1e-9)
    theirs = SklearnRidge(alpha=strength).fit(x, np.eye(6)[y])
    np.testing.assert_allclose(head.coef_, theirs.coef_, atol=1e-9)
    held = shots(per_class=9, draw=1)[0]
    np.testing.assert_array_equal(head.predict(held), RidgeClassifier(alpha=strength).fit(x, y).predict(held))


@pytest.mark.parametrize("per_class", [4, 12])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("strength", [1e-3, 0.1, 30.0])
def test_what_is_left_out_equals_fitting_again_without_it(per_class, views, strength):
    x, y, _ = shots(per_class=per_class)
    image = np.empty(len(y), int)
    for c in range(6):
        image[y == c] = 100 * c + np.arange(per_class) // views
    head = Ridge()
    path = Path.of(head._open(x, y, groups=image))
    np.testing.assert_allclose(path.left_out(strength), left_out(x, y, image, strength, 6), atol=1e-8)


def test_strength_weight_and_temperature_are_the_best_on_images_left_out():
    x, y, words = shots(per_class=5, noise=1.6, word_noise=1.6)
    zero = 100 * x @ words.T
    best = (-1.0, None)
    for strength in sorted(STRENGTHS, reverse=True):
        scores = left_out(x, y, np.arange(len(y)), strength, 6)
        for alpha in 100 * np.array(ALPHAS):
            logits = zero + alpha * scores
            if np.mean(logits.argmax(1) == y) > best[0]:
                best = (np.mean(logits.argmax(1) == y), strength, alpha, logits)
    head = Ridge(text=words).fit(x, y)
    assert (head.strength_, head.alpha_) == best[1:3]
    assert head.temperature_ == pytest.approx(fit_temperature(best[3], y), rel=1e-5)


def test_leaving_out_gives_scikit_learns_accuracy_for_every_strength():
    x, y, _ = shots(per_class=6, noise=1.8)
    theirs = RidgeClassifierCV(alphas=STRENGTHS, store_cv_results=True, scoring=None).fit(x, y)
    path = Path.of(Ridge()._open(x, y))
    for k, strength in enumerate(STRENGTHS):  # its targets are -1 and 1, its results squared errors
        ours = 4 * (path.left_out(strength) - np.eye(6)[y]) ** 2
        np.testing.assert_allclose(ours, theirs.cv_results_[..., k], atol=1e-8)


def test_validation_images_choose_instead():
    x, y, _ = shots(per_class=3, noise=1.5)
    xv, yv, _ = shots(per_class=10, noise=1.5, draw=1)
    right = []
    grid = sorted(STRENGTHS, reverse=True)
    for strength in grid:
        weights, intercept = oracle(x, y, strength, 6)
        right.append(np.mean((xv @ weights.T + intercept).argmax(1) == yv))
    assert len(set(right)) > 1
    assert Ridge().fit(x, y, validation=(xv, yv)).strength_ == grid[int(np.argmax(right))]


def test_limits_of_the_strength():
    x, y, _ = shots(per_class=2, dim=40)
    np.testing.assert_allclose(Ridge(strength=1e-8).fit(x, y).logits(x), np.eye(6)[y], atol=1e-6)  # passes through
    strong = Ridge(strength=1e9).fit(x, y)
    np.testing.assert_allclose(strong.logits(x), 1 / 6, atol=1e-6)  # nothing but the share of each class
    means = np.stack([x[y == c].mean(0) for c in range(6)]) - x.mean(0)
    np.testing.assert_allclose(1e9 * strong.coef_, 2 * means, atol=1e-6)


def test_poor_words_do_not_hold_the_regression_back():
    x, y, _ = shots(per_class=12)
    wrong = np.roll(shots()[2], 1, axis=0)
    assert Ridge(text=wrong).fit(x, y).score(x, y) > 0.95


def test_alpha_zero_is_zero_shot():
    x, y, words = shots()
    np.testing.assert_allclose(Ridge(text=words, alpha=0.0).fit(x, y).logits(x), 100 * x @ words.T, atol=1e-9)


def test_shots_can_be_shuffled():
    x, y, words = shots(noise=1.5)
    order = np.random.default_rng(0).permutation(len(y))
    one, two = Ridge(text=words).fit(x, y), Ridge(text=words).fit(x[order], y[order])
    np.testing.assert_allclose(one.predict_proba(x), two.predict_proba(x), atol=1e-8)


def test_one_shot_of_each_class():
    x, y, words = shots(per_class=1)
    head = Ridge(text=words).fit(x, y)
    assert (head.strength_, head.temperature_) == (1.0, 1.0)
    assert_equal_say(head, x, words)
    assert head.score(x, y) == 1


def test_penalties_must_be_positive():
    x, y, _ = shots()
    for settings in (dict(strength=0.0), dict(strengths=(1.0, -1.0)), dict(strengths=())):
        with pytest.raises(ClipworksError, match="strength"):
            Ridge(**settings).fit(x, y)


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(Ridge())
