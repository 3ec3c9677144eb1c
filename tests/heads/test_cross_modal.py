"""The cross-modal probe against scikit-learn with sample weights, the conditions of its minimum, and its reductions."""

import numpy as np
import pytest
from few_shots import assert_sklearn_accepts, shots, softmax
from sklearn.linear_model import LogisticRegression

from clipworks.errors import ClipworksError
from clipworks.heads.common import fold_numbers
from clipworks.heads.cross_modal import CrossModalProbe
from clipworks.heads.linear_probe import GRID, LinearProbe


def oracle(x, y, words, share, c):
    """scikit-learn on both modalities, each word weighing share * N / C."""
    weight = np.append(np.ones(len(x)), np.full(len(words), share * len(x) / len(words)))
    rows, labels = np.concatenate([x, words]), np.append(y, np.arange(len(words)))
    return LogisticRegression(C=c, tol=1e-9, max_iter=5000).fit(rows, labels, sample_weight=weight)


@pytest.mark.parametrize("share", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("per_class", [1, 10])
def test_equals_scikit_learn_with_weights(share, per_class):
    x, y, words = shots(per_class=per_class, noise=1.5)
    ours = CrossModalProbe(text=words, C=5.0, share=share, tol=1e-9).fit(x, y)
    theirs = oracle(x, y, words, share, 5.0)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=2e-5)
    free = theirs.intercept_ - theirs.intercept_.mean()
    np.testing.assert_allclose(ours.intercept_ - ours.intercept_.mean(), free, atol=2e-5)


def test_the_gradient_of_both_parts_is_zero_at_the_minimum():
    x, y, words = shots(noise=2.0)
    head = CrossModalProbe(text=words, C=20.0, share=2.0, tol=1e-10, max_iter=5000).fit(x, y)

    def off(rows, labels):
        return softmax(rows @ head.coef_.T + head.intercept_) - np.eye(6)[labels]

    image, word = off(x, y), off(words, np.arange(6)) * 2.0 * 48 / 6
    np.testing.assert_allclose(20 * (image.T @ x + word.T @ words) + head.coef_, 0, atol=1e-4)


def test_without_words_it_is_the_linear_probe():
    x, y, words = shots(noise=1.5)
    plain = LinearProbe().fit(x, y)
    for head in (CrossModalProbe(), CrossModalProbe(text=words, share=0.0)):
        head.fit(x, y)
        assert head.C_ == plain.C_
        np.testing.assert_allclose(head.predict_proba(x), plain.predict_proba(x), atol=1e-6)


def test_words_alone_decide_where_their_share_is_large():
    x, y, words = shots(noise=2.0, word_noise=1.0)
    head = CrossModalProbe(text=words, C=1e-4, share=1e6, tol=1e-9).fit(x, y)
    means = LogisticRegression(C=1e-4 * 1e6 * 8, tol=1e-9, max_iter=5000).fit(words, np.arange(6))
    np.testing.assert_array_equal(head.predict(x), means.predict(x))


def test_a_class_without_shots_is_learned_from_its_word():
    x, y, words = shots(per_class=10, noise=0.8)
    known = y < 4
    head = CrossModalProbe(text=words).fit(x[known], y[known])
    assert head.classes_.tolist() == list(range(6))
    assert head.score(x[~known], y[~known]) > 0.5
    assert head.score(x[known], y[known]) > 0.9
    rows, labels = np.concatenate([x[known], words]), np.append(y[known], np.arange(6))
    weight = np.append(np.ones(40), [40 / 6] * 4 + [40 / 6 + 10] * 2)  # two words stand for the ten shots they lack
    theirs = LogisticRegression(C=2.0, tol=1e-9, max_iter=5000).fit(rows, labels, sample_weight=weight)
    ours = CrossModalProbe(text=words, C=2.0, tol=1e-9).fit(x[known], y[known])
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=2e-5)


def test_c_is_among_the_best_with_only_images_left_out():
    x, y, words = shots(per_class=6, noise=1.8, word_noise=1.2)
    fold = fold_numbers(y, np.arange(len(y)), 3)

    def right(c):
        found = 0
        for k in range(3):
            train = fold != k
            # words weigh what they weigh beside all shots, in every fold
            fitted = oracle(x[train], y[train], words, len(x) / train.sum(), c)
            found += (fitted.predict(x[~train]) == y[~train]).sum()
        return found

    found = CrossModalProbe(text=words, folds=3).fit(x, y)
    assert right(found.C_) >= max(right(c) for c in GRID) - 1


def test_rows_of_any_length_are_brought_to_the_words():
    x, y, words = shots()
    one, two = CrossModalProbe(text=words).fit(x, y), CrossModalProbe(text=3 * words).fit(7 * x, y)
    np.testing.assert_allclose(one.predict_proba(x), two.predict_proba(0.1 * x), atol=1e-8)


def test_one_shot_takes_the_defaults_and_settings_out_of_range_are_named():
    x, y, words = shots(per_class=1)
    head = CrossModalProbe(text=words).fit(x, y)
    assert (head.C_, head.temperature_, head.score(x, y)) == (100.0, 1.0, 1.0)
    for settings in (dict(C=0.0), dict(folds=1), dict(share=-1.0)):
        with pytest.raises(ClipworksError, match=next(iter(settings))):
            CrossModalProbe(text=words, **settings).fit(x, y)


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(CrossModalProbe())
