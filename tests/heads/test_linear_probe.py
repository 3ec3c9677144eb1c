"""The linear probe against scikit-learn's LogisticRegression, the conditions of its minimum, and its limits."""

import numpy as np
import pytest
from few_shots import assert_equal_say, assert_sklearn_accepts, shots, softmax
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

from clipworks.errors import ClipworksError
from clipworks.heads.common import Choice, fit_temperature, fold_numbers
from clipworks.heads.linear_probe import GRID, LinearProbe, search
from clipworks.heads.regression import Regression


def objective(coef, intercept, x, y, c):
    logits = x @ coef.T + intercept
    return c * np.sum(logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]) + np.sum(coef**2) / 2


@pytest.mark.parametrize("per_class", [2, 12])  # fewer rows than columns, and more
@pytest.mark.parametrize("c", [1e-3, 1.0, 30.0])
def test_equals_scikit_learn(per_class, c):
    x, y, _ = shots(per_class=per_class, noise=1.5)
    ours = LinearProbe(C=c, tol=1e-9).fit(x, y)
    theirs = LogisticRegression(C=c, tol=1e-9, max_iter=5000).fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)
    free = theirs.intercept_ - theirs.intercept_.mean()  # a number added to all intercepts changes nothing
    np.testing.assert_allclose(ours.intercept_ - ours.intercept_.mean(), free, atol=1e-5)


@pytest.mark.parametrize("c", [0.1, 100.0])
def test_the_gradient_is_zero_at_the_minimum(c):
    x, y, _ = shots(noise=2.0)
    head = LinearProbe(C=c, tol=1e-10, max_iter=5000).fit(x, y)
    off = softmax(x @ head.coef_.T + head.intercept_) - np.eye(6)[y]
    np.testing.assert_allclose(c * off.T @ x + head.coef_, 0, atol=1e-5 * c)
    np.testing.assert_allclose(off.sum(0), 0, atol=1e-5)


def test_two_classes_are_scikit_learns_two_classes_at_twice_the_c():
    """Softmax has two rows where the logistic function has one: their squares add up to half of its square."""
    x, y, _ = shots(classes=2, noise=1.5)
    ours = LinearProbe(C=1.0, tol=1e-9).fit(x, y)
    theirs = LogisticRegression(C=2.0, tol=1e-9, max_iter=5000).fit(x, y)
    np.testing.assert_allclose(ours.coef_[1] - ours.coef_[0], theirs.coef_[0], atol=1e-5)


def test_default_tolerance_is_near_the_minimum():
    x, y, _ = shots(per_class=16, noise=2.0)
    loose, tight = (LinearProbe(C=10.0, tol=tol).fit(x, y) for tol in (1e-4, 1e-9))
    low = objective(tight.coef_, tight.intercept_, x, y, 10.0)
    assert low <= objective(loose.coef_, loose.intercept_, x, y, 10.0) <= low * (1 + 1e-3)


def test_weights_of_rows_are_repetitions():
    x, y, _ = shots(per_class=3, noise=1.5)
    weight = np.random.default_rng(0).integers(1, 4, len(y))
    one = Regression(x, y, 6, weight.astype(float)).fit(3.0, 1000, 1e-9)
    two = Regression(np.repeat(x, weight, 0), np.repeat(y, weight), 6).fit(3.0, 1000, 1e-9)
    np.testing.assert_allclose(one[0], two[0], atol=1e-5)


def test_the_minimum_does_not_depend_on_the_penalties_before_it():
    """What was learned of the curvature at other C is used, without the penalty that belonged to it."""
    x, y, _ = shots(noise=1.5)
    straight, round_about = Regression(x, y, 6), Regression(x, y, 6)
    rounds = [round_about.solve(c, 1000, 1e-5, 0.0)[1] for c in (1e-2, 1.0, 100.0, 30.0)]
    assert min(rounds) > 0
    assert len(round_about.moves) > 3
    for one, two in zip(straight.fit(3.0, 1000, 1e-9)[:2], round_about.fit(3.0, 1000, 1e-9)[:2], strict=True):
        np.testing.assert_allclose(one - one.mean(0), two - two.mean(0), atol=1e-5)


def test_limits_of_the_penalty():
    x, y, _ = shots()
    strong = LinearProbe(C=1e-9).fit(x, y)
    assert abs(strong.coef_).max() < 1e-6
    np.testing.assert_allclose(softmax(x @ strong.coef_.T + strong.intercept_), 1 / 6, atol=1e-6)
    assert LinearProbe(C=1e6).fit(x, y).score(x, y) == 1


def test_c_is_among_the_best_on_images_left_out():
    """Fits again with scikit-learn on the same folds: the accuracy of the C taken is within one image of the best."""
    x, y, _ = shots(per_class=6, noise=1.8)
    fold = fold_numbers(y, np.arange(len(y)), 3)

    def right(c):
        parts = [LogisticRegression(C=c, max_iter=5000, tol=1e-6).fit(x[fold != k], y[fold != k]) for k in range(3)]
        return sum((parts[k].predict(x[fold == k]) == y[fold == k]).sum() for k in range(3))

    found = LinearProbe(folds=3).fit(x, y)
    assert right(found.C_) >= max(right(c) for c in GRID) - 1
    assert found.C_ in GRID


class Scripted:
    """Stands for a regression: so many of 100 held-out images are right at each C, and the loss per image is given."""

    classes = 100
    at, moves = None, ()

    def __init__(self, right, value):
        self.right, self.values, self.seen = right, value, []

    def start(self, at, moves):
        self.at, self.moves = at, moves

    def step(self, c, held):
        self.seen.append(c)
        self.at = np.full((2, 2), c)
        self.value = self.values[len(self.seen) - 1]
        return np.where(np.arange(100)[:, None] < self.right[len(self.seen) - 1], [1.0, 0.0], [0.0, 1.0])


def test_the_search_goes_on_while_strong_penalties_waver_and_ends_once_the_shots_are_fitted():
    """Accuracies like Caltech-101's with four shots: the direction of the class means wavers until the fit begins."""

    def searched(*parts):
        choice, whole = Choice(np.zeros(100 * len(parts), int), None, (1.0,)), Scripted([], [])
        search(choice, whole, [(part, None) for part in parts], None)
        assert (whole.at == choice.setting).all()  # the last fit starts from the best of them
        return choice.setting

    rising = Scripted([68, 67, 69, 74, 75, 90], [4.605, 4.587, 3.08, 0.9, 0.3, 0.02])
    assert (searched(rising), rising.seen) == (GRID[4], list(GRID[:5]))
    falling = Scripted([68, 69, 75, 74, 73, 80], [2.0, 1.5, 1.0, 0.6, 0.1, 0.1])
    assert (searched(falling), falling.seen) == (GRID[2], list(GRID[:5]))
    never = Scripted([60] * len(GRID), [2.0] * len(GRID))
    assert (searched(never), never.seen) == (GRID[0], list(GRID))
    early, late = (Scripted([60, 70, 70, 70, 70], [2.0, *values]) for values in ([0.1] * 4, [1.0, 0.6, 0.4, 0.1]))
    assert (searched(early, late), late.seen) == (GRID[1], list(GRID[:4]))


def test_validation_images_choose_instead_and_set_the_temperature():
    x, y, words = shots(per_class=4, noise=1.6)
    xv, yv, _ = shots(per_class=10, noise=1.6, draw=1)
    head = LinearProbe(text=words, alpha=0.5, C=5.0, tol=1e-8).fit(x, y, validation=(xv, yv))
    assert head.temperature_ == pytest.approx(fit_temperature(head.logits(xv), yv), rel=0.05)  # chosen in float32
    theirs = LogisticRegression(C=5.0, tol=1e-9, max_iter=5000).fit(x, y)
    logits = 100 * xv @ words.T + 0.5 * (xv @ theirs.coef_.T + theirs.intercept_ - theirs.intercept_.mean())
    centred = head.logits(xv) - 0.5 * head.intercept_.mean()
    np.testing.assert_allclose(centred, logits, atol=1e-4)


def test_alpha_zero_is_zero_shot_and_one_shot_takes_the_defaults():
    x, y, words = shots(per_class=1)
    np.testing.assert_allclose(LinearProbe(text=words, alpha=0.0).fit(x, y).logits(x), 100 * x @ words.T, atol=1e-9)
    head = LinearProbe(text=words).fit(x, y)
    assert (head.C_, head.temperature_) == (100.0, 1.0)
    assert_equal_say(head, x, words)


def test_settings_out_of_range_are_named():
    x, y, _ = shots()
    for settings in (dict(C=0.0), dict(folds=1)):
        with pytest.raises(ClipworksError, match=next(iter(settings))):
            LinearProbe(**settings).fit(x, y)


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(LinearProbe())
