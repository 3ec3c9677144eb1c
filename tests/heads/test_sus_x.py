"""SuS-X against loops over images and keys and over the grid, and the facts of its card."""

import numpy as np
import pytest
from few_shots import assert_equal_say, assert_sklearn_accepts, shots, softmax, unit

from clipworks.errors import ClipworksError
from clipworks.heads.sus_x import SusX
from clipworks.heads.tip_adapter import TipAdapter

GRID = dict(alphas=(0.0, 1.0, 4.0, 16.0), betas=(1.0, 4.0, 16.0), gammas=(0.0, 0.5, 2.0, 8.0, 30.0))


def oracle(keys, owner, held, words, beta, t=0.5, classes=6, captions=None, delta=0.0):
    """Votes by similarity and by signatures (m, C) each, key by key."""
    similar, alike = np.zeros((len(held), classes)), np.zeros((len(held), classes))
    signature = softmax(keys @ words.T / t)
    for i, x in enumerate(held):
        a = keys @ x if captions is None else (1 - delta) * keys @ x + delta * captions @ x
        p = softmax(x[None] @ words.T / t)[0]
        kl = np.array([(p * np.log(p / q)).sum() for q in signature])
        psi = np.interp(-kl, [-kl.max(), -kl.min()], [a.min(), a.max()])
        for j, label in enumerate(owner):
            similar[i, label] += np.exp(-beta * (1 - a[j]))
            alike[i, label] += psi[j]
    return similar, alike


def left_out(keys, owner, words, beta, **kwargs):
    """The same of each key among the others, its class standing for as many votes as it has."""
    captions = kwargs.pop("captions", None)
    found = np.empty((2, len(keys), 6))
    for i, x in enumerate(keys):
        rest = np.arange(len(keys)) != i
        more = {} if captions is None else dict(captions=captions[rest], **kwargs)
        votes = np.stack(oracle(keys[rest], owner[rest], x[None], words, beta, **more))[:, 0]
        votes[:, owner[i]] *= (owner == owner[i]).sum() / (owner[rest] == owner[i]).sum()
        found[:, i] = votes
    return found


def triples(grid, zero, votes_of):
    """Every beta, alpha and gamma with its logits."""
    for beta in grid["betas"]:
        similar, alike = votes_of(beta)
        for alpha in grid["alphas"]:
            for gamma in grid["gammas"]:
                yield (beta, alpha, gamma), zero + alpha * similar + gamma * alike


def nested(grid, zero, votes_of, y):
    """Every triple computed anew, kept where it is better than all before."""
    best = (-1.0,)
    for triple, logits in triples(grid, zero, votes_of):
        accuracy = np.mean(logits.argmax(1) == y)
        if accuracy > best[0]:
            best = (accuracy, *triple)
    return best


def test_logits_are_the_formula():
    x, y, words = shots(noise=1.5)
    held = shots(noise=1.5, draw=1)[0]
    similar, alike = oracle(x, y, held, words, 3.0)
    head = SusX(text=words, alpha=2.0, beta=3.0, gamma=4.0).fit(2 * x, y)
    np.testing.assert_allclose(head.logits(held), 100 * held @ words.T + 2 * similar + 4 * alike, atol=1e-8)


def test_the_search_finds_what_nested_loops_find_on_images_left_out():
    x, y, words = shots(per_class=5, noise=1.4, word_noise=1.8, seed=3)
    accuracy, beta, alpha, gamma = nested(GRID, 100 * x @ words.T, lambda b: left_out(x, y, words, b), y)
    head = SusX(text=words, **GRID).fit(x, y)
    assert (head.beta_, head.alpha_, head.gamma_) == (beta, alpha, gamma)
    assert accuracy > np.mean((x @ words.T).argmax(1) == y)


def test_the_search_finds_what_nested_loops_find_on_validation_images():
    x, y, words = shots(noise=2.0, word_noise=1.8)
    xv, yv, _ = shots(per_class=15, noise=2.0, draw=1)
    accuracy, beta, alpha, gamma = nested(GRID, 100 * xv @ words.T, lambda b: oracle(x, y, xv, words, b), yv)
    head = SusX(text=words, **GRID).fit(x, y, validation=(xv, yv))
    assert (head.beta_, head.alpha_, head.gamma_) == (beta, alpha, gamma)
    assert head.score(xv, yv) == pytest.approx(accuracy)
    assert gamma > 0  # the third term is in use in this draw


def test_nothing_weighed_is_zero_shot():
    """Card, fact 1."""
    x, y, words = shots()
    head = SusX(text=words, alpha=0.0, gamma=0.0).fit(x, y)
    np.testing.assert_allclose(head.logits(x), 100 * x @ words.T, atol=1e-12)


def test_without_the_third_term_it_is_tip_adapter():
    x, y, words = shots(noise=1.6, word_noise=1.5)
    grid = dict(alphas=GRID["alphas"], betas=GRID["betas"])
    one, two = SusX(text=words, gamma=0.0, **grid).fit(x, y), TipAdapter(text=words, **grid).fit(x, y)
    assert (one.alpha_, one.beta_) == (two.alpha_, two.beta_)
    np.testing.assert_allclose(one.predict_proba(x), two.predict_proba(x), atol=1e-12)
    bare = SusX(**{**grid, "alphas": (1.0,)}).fit(x, y)  # no words: no signatures
    np.testing.assert_allclose(bare.logits(x), TipAdapter(**grid).fit(x, y).logits(x), atol=1e-12)


def test_every_key_twice_at_half_the_weights_changes_nothing():
    """Card, fact 5."""
    x, y, words = shots()
    one = SusX(text=words, alpha=3.0, beta=5.0, gamma=4.0).fit(x, y)
    two = SusX(text=words, alpha=1.5, beta=5.0, gamma=2.0).fit(np.tile(x, (2, 1)), np.tile(y, 2))
    np.testing.assert_allclose(one.logits(x), two.logits(x), atol=1e-9)


def test_divergences_are_not_negative_and_psi_fills_the_range_of_similarities():
    """Card, fact 7: with one key per class, the third term is psi itself."""
    x, y, words = shots(noise=1.5)
    keys = x[[np.flatnonzero(y == c)[0] for c in range(6)]]
    psi = SusX(text=words, alpha=0.0, gamma=1.0).fit(keys, np.arange(6))._scores(x)
    cosine = x @ keys.T
    np.testing.assert_allclose(psi.min(1), cosine.min(1), atol=1e-12)
    np.testing.assert_allclose(psi.max(1), cosine.max(1), atol=1e-12)
    own = SusX(text=words, alpha=0.0, gamma=1.0).fit(keys, np.arange(6))._scores(keys)
    assert own.argmax(1).tolist() == list(range(6))  # divergence 0 from itself, more from any other
    np.testing.assert_allclose(own[range(6), range(6)], 1, atol=1e-12)


def test_support_can_be_shuffled():
    """Card, fact 8."""
    x, y, words = shots(noise=1.8)
    order = np.random.default_rng(0).permutation(len(y))
    one, two = SusX(text=words, **GRID).fit(x, y), SusX(text=words, **GRID).fit(x[order], y[order])
    np.testing.assert_allclose(one.predict_proba(x), two.predict_proba(x), atol=1e-8)


def test_with_its_weights_chosen_it_is_never_below_tip_adapter_or_zero_shot_on_validation():
    """Card, fact 9."""
    for seed in range(5):
        x, y, words = shots(classes=3, per_class=6, noise=1.6, word_noise=2.5, seed=seed)
        xv, yv, _ = shots(classes=3, per_class=30, noise=1.6, word_noise=2.5, seed=seed, draw=1)
        found = SusX(text=words, **GRID).fit(x, y, validation=(xv, yv)).score(xv, yv)
        tip = TipAdapter(text=words, alphas=GRID["alphas"], betas=GRID["betas"]).fit(x, y, validation=(xv, yv))
        assert found >= tip.score(xv, yv) >= np.mean((xv @ words.T).argmax(1) == yv)


def test_generated_images_of_each_class_help_poor_words():
    """What it is for: the support set is not of the task's images, a few labelled ones choose the weights."""
    x, y, words = shots(per_class=40, noise=1.5, word_noise=2.0, seed=3)
    made, owner, _ = shots(per_class=10, noise=2.0, seed=3, draw=1)
    made = unit(made + 0.3 * np.eye(24)[0])  # all made images are shifted alike
    xv, yv, _ = shots(per_class=4, noise=1.5, seed=3, draw=2)
    head = SusX(text=words).fit(made, owner, validation=(xv, yv))
    assert head.score(x, y) > np.mean((x @ words.T).argmax(1) == y) + 0.05


def test_one_image_of_each_class_takes_the_defaults():
    x, y, words = shots(per_class=1)
    head = SusX(text=words).fit(x, y)
    assert (head.beta_, head.gamma_, head.temperature_) == (1.0, 0.0, 1.0)
    assert_equal_say(head, x, words)
    assert SusX(text=words, gamma=3.0, beta=2.0).fit(x, y).gamma_ == 3.0


def test_what_cannot_be_used_is_named():
    x, y, words = shots()
    for settings in (dict(gamma=-1.0), dict(gammas=()), dict(betas=(-1.0,)), dict(temperature=0.0)):
        with pytest.raises(ClipworksError, match=next(iter(settings))):
            SusX(text=words, **settings).fit(x, y)
    with pytest.raises(ClipworksError, match="text must be given for gamma"):
        SusX(gamma=1.0).fit(x, y)


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(SusX(betas=(1.0, 5.0)))
