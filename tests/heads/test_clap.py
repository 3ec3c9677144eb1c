"""CLAP against loops with numeric gradients, the checkable facts of its card, and the limits of its penalty."""

import numpy as np
import pytest
import torch
from few_shots import assert_sklearn_accepts, nll, shots, softmax, unit

from clipworks.errors import ClipworksError
from clipworks.heads.clap import CLAP, slope
from clipworks.heads.common import fit_temperature, fold_numbers


def loss(w, x, y, target, multipliers):
    """The objective by its definition."""
    logits = np.array([[100 * v @ p / np.linalg.norm(p) for p in w] for v in x])
    return nll(logits, y) + np.mean([m * ((p - t) ** 2).sum() for m, p, t in zip(multipliers, w, target, strict=True)])


def gradient(w, x, y):
    """Of the cross-entropy, by autograd in double precision."""
    w = torch.tensor(w, requires_grad=True)
    logits = 100 * torch.tensor(x) @ torch.nn.functional.normalize(w).T
    return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.tensor(y)), w)[0].numpy()


def test_multipliers_are_the_mean_probability_of_the_true_class():
    x, y, words = shots(per_class=5, noise=1.5, word_noise=1.0)
    head = CLAP(text=words).fit(x, y)
    p = softmax(100 * x @ words.T)
    np.testing.assert_allclose(head.multipliers_, [p[y == c, c].mean() for c in range(6)], atol=1e-12)


def test_the_slope_is_that_of_the_cross_entropy():
    x, y, words = shots(noise=1.5)
    w = 3 * words + np.random.default_rng(0).normal(size=words.shape)
    found = slope(torch.tensor(w), torch.tensor(x), torch.tensor(y)).numpy()
    np.testing.assert_allclose(found, gradient(w, x, y), atol=1e-12)


def test_steps_are_the_formula():
    x, y, words = shots(per_class=4, noise=1.5, word_noise=1.0)
    head = CLAP(text=words, steps=25, penalty=2.0, length=5.0).fit(x, y)
    w = before = 5 * words
    k = 2.0 * head.multipliers_[:, None] / 6
    for step in range(25):
        rate = 0.1 * (1 + np.cos(np.pi * step / 25)) / 2
        free = w - rate * gradient(w, x, y) + 0.9 * (w - before)
        w, before = (free + 2 * rate * k * 5 * words) / (1 + 2 * rate * k), w
    np.testing.assert_allclose(head.prototypes_, w, atol=1e-3)
    np.testing.assert_allclose(head.logits(x), 100 * x @ unit(w).T, atol=1e-2)


def test_many_steps_end_where_the_whole_objective_is_flat():
    x, y, words = shots(per_class=4, noise=1.5, word_noise=1.0)
    head = CLAP(text=words, steps=1500, length=3.0).fit(x, y)
    args = x, y, 3 * words, head.multipliers_
    slopes = gradient(head.prototypes_, x, y)
    slopes += 2 * head.multipliers_[:, None] / 6 * (head.prototypes_ - 3 * words)
    assert np.abs(slopes).max() < 1e-3
    best, rng = loss(head.prototypes_, *args), np.random.default_rng(0)
    for _ in range(20):  # and is nowhere lower nearby
        assert loss(head.prototypes_ + 0.05 * rng.normal(size=words.shape), *args) > best


def test_at_the_start_and_under_a_huge_penalty_it_is_zero_shot():
    """Card, facts 3 and 4."""
    x, y, words = shots(noise=1.6, word_noise=1.5)
    held = shots(noise=1.6, draw=1)[0]
    for head in (CLAP(text=words, steps=0), CLAP(text=words, penalty=1e9)):
        np.testing.assert_allclose(head.fit(x, y).logits(held), 100 * held @ words.T, atol=1e-3)
    assert (CLAP(text=words).fit(x, y).logits(held).argmax(1) != (held @ words.T).argmax(1)).any()


def test_without_a_penalty_it_is_a_cosine_probe_and_with_more_it_stays_nearer():
    """Card, fact 4."""
    x, y, words = shots(noise=1.6, word_noise=1.5)
    away, fits = [], []
    for penalty in (0.0, 1.0, 30.0):
        head = CLAP(text=words, penalty=penalty).fit(x, y)
        away.append(np.linalg.norm(head.prototypes_ - 10 * words))
        fits.append(nll(head.logits(x), y))
    assert away[0] > away[1] > away[2] > 0
    assert fits[0] < fits[1] < fits[2] < nll(100 * x @ words.T, y)
    free, w, before = CLAP(text=words, penalty=0.0, steps=20).fit(x, y), 10 * words, 10 * words
    for step in range(20):
        moved = w - 0.05 * (1 + np.cos(np.pi * step / 20)) * gradient(w, x, y) + 0.9 * (w - before)
        w, before = moved, w
    np.testing.assert_allclose(free.prototypes_, w, atol=1e-3)


def test_a_class_that_its_word_describes_well_stays_nearer():
    x, y, words = shots(per_class=16, noise=0.5, word_noise=0.3)
    words[0] = unit(words[0] + 1.2 * words[1])  # a poor word
    head = CLAP(text=words, steps=600).fit(x, y)
    away = np.linalg.norm(head.prototypes_ - 10 * words, axis=1)
    assert head.multipliers_.argmin() == away.argmax()


def test_the_length_of_the_words_scales_step_and_penalty():
    x, y, words = shots(per_class=4, noise=1.5, word_noise=1.0)
    one = CLAP(text=words, length=10.0, lr=0.1, penalty=1.0, steps=60).fit(x, y)
    two = CLAP(text=words, length=5.0, lr=0.025, penalty=4.0, steps=60).fit(x, y)
    np.testing.assert_allclose(one.prototypes_, 2 * two.prototypes_, atol=1e-3)


def test_the_temperature_comes_from_folds_and_poor_words_are_repaired():
    x, y, words = shots(per_class=10, noise=1.2, word_noise=1.5)
    held, truth, _ = shots(per_class=40, noise=1.2, word_noise=1.5, draw=1)
    head = CLAP(text=words).fit(x, y)
    assert head.score(held, truth) > np.mean((held @ words.T).argmax(1) == truth) + 0.1
    fold = fold_numbers(y, np.arange(len(y)), 5)
    logits = [CLAP(text=words).fit(x[fold != k], y[fold != k]).logits(x[fold == k]) for k in range(5)]
    order = np.concatenate([y[fold == k] for k in range(5)])
    assert head.temperature_ == pytest.approx(fit_temperature(np.concatenate(logits), order), rel=1e-4)


def test_without_text_class_means_stand_in_its_place():
    x, y, _ = shots(per_class=6, noise=1.2)
    means = unit(np.stack([x[y == c].mean(0) for c in range(6)]))
    np.testing.assert_allclose(CLAP().fit(x, y).logits(x), CLAP(text=means).fit(x, y).logits(x), atol=1e-3)


def test_what_cannot_be_used_is_named():
    x, y, words = shots()
    for settings in ({"penalty": -1}, {"length": 0}, {"lr": -0.1}, {"steps": -1}, {"folds": 1}):
        with pytest.raises(ClipworksError, match=next(iter(settings))):
            CLAP(text=words, **settings).fit(x, y)
    with pytest.raises(ClipworksError, match="a shot of every class"):
        CLAP(text=words).fit(x[y > 0], y[y > 0])


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(CLAP(steps=30, folds=2))
