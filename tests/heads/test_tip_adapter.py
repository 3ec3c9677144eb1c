"""Tip-Adapter against loops over shots and over the grid, its training against AdamW by hand, and its card's facts."""

import numpy as np
import pytest
from few_shots import assert_equal_say, assert_sklearn_accepts, shots, softmax, unit

from clipworks.errors import ClipworksError
from clipworks.heads.common import fit_temperature, fold_numbers
from clipworks.heads.tip_adapter import BETAS, WEIGHTS, TipAdapter, count_right

GRID = dict(alphas=(0.0, 0.3, 1.0, 3.0, 10.0, 30.0), betas=(0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0))


def oracle(x, y, held, beta, classes=6):
    """Scores (m, C), vote by vote; no views."""
    scores = np.zeros((len(held), classes))
    for i, row in enumerate(unit(held)):
        for key, label in zip(unit(x), y, strict=True):
            scores[i, label] += np.exp(-beta * (1 - row @ key))
    return scores


def left_out(x, y, beta):
    """Each shot without itself, its class standing for as many votes as it has."""
    scores = np.empty((len(x), 6))
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        scores[i] = oracle(x[rest], y[rest], x[i : i + 1], beta)
        scores[i, y[i]] *= (y == y[i]).sum() / (y[rest] == y[i]).sum()
    return scores


def nested(grid, zero, scores_of, y):
    """The release's search: every pair computed anew, kept where it is better than all before."""
    best = (-1.0, None, None)
    for beta in grid["betas"]:
        scores = scores_of(beta)
        for alpha in grid["alphas"]:
            accuracy = np.mean((zero + alpha * scores).argmax(1) == y)
            if accuracy > best[0]:
                best = (accuracy, beta, alpha)
    return best


def test_logits_are_the_formula():
    x, y, words = shots(noise=1.5)
    held = shots(noise=1.5, draw=1)[0]
    head = TipAdapter(text=words, alpha=2.0, beta=3.0).fit(x, y)
    expected = 100 * held @ words.T + 2 * oracle(x, y, held, 3.0)
    np.testing.assert_allclose(head.logits(5 * held), expected, atol=1e-9)


def test_keys_are_renormalised_means_of_views():
    x, y, _ = shots(per_class=8)
    image = np.empty(48, int)
    for c in range(6):
        image[y == c] = 10 * c + np.arange(8) // 4
    head = TipAdapter(beta=4.0).fit(3 * x, y, groups=image)
    expected = [unit(x[image == k].mean(0)) for k in np.unique(image)]
    np.testing.assert_allclose(head.keys_, expected, atol=1e-12)
    assert head.owners_.tolist() == np.repeat(np.arange(6), 2).tolist()


def test_the_search_finds_what_nested_loops_find_on_shots_left_out():
    x, y, words = shots(per_class=5, noise=1.8, word_noise=1.6)
    zero = 100 * x @ words.T
    accuracy, beta, alpha = nested(GRID, zero, lambda b: left_out(x, y, b), y)
    head = TipAdapter(text=words, **GRID).fit(x, y)
    assert (head.beta_, head.alpha_) == (beta, alpha)
    assert accuracy > np.mean(zero.argmax(1) == y)
    logits = zero + alpha * left_out(x, y, beta)
    assert head.temperature_ == pytest.approx(fit_temperature(logits, y), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_on_validation_images_is_the_nested_one_over_the_whole_grid(seed):
    x, y, words = shots(noise=2.0, word_noise=1.8, seed=seed)
    xv, yv, _ = shots(per_class=12, noise=2.0, seed=seed, draw=1)
    grid = dict(alphas=WEIGHTS, betas=BETAS[::5])
    _, beta, alpha = nested(grid, 100 * xv @ words.T, lambda b: np.exp(-b * (1 - xv @ x.T)) @ np.eye(6)[y], yv)
    head = TipAdapter(text=words, **grid).fit(x, y, validation=(xv, yv))
    assert (head.beta_, head.alpha_) == (beta, alpha)


def test_counts_at_every_weight_are_those_of_argmax():
    rng = np.random.default_rng(0)
    base, slope = rng.normal(size=(7, 200)), rng.normal(size=(3, 7, 200))
    slope[1], slope[2, :4] = 0, 1.0  # nothing to weigh; four classes whose order the weight cannot change
    y = rng.integers(0, 7, 200)
    weights = np.array([0.0, 0.1, 0.5, 1.0, 4.0, 1e3, 1e9])
    expected = [[((base + w * s).argmax(0) == y).sum() for w in weights] for s in slope]
    np.testing.assert_array_equal(count_right(base, slope, y, weights), expected)


def test_a_tie_counts_as_wrong():
    base, slope = np.zeros((2, 2)), np.array([[[1.0, 2.0], [1.0, 1.0]]])  # the second is equal only at weight 0
    assert count_right(base, slope, np.array([0, 0]), [0.0, 1.0]).tolist() == [[0, 1]]


def test_alpha_zero_is_zero_shot():
    """Card, fact 1."""
    x, y, words = shots()
    np.testing.assert_allclose(TipAdapter(text=words, alpha=0.0).fit(x, y).logits(x), 100 * x @ words.T, atol=1e-12)


def test_beta_zero_adds_the_same_to_every_class():
    """Card, fact 2."""
    x, y, words = shots()
    found = TipAdapter(text=words, alpha=3.0, beta=0.0).fit(x, y).logits(x)
    np.testing.assert_allclose(found, 100 * x @ words.T + 3 * 8, atol=1e-9)


def test_a_sharp_vote_counts_equal_images_only():
    """Card, fact 3."""
    x, y, words = shots()
    found = TipAdapter(text=words, alpha=3.0, beta=1e6).fit(x, y).logits(x)
    np.testing.assert_allclose(found, 100 * x @ words.T + 3 * np.eye(6)[y], atol=1e-6)


def test_every_key_twice_at_half_the_weight_changes_nothing():
    """Card, fact 5."""
    x, y, words = shots()
    one = TipAdapter(text=words, alpha=3.0, beta=5.0).fit(x, y)
    two = TipAdapter(text=words, alpha=1.5, beta=5.0).fit(np.tile(x, (2, 1)), np.tile(y, 2))
    np.testing.assert_allclose(one.logits(x), two.logits(x), atol=1e-9)


def test_tip_adapter_f_starts_at_tip_adapter_and_changes_only_keys():
    """Card, fact 6."""
    x, y, words = shots(noise=1.5)
    settings = dict(text=words, alpha=2.0, beta=3.0)
    plain = TipAdapter(**settings).fit(x, y)
    start = TipAdapter(finetune=True, epochs=0, **settings).fit(x, y)
    np.testing.assert_allclose(start.logits(x), plain.logits(x), atol=1e-5)
    trained = TipAdapter(finetune=True, **settings).fit(x, y)
    assert trained.keys_.shape == plain.keys_.shape
    assert np.abs(trained.keys_ - plain.keys_).max() > 1e-3
    np.testing.assert_array_equal(trained.owners_, plain.owners_)
    np.testing.assert_array_equal(trained.text_, plain.text_)


def adamw(keys, owner, x, y, zero, alpha, beta, steps, rate=1e-3, decay=0.01, eps=1e-4):
    """Full-batch AdamW with a cosine schedule on the keys, its gradient written out."""
    m = v = np.zeros_like(keys)
    for t in range(steps):
        e = np.exp(-beta * (1 - x @ keys.T))
        p = softmax(zero + alpha * e @ np.eye(6)[owner]) - np.eye(6)[y]
        g = ((p[:, owner] * alpha * beta * e / len(x)).T) @ x
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        now = rate * (1 + np.cos(np.pi * t / steps)) / 2
        keys = keys * (1 - now * decay)
        keys = keys - now * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + eps)
    return keys


def test_training_is_adamw_on_the_cross_entropy_of_the_logits():
    x, y, words = shots(noise=1.5)
    order = np.argsort(y, kind="stable")
    zero = 100 * x @ words.T
    expected = adamw(x[order], y[order], x, y, zero, 2.0, 3.0, 20)
    head = TipAdapter(text=words, alpha=2.0, beta=3.0, finetune=True).fit(x, y)
    np.testing.assert_allclose(head.keys_, expected, atol=2e-5)


def test_training_lowers_the_loss_and_the_search_sees_no_image_it_trained_on():
    x, y, words = shots(per_class=5, noise=1.8, word_noise=1.6)
    head = TipAdapter(text=words, finetune=True, folds=3, epochs=40, lr=0.01, **GRID).fit(x, y)
    plain = TipAdapter(text=words, alpha=head.alpha_, beta=head.beta_).fit(x, y)

    def loss(h):
        p = softmax(h.logits(x))
        return -np.log(p[np.arange(len(y)), y]).mean()

    assert loss(head) < loss(plain)
    fold = fold_numbers(y, np.arange(len(y)), 3)
    parts = [(fold != k, fold == k) for k in range(3)]
    settings = dict(text=words, finetune=True, epochs=40, lr=0.01)
    trained = [TipAdapter(alpha=1.17, beta=1.0, **settings).fit(x[a], y[a]).keys_ for a, _ in parts]
    owner = [np.sort(y[a]) for a, _ in parts]
    order = np.concatenate([np.flatnonzero(b) for _, b in parts])

    def scores(beta):
        each = zip(parts, trained, owner, strict=True)
        return np.concatenate([np.exp(-beta * (1 - x[b] @ k.T)) @ np.eye(6)[o] for (_, b), k, o in each])

    _, beta, alpha = nested(GRID, 100 * x[order] @ words.T, scores, y[order])
    assert (head.beta_, head.alpha_) == (beta, alpha)


def test_seeds_decide_the_order_of_small_batches():
    x, y, words = shots(noise=1.5)
    settings = dict(text=words, alpha=2.0, beta=3.0, finetune=True, batch_size=8)
    one, again, other = (TipAdapter(seed=s, **settings).fit(x, y).keys_ for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-5


def test_shots_can_be_shuffled():
    """Card, fact 8."""
    x, y, words = shots(noise=1.8)
    order = np.random.default_rng(0).permutation(len(y))
    one, two = TipAdapter(text=words).fit(x, y), TipAdapter(text=words).fit(x[order], y[order])
    np.testing.assert_allclose(one.predict_proba(x), two.predict_proba(x), atol=1e-8)


def test_with_its_weight_chosen_it_is_never_below_zero_shot_on_validation():
    """Card, fact 9: three classes with words that are off."""
    for seed in range(8):
        x, y, words = shots(classes=3, per_class=6, noise=1.6, word_noise=2.5, seed=seed)
        xv, yv, _ = shots(classes=3, per_class=30, noise=1.6, word_noise=2.5, seed=seed, draw=1)
        head = TipAdapter(text=words).fit(x, y, validation=(xv, yv))
        assert head.score(xv, yv) >= np.mean((xv @ words.T).argmax(1) == yv)


def test_one_shot_of_each_class_takes_the_defaults():
    x, y, words = shots(per_class=1)
    for finetune in (False, True):
        head = TipAdapter(text=words, finetune=finetune).fit(x, y)
        assert (head.beta_, head.temperature_) == (1.0, 1.0)
        assert_equal_say(head, x, words)
        assert head.score(x, y) == 1


def test_many_images_are_asked_about_in_parts(monkeypatch):
    x, y, words = shots(noise=1.5)
    whole = TipAdapter(text=words).fit(x, y)
    monkeypatch.setattr("clipworks.heads.tip_adapter.CELLS", 100)
    parts = TipAdapter(text=words).fit(x, y)
    assert (parts.alpha_, parts.beta_) == (whole.alpha_, whole.beta_)
    np.testing.assert_allclose(parts.predict_proba(x), whole.predict_proba(x), atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(beta=-1.0), "beta must lie in"),
        (dict(betas=()), "betas must hold at least one"),
        (dict(alphas=(1.0, -1.0)), "alphas must lie in"),
        (dict(folds=1), "folds must lie in"),
        (dict(finetune=True, epochs=-1), "epochs must lie in"),
        (dict(batch_size=0), "batch_size must lie in"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    x, y, words = shots()
    with pytest.raises(ClipworksError, match=message):
        TipAdapter(text=words, **settings).fit(x, y)


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(TipAdapter())
    assert_sklearn_accepts(TipAdapter(finetune=True, epochs=2, folds=2))
