"""The parts that all heads share: folds, labels and words, validation, temperature."""

import numpy as np
import pytest
import torch
from few_shots import nll, shots, unit
from scipy.optimize import minimize
from sklearn.model_selection import GridSearchCV, cross_val_score

from clipworks.errors import ClipworksError
from clipworks.heads.common import Choice, Head, Shots, class_words, fit_temperature, fold_numbers
from clipworks.heads.nearest_mean import NearestMean
from clipworks.types import Features


def test_temperature_is_the_minimum_of_a_generic_search():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 400)
    logits = rng.normal(size=(400, 5)) * 3 + 4 * (y[:, None] == np.arange(5))
    found = fit_temperature(logits, y)
    other = minimize(lambda v: nll(logits / np.exp(v[0]), y), [0.0], method="Nelder-Mead", options={"xatol": 1e-8})
    assert found == pytest.approx(np.exp(other.x[0]), rel=1e-3)
    assert nll(logits / found, y) <= nll(logits, y)


@pytest.mark.parametrize("factor", [1e-4, 0.1, 1.0, 50.0, 1e4])
def test_temperature_follows_the_scale_of_the_logits(factor):
    rng = np.random.default_rng(1)
    y = rng.integers(0, 4, 300)
    logits = rng.normal(size=(300, 4)) + (y[:, None] == np.arange(4))
    assert fit_temperature(factor * logits, y) == pytest.approx(factor * fit_temperature(logits, y), rel=1e-3)


def test_temperature_is_finite_where_everything_is_right_and_one_where_nothing_is_known():
    y = np.array([0, 1, 0, 1])
    right = np.where(y[:, None] == np.arange(2), 1.0, 0.0)
    assert 0 < fit_temperature(right, y) < 0.02
    assert fit_temperature(np.zeros((4, 2)), y) == 1.0
    assert fit_temperature(np.zeros((0, 2)), y[:0]) == 1.0


def test_calibrated_logits_have_temperature_one_and_no_calibration_error():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(100_000, 3)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = (rng.random(len(p))[:, None] > p.cumsum(1)).sum(1)
    t = fit_temperature(5 * logits, y)
    assert t == pytest.approx(5, rel=0.02)
    p = np.exp(5 * logits / t) / np.exp(5 * logits / t).sum(1, keepdims=True)
    bins = np.minimum((p.max(1) * 15).astype(int), 14)
    right = p.argmax(1) == y
    assert sum(abs(right[bins == b].sum() - p.max(1)[bins == b].sum()) for b in range(15)) / len(y) < 0.01


def test_folds_keep_views_together_and_every_class_in_training():
    rng = np.random.default_rng(3)
    image = np.repeat(np.arange(40), 3)
    y = np.sort(rng.integers(0, 7, 40))[image]
    order = rng.permutation(len(y))
    y, image = y[order], image[order]
    for folds in (2, 3, 5, 11):
        fold = fold_numbers(y, image, folds)
        for i in range(40):
            assert len(set(fold[image == i])) == 1
        for c in np.unique(y):
            mine = fold[y == c]
            assert (mine == -1).all() if len(set(image[y == c])) == 1 else len(set(mine)) > 1


def test_folds_are_even_and_two_shots_lose_one_class_at_a_time():
    y = np.repeat(np.arange(10), 5)
    assert (np.bincount(fold_numbers(y, np.arange(50), 5)) == 10).all()
    fold = fold_numbers(np.repeat(np.arange(10), 2), np.arange(20), 5)
    assert (np.bincount(fold) == 4).all()


def test_the_choice_is_the_most_accurate_and_the_first_among_equals():
    y = np.array([0, 1, 2, 0])
    right = np.eye(3)[y]
    half = np.where(np.arange(4)[:, None] < 2, right, -right)
    choice = Choice(y, None, (1.0,))
    for name, scores in (("a", half), ("b", right), ("c", 2 * right)):
        choice.offer(name, scores)
    assert (choice.setting, choice.accuracy) == ("b", 1.0)
    calm = 2 * right
    calm[3] = [0.0, 0.5, 0.0]  # wrong, but not sure of it
    sure = np.where(np.arange(4)[:, None] == 3, 20 * calm, calm)
    for offered in ((sure, calm), (calm, sure), (calm, 5 * calm)):  # each right in three of four
        choice = Choice(y, None, (1.0,))
        for scores in offered:
            assert choice.offer(id(scores), scores) == 0.75
        assert choice.setting == id(calm)
    wrong_words = Choice(y, -right, (0.1, 10.0))
    wrong_words.offer("b", right)
    assert (wrong_words.alpha, wrong_words.accuracy) == (10.0, 1.0)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0, 2, 1], [0, 1, 2]),
        ([0, 1], [0, 1, 2]),
        ([5, 9, 7], [5, 7, 9]),
        ([1, 2, 3], [1, 2, 3]),
        ([0, 2, 5], [0, 2, 5]),
    ],
)
def test_rows_of_a_matrix_of_words_belong_to_numbers_or_to_sorted_labels(labels, classes):
    words = unit(np.random.default_rng(0).normal(size=(3, 4)))
    found, vectors = class_words(words, np.array(labels), 4)
    assert found.tolist() == classes
    np.testing.assert_allclose(vectors, words)


def test_words_named_by_labels_may_come_in_any_order():
    x, y, words = shots()
    names = np.array(["f", "c", "a", "e", "b", "d"])
    text = Features(words[::-1].copy(), labels=names[::-1])
    head = NearestMean(text=text).fit(x, names[y])
    assert head.classes_.tolist() == sorted(names)
    assert head.predict(words).tolist() == names.tolist()
    np.testing.assert_allclose(head.text_, words[np.argsort(names)])


def test_features_carry_their_labels_and_must_be_of_one_encoder():
    x, y, words = shots()
    plain = NearestMean(text=words).fit(x, y)
    held = Features(x, labels=y, fingerprint="abc")
    head = NearestMean(text=Features(words, labels=np.arange(6), fingerprint="abc")).fit(held)
    np.testing.assert_array_equal(head.predict_proba(Features(x)), plain.predict_proba(x))
    np.testing.assert_array_equal(plain.predict_proba(torch.from_numpy(x)), plain.predict_proba(x))
    assert head.score(held) == plain.score(x, y)
    with pytest.raises(ClipworksError, match="text must come from the encoder of x, abc"):
        NearestMean(text=Features(words, labels=np.arange(6), fingerprint="xyz")).fit(held)


def test_scikit_learns_own_searches_run_on_a_head_with_words():
    x, y, words = shots()
    assert cross_val_score(NearestMean(text=words), x, y, cv=4).mean() > 0.9
    search = GridSearchCV(NearestMean(text=words), {"metric": ["euclidean", "cosine"], "alpha": [0.0, 1.0]}, cv=4)
    assert search.fit(x, y).best_score_ > 0.9


def test_half_precision_is_computed_in_double():
    x, y, words = shots()
    low = x.astype(np.float16)
    found = NearestMean(text=words).fit(low, y).logits(low)
    wide = low.astype(np.float64)
    np.testing.assert_array_equal(found, NearestMean(text=words).fit(wide, y).logits(wide))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(y=np.zeros(48, int)), "at least 2 classes. Got 1 class"),
        (dict(y=np.arange(48) % 5, text=np.eye(24)[:6]), "shot of every class of text. Got none of 5"),
        (dict(text=np.eye(24)[:4]), "text must have one row per class"),
        (dict(text=np.eye(23)[:6]), "text must have the 24 columns of x. Got 23"),
        (dict(text=np.full((6, 24), np.nan)), "text contains NaN"),
        (dict(y=np.array(list("abcdef") * 8), text=np.eye(24)[:6]), "text must be Features with labels"),
        (dict(y=np.array(["cat", "dgo"] * 24), text=Features(np.eye(24)[:2], labels=np.array(["cat", "dog"]))),
         "Got 'dgo'. Did you mean 'dog'"),
        (dict(text=Features(np.eye(24)[:2], labels=np.array(["cat", "cat"]))), "one row per class. Got 2 for 1"),
        (dict(x=np.zeros((1, 24)), y=[0]), "minimum of 2 is required"),
        (dict(alpha=-1.0), "alpha must lie in"),
        (dict(metric="cosin"), "Did you mean 'cosine'"),
        (dict(groups=[1, 2]), "groups must have one entry per row"),
        (dict(validation=np.zeros((3, 24))), "validation must be"),
        (dict(validation=(np.zeros((3, 24)), [1, 2])), "validation must have one label per row"),
        (dict(validation=(np.zeros((1, 24)), [77])),
         "validation must hold only labels of the 6 classes, numbers from 0 to 5. Got 77"),
        (dict(validation=(np.zeros((1, 3)), [1])), "3 features"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(change, message):
    x, y, _ = shots()
    settings = {k: change[k] for k in ("text", "alpha", "metric") if k in change}
    data = {k: change[k] for k in ("groups", "validation") if k in change}
    with pytest.raises(ClipworksError, match=message):
        NearestMean(**settings).fit(change.get("x", x), change.get("y", y), **data)


def test_scoring_needs_labels():
    x, y, _ = shots()
    with pytest.raises(ClipworksError, match="y must hold one label per row"):
        NearestMean().fit(x, y).score(x)
    for wrong in (y[:5], y[:, None]):  # a column would be compared with every row
        with pytest.raises(ClipworksError, match=r"y must hold one label per row \(48\)\. Got shape"):
            NearestMean().fit(x, y).score(x, wrong)


def test_a_head_must_say_what_it_scores_and_may_learn_nothing():
    with pytest.raises(TypeError, match="_scores"):
        Head()

    class Words(Head):
        def __init__(self, text=None, alpha=None):
            self.text, self.alpha = text, alpha

        def _scores(self, x):
            return np.zeros((len(x), len(self.classes_)))

    x, y, words = shots()
    head = Words(text=words).fit(x, y)
    assert (head.alpha_, head.temperature_) == (1.0, 1.0)
    np.testing.assert_allclose(head.logits(x), 100 * x @ words.T)


def test_held_images_are_those_of_validation_or_every_shot_that_is_not_the_only_one_of_its_class():
    x, y = np.arange(10.0).reshape(5, 2), np.array([0, 0, 1, 1, 2])
    held = Shots(x, y, 3, np.array([0, 1, 2, 2, 3])).held  # class 1: two views of one image
    np.testing.assert_array_equal(held[0], x[:2])
    np.testing.assert_array_equal(held[1], [0, 0])
    np.testing.assert_array_equal(Shots(x, y, 3, np.arange(5), validation=(x[4:], y[4:])).held[1], [2])
