"""LP++ against loops in double precision, the checkable facts of its card, and the step that is kept."""

from itertools import islice

import numpy as np
import pytest
from few_shots import assert_sklearn_accepts, calibrated, nll, shots, softmax

from clipworks.errors import ClipworksError
from clipworks.heads.common import fold_numbers
from clipworks.heads.descent import single
from clipworks.heads.lp_plus_plus import LPPlusPlus, descent


def oracle(x, y, words, steps):
    """Weights, intercepts and weights of the words after that many steps; the start is among them."""
    n, c = len(x), len(words)
    s, target = x @ words.T, np.eye(len(words))[y]
    w = np.stack([x[y == k].sum(0) for k in range(c)])
    a = np.full(c, 250 * np.mean([s[y == k, k].mean() for k in range(c)]))
    b, v, u = np.zeros(c), 0.0, 0.0
    rate_w = 4 * n / np.linalg.svd(x, compute_uv=False)[0] ** 2
    rate_a = n / (4 * max((s[:, k] ** 2).sum() for k in range(c)))
    path = [(w, b, a)]
    for step in range(1, steps + 1):
        p = (softmax(x @ w.T + b + a * s) - target) / n
        v, u = 0.9 * v + p.T @ x, 0.9 * u + p.sum(0)
        w, b = w - rate_w * v, b - rate_w * u
        if step % 10 == 0:
            a = a - rate_a * (p * s).sum(0)
        path.append((w, b, a))
    return path


@pytest.mark.parametrize("per_class", [1, 8])  # fewer images than dimensions, and more
def test_steps_are_the_formula(per_class):
    x, y, words = shots(per_class=per_class, noise=1.5, word_noise=1.0)
    path = oracle(x, y, words, 30)
    for step, found in enumerate(islice(descent(x, y, 6, words), 31)):
        for ours, theirs in zip(found, path[step], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert per_class == 1 or not np.allclose(path[9][2], path[10][2])


def test_logits_are_probe_and_words_without_a_factor_of_100():
    x, y, words = shots(noise=1.5, word_noise=1.0)
    held = shots(noise=1.5, draw=1)[0]
    head = LPPlusPlus(text=words, steps=15).fit(3 * x, y)  # the length of rows beside words does not matter
    w, b, a = oracle(x, y, words, 15)[head.step_]
    np.testing.assert_allclose(head.logits(5 * held), held @ w.T + b + a * (held @ words.T), atol=2e-3)


def test_without_probe_and_with_equal_weights_it_is_zero_shot():
    """Card, fact 5."""
    x, y, words = shots(noise=1.6, word_noise=1.5)
    head = LPPlusPlus(text=words, steps=2).fit(x, y)
    head.coef_, head.intercept_, head.word_weights_ = 0 * head.coef_, 0 * head.intercept_, np.full(6, 3.0)
    np.testing.assert_array_equal(head.predict(x), (x @ words.T).argmax(1))


def test_half_the_step_without_momentum_never_raises_the_loss():
    """Card, fact 5: the curvature of the loss in W is at most lambda_max / (2 N)."""
    x, y, words = shots(noise=2.0, word_noise=1.5)
    rate = 2 * len(x) / np.linalg.eigvalsh(x.T @ x)[-1]
    s, target, w = 60 * x @ words.T, np.eye(6)[y], np.zeros((6, 24))
    losses = []
    for _ in range(200):
        losses.append(nll(x @ w.T + s, y))
        w = w - rate * (softmax(x @ w.T + s) - target).T @ x / len(x)
    assert np.diff(losses).max() < 0
    # the rate of the head is twice that, by its first step, which has no momentum yet
    probes = list(islice(descent(x, y, 6, words), 2))
    p = (softmax(probes[0].scores(*single(x, words)).double().numpy()) - target) / len(x)
    np.testing.assert_allclose(probes[0].w - probes[1].w, 2 * rate * p.T @ x, atol=1e-4)


def test_the_step_kept_is_the_likeliest_of_the_best_on_folds():
    x, y, words = shots(per_class=6, noise=2.0, word_noise=1.5, seed=1)
    fold = fold_numbers(y, np.arange(len(y)), 3)
    logits = np.zeros((41, len(y), 6))
    for k in range(3):
        rows, held = x[fold != k], x[fold == k]
        for step, (w, b, a) in enumerate(oracle(rows, y[fold != k], words, 40)):
            logits[step, fold == k] = held @ w.T + b + a * (held @ words.T)
    right = (logits.argmax(2) == y).sum(1)
    head = LPPlusPlus(text=words, steps=40, folds=3).fit(x, y)
    assert head.step_ == max(range(41), key=lambda step: (right[step], -calibrated(logits[step], y)))
    assert right.max() > max(right[0], right[-1])
    w, _, _ = oracle(x, y, words, head.step_)[-1]
    np.testing.assert_allclose(head.coef_, w, rtol=1e-4, atol=1e-4)


def test_one_shot_takes_all_steps_and_validation_images_choose():
    x, y, words = shots(per_class=1, noise=1.5)
    held, truth, _ = shots(noise=1.5, draw=1)
    assert LPPlusPlus(text=words, steps=25).fit(x, y).step_ == 25
    chosen = LPPlusPlus(text=words, steps=25).fit(x, y, validation=(held, truth))
    scores = [
        ((held @ w.T + b + a * (held @ words.T)).argmax(1) == truth).mean() for w, b, a in oracle(x, y, words, 25)
    ]
    assert chosen.step_ == int(np.argmax(scores))


def test_without_text_it_is_the_probe_alone_on_rows_as_they_are():
    x, y, _ = shots(noise=1.5)
    head = LPPlusPlus(steps=12).fit(2 * x, y)
    w, b, _ = oracle(2 * x, y, np.zeros((6, 24)) + 1e-9, 12)[head.step_]
    np.testing.assert_allclose(head.logits(2 * x), 2 * x @ w.T + b, atol=1e-3)
    assert head.word_weights_ is None


def test_it_learns_what_the_words_do_not_say():
    x, y, words = shots(per_class=10, noise=1.2, word_noise=1.5)
    held, truth, _ = shots(per_class=40, noise=1.2, word_noise=1.5, draw=1)
    head = LPPlusPlus(text=words, steps=100).fit(x, y)
    assert head.score(held, truth) > np.mean((held @ words.T).argmax(1) == truth) + 0.1
    assert nll(head.logits(held) / head.temperature_, truth) < nll(head.logits(held), truth)


def test_what_cannot_be_used_is_named():
    x, y, words = shots()
    for settings in ({"steps": -1}, {"folds": 1}):
        with pytest.raises(ClipworksError, match=next(iter(settings))):
            LPPlusPlus(text=words, **settings).fit(x, y)
    with pytest.raises(ClipworksError, match="a shot of every class"):
        LPPlusPlus(text=words).fit(x[y > 0], y[y > 0])


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(LPPlusPlus(steps=30, folds=2))
