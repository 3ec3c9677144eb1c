"""GDA against loops, scikit-learn's discriminant analysis, and the checkable facts of its card."""

import numpy as np
import pytest
import sklearn.discriminant_analysis as discriminant
from few_shots import assert_sklearn_accepts, shots, softmax
from scipy.special import logsumexp

from clipworks.errors import ClipworksError
from clipworks.heads.common import ALPHAS, fit_temperature, fold_numbers
from clipworks.heads.gda import GDA, precision, shrunk_from_rows
from clipworks.heads.nearest_mean import NearestMean


def oracle(x, y, classes, held, prior=None):
    """Scores (m, C): means, pooled scatter and shrunk precision by loops over images."""
    n, dim = x.shape
    means = np.stack([x[y == c].mean(0) for c in range(classes)])
    sigma = sum(np.outer(v - means[c], v - means[c]) for v, c in zip(x, y, strict=True)) / (n - 1)
    p = dim * np.linalg.inv((n - 1) * sigma + np.trace(sigma) * np.eye(dim))
    prior = np.full(classes, 1 / classes) if prior is None else prior
    return np.array([[p @ m @ v + np.log(q) - m @ p @ m / 2 for m, q in zip(means, prior, strict=True)] for v in held])


@pytest.mark.parametrize("per_class", [2, 10])  # fewer images than dimensions, and more
def test_scores_are_the_formula(per_class):
    x, y, _ = shots(per_class=per_class)
    held = shots(draw=1)[0]
    np.testing.assert_allclose(GDA().fit(x, y).logits(held), oracle(x, y, 6, held), atol=1e-9)


def test_shares_of_the_shots_as_prior():
    x, y, _ = shots(per_class=9)
    kept = (y > 1) | (np.arange(len(y)) % 3 == 0)
    x, y = x[kept], y[kept]
    scores = GDA(prior="shots").fit(x, y).logits(x)
    np.testing.assert_allclose(scores, oracle(x, y, 6, x, np.bincount(y) / len(y)), atol=1e-9)
    np.testing.assert_allclose(GDA().fit(x, y).logits(x), oracle(x, y, 6, x), atol=1e-9)


def test_equals_scikit_learn_with_this_covariance(monkeypatch):
    """Card, fact 1."""
    x, y, _ = shots(per_class=10, noise=1.5)
    head = GDA().fit(x, y)
    centred = x - head.means_[y]
    shrunk = (centred.T @ centred + np.trace(centred.T @ centred) / (len(x) - 1) * np.eye(24)) / 24
    monkeypatch.setattr(discriminant, "_class_cov", lambda *args, **kwargs: shrunk)
    lda = discriminant.LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(6, 1 / 6)).fit(x, y)
    np.testing.assert_allclose(head.coef_, lda.coef_, atol=1e-10)
    np.testing.assert_allclose(head.intercept_, lda.intercept_, atol=1e-10)


def test_unshrunk_equals_scikit_learns_pooled_covariance_up_to_its_factor():
    """Card, fact 2: with n images its covariance is Sigma * (n - 1) / n."""
    x, y, _ = shots(per_class=10)
    head = GDA(shrink=False).fit(x, y)
    lda = discriminant.LinearDiscriminantAnalysis(solver="lsqr").fit(x, y)
    np.testing.assert_allclose(head.coef_ * 60 / 59, lda.coef_, rtol=1e-7)


def test_alpha_from_zero_shot_to_discriminant_analysis():
    """Card, fact 3."""
    x, y, words = shots(noise=1.6, word_noise=1.5)
    held = shots(noise=1.6, draw=1)[0]
    np.testing.assert_allclose(GDA(text=words, alpha=0.0).fit(x, y).logits(held), 100 * held @ words.T, atol=1e-9)
    only = GDA(text=words, alpha=1e9).fit(x, y).predict(held)
    np.testing.assert_array_equal(only, GDA().fit(x, y).predict(held))


def test_one_vector_added_to_everything_changes_no_posterior():
    """Card, fact 4."""
    x, y, _ = shots()
    moved = np.random.default_rng(0).normal(size=24)
    one, two = GDA().fit(x, y).logits(x), GDA().fit(x + moved, y).logits(x + moved)
    np.testing.assert_allclose(softmax(one), softmax(two), atol=1e-9)


def test_one_shot_without_views_is_the_nearest_mean():
    """Card, facts 4 and 5: no scatter at all."""
    x, y, _ = shots(per_class=1)
    held = shots(draw=1)[0]
    head = GDA().fit(x, y)
    np.testing.assert_array_equal(head.predict(held), NearestMean().fit(x, y).predict(held))
    np.testing.assert_allclose(softmax(head.logits(held)), softmax(NearestMean().fit(x, y).logits(held) / 100))


@pytest.mark.parametrize("n", [2, 5, 60])
def test_the_precision_is_symmetric_and_positive(n):
    """Card, fact 6."""
    x = np.random.default_rng(0).normal(size=(n, 24))
    found = precision(x.T @ x / n, n)
    np.testing.assert_array_equal(found, found.T)
    assert np.linalg.eigvalsh(found)[0] > 0
    np.testing.assert_allclose(shrunk_from_rows(x), precision(x.T @ x / (n - 1), n), rtol=1e-7, atol=1e-10)


def test_two_round_classes_are_parted_by_the_perpendicular_bisector():
    """Card, fact 7."""
    corners = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    x = np.concatenate([corners, corners + np.array([4, 2])])
    head = GDA().fit(x, np.repeat([0, 1], 4))
    for along in (-3.0, 0.0, 5.0):  # (2, 1) is the middle, (-1, 2) the direction of the line
        np.testing.assert_allclose(np.diff(head.logits([[2 - along, 1 + 2 * along]])), 0, atol=1e-9)


def test_weight_and_temperature_come_from_folds():
    x, y, words = shots(per_class=5, noise=1.6, word_noise=1.5)
    fold = fold_numbers(y, np.arange(len(y)), 5)
    order = np.concatenate([np.flatnonzero(fold == k) for k in range(5)])
    scores = np.concatenate([oracle(x[fold != k], y[fold != k], 6, x[fold == k]) for k in range(5)])
    zero = 100 * x[order] @ words.T
    right = [np.mean((zero + a * scores).argmax(1) == y[order]) for a in ALPHAS]
    head = GDA(text=words).fit(x, y)
    assert head.alpha_ == ALPHAS[int(np.argmax(right))]
    assert head.temperature_ == pytest.approx(fit_temperature(zero + head.alpha_ * scores, y[order]), rel=1e-5)


def test_new_classes_from_words_and_base_images():
    x, y, words = shots(classes=6, per_class=20)
    head = GDA(text=words[:3]).fit(x[y < 3], y[y < 3])
    base, new = x[y < 3], words[3:]
    found = head.to_new(new, base, neighbours=10, copies=4)
    means, matrices = [], []
    for t in new:
        near = base[np.argsort(-(base @ t))[:10]]
        means.append((near.sum(0) + 4 * t) / 14)
        sigma = (near - t).T @ (near - t) / 9
        matrices.append(24 * np.linalg.inv(9 * sigma + np.trace(sigma) * np.eye(24)))
    p, held = np.mean(matrices, axis=0), x[y >= 3]
    scores = np.array([[p @ m @ v - np.log(3) - m @ p @ m / 2 for m in means] for v in held])
    np.testing.assert_allclose(found.logits(held), 100 * held @ new.T + head.alpha_ * scores, atol=1e-8)
    assert (found.alpha_, found.temperature_) == (head.alpha_, head.temperature_)
    assert found.score(held, y[y >= 3] - 3) > 0.8
    assert head.classes_.tolist() == [0, 1, 2]  # the base head stays what it was
    np.testing.assert_allclose(head.text_, words[:3])


def test_unlabelled_rounds_find_three_separate_clusters_from_many_wrong_labels():
    """Card, fact 8."""
    x, y, _ = shots(classes=3, per_class=60, noise=0.7)
    rng = np.random.default_rng(0)
    wrong = rng.random(len(y)) < 0.27
    start = np.eye(3)[np.where(wrong, (y + rng.integers(1, 3, len(y))) % 3, y)]
    head = GDA().fit_unlabelled(x, start=start, rounds=50)
    assert head.score(x, y) == 1


def test_the_likelihood_never_falls_with_the_unshrunk_covariance():
    """Card, fact 8: each round raises the likelihood of Gaussians with one covariance and even shares."""
    x, y, _ = shots(classes=3, per_class=40, dim=5, noise=1.0)
    share = np.random.default_rng(0).dirichlet(np.ones(3), len(x)) / 2 + np.eye(3)[y] / 2
    values = []
    for _ in range(8):
        head = GDA(shrink=False).fit_unlabelled(x, start=share, rounds=1)
        p = np.linalg.inv(sum(s[:, None, None] * np.einsum("ni,nj->nij", x - m, x - m)
                              for s, m in zip(share.T, head.means_, strict=True)).sum(0) / len(x))  # fmt: skip
        off = x[:, None] - head.means_
        inside = np.linalg.slogdet(p)[1] / 2 - np.einsum("nci,ij,ncj->nc", off, p, off) / 2
        values.append(logsumexp(inside, axis=1).sum())
        share = softmax(inside)
        np.testing.assert_allclose(softmax(head.logits(x)), share, atol=1e-6)
    assert np.diff(values).min() > -1e-8
    assert values[-1] > values[0] + 1


def test_unlabelled_images_help_poor_words():
    x, y, words = shots(per_class=60, noise=1.0, word_noise=1.0)
    zero = (x @ words.T).argmax(1)
    head = GDA(text=words).fit_unlabelled(x)
    assert head.alpha_ == 359 / 24
    assert head.score(x, y) > np.mean(zero == y)
    low = GDA(text=words, alpha=0.0).fit_unlabelled(x)
    np.testing.assert_array_equal(low.predict(x), zero)


def test_what_cannot_be_used_is_named():
    x, y, words = shots()
    for call, message in (
        (lambda: GDA(prior="shot").fit(x, y), "Did you mean 'shots'"),
        (lambda: GDA(folds=1).fit(x, y), "folds"),
        (lambda: GDA().fit_unlabelled(x), "text must be given"),
        (lambda: GDA(text=words).fit_unlabelled(x, start=np.ones((3, 3))), "start must hold shares"),
        (lambda: GDA(text=words).fit(x, y).to_new(words[:, :-1], x), "24 columns"),
    ):
        with pytest.raises(ClipworksError, match=message):
            call()


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(GDA())
