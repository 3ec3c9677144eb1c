"""CapS-Adapter against loops over images, captions and the grid, its reductions, and the facts of its card."""

from functools import partial

import numpy as np
import pytest
from few_shots import assert_equal_say, assert_sklearn_accepts, calibrated, shots, unit
from test_sus_x import left_out, nested, oracle, triples

from clipworks.errors import ClipworksError
from clipworks.heads.caps_adapter import CapSAdapter
from clipworks.heads.sus_x import SusX
from clipworks.heads.tip_adapter import EQUALS
from clipworks.types import Features

GRID = dict(alphas=(0.0, 1.0, 8.0), betas=(1.0, 5.0), gammas=(0.0, 2.0, 10.0))
DELTAS = (0.0, 0.3, 0.7, 1.0)


def support(noise=1.5, seed=0, per_class=6, **kwargs):
    """Images, labels, words, and captions that know more of their class than its word does."""
    x, y, words = shots(noise=noise, seed=seed, per_class=per_class, **kwargs)
    other, own, _ = shots(noise=1.0, seed=seed, per_class=20, draw=9)
    centres = np.stack([other[own == c].mean(0) for c in range(6)])
    around = np.random.default_rng([seed, 7]).normal(size=x.shape) / 24**0.5
    return x, y, words, unit(centres[y] + 0.7 * around)


@pytest.mark.parametrize("delta", [0.0, 0.4, 1.0])
def test_logits_are_the_formula(delta):
    x, y, words, captions = support()
    held = shots(noise=1.5, draw=1)[0]
    similar, alike = oracle(x, y, held, words, 3.0, captions=captions, delta=delta)
    head = CapSAdapter(text=words, alpha=2.0, beta=3.0, gamma=4.0, delta=delta).fit(2 * x, y, captions=3 * captions)
    np.testing.assert_allclose(head.logits(held), 100 * held @ words.T + 2 * similar + 4 * alike, atol=1e-8)


def best_of_all(zero, votes_of, y):
    """Nested over the shares too, the first of equals."""
    best = (-1.0,)
    for delta in DELTAS:
        found = nested(GRID, zero, lambda beta, delta=delta: votes_of(beta, delta), y)
        best = (*found, delta) if found[0] > best[0] else best
    return best


@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_finds_what_nested_loops_find_on_validation_images(seed):
    x, y, words, captions = support(noise=6.0, word_noise=1.5, seed=seed)
    xv, yv, _ = shots(per_class=10, noise=1.5, word_noise=1.5, seed=seed, draw=1)
    votes = partial(oracle, x, y, xv, words, captions=captions)
    best = best_of_all(100 * xv @ words.T, lambda beta, delta: votes(beta, delta=delta), yv)
    head = CapSAdapter(text=words, deltas=DELTAS, **GRID).fit(x, y, captions=captions, validation=(xv, yv))
    assert (head.beta_, head.alpha_, head.gamma_, head.delta_) == best[1:]
    assert head.score(xv, yv) == pytest.approx(best[0])
    assert head.delta_ > 0  # the captions are in use in these draws


def test_the_search_leaves_an_image_out_with_its_caption():
    x, y, words, captions = support(per_class=4, noise=1.4, word_noise=1.8)
    zero = 100 * x @ words.T
    tried = [
        (np.sum(logits.argmax(1) == y), -calibrated(logits, y), *triple, delta)
        for delta in DELTAS
        for triple, logits in triples(GRID, zero, partial(left_out, x, y, words, captions=captions, delta=delta))
    ]
    head = CapSAdapter(text=words, deltas=DELTAS, **GRID).fit(x, y, captions=captions)
    assert 1 < sum(t[0] == max(tried)[0] for t in tried) <= EQUALS  # all equals are compared
    assert (head.beta_, head.alpha_, head.gamma_, head.delta_) == max(tried)[2:]


def test_without_captions_or_at_delta_zero_it_is_sus_x():
    """Card, fact 4."""
    x, y, words, captions = support()
    plain = SusX(text=words, **GRID).fit(x, y)
    for head in (
        CapSAdapter(text=words, **GRID).fit(x, y),
        CapSAdapter(text=words, delta=0.0, **GRID).fit(x, y, captions=captions),
    ):
        assert (head.alpha_, head.beta_, head.gamma_, head.delta_) == (plain.alpha_, plain.beta_, plain.gamma_, 0.0)
        np.testing.assert_allclose(head.predict_proba(x), plain.predict_proba(x), atol=1e-12)


def test_captions_alone_are_a_cache_of_captions():
    """Card, fact 4, and where there are no images: delta 1."""
    x, y, words, captions = support()
    alone = CapSAdapter(text=words, alpha=2.0, beta=3.0, gamma=0.0).fit(None, y, captions=captions)
    assert alone.delta_ == 1.0
    np.testing.assert_allclose(
        alone.logits(x), 100 * x @ words.T + 2 * np.exp(-3 * (1 - x @ captions.T)) @ np.eye(6)[y], atol=1e-9
    )
    both = CapSAdapter(text=words, alpha=2.0, beta=3.0, gamma=0.0, delta=1.0).fit(x, y, captions=captions)
    np.testing.assert_allclose(both.logits(x), alone.logits(x), atol=1e-9)


def test_similarities_are_linear_in_delta():
    """Card, fact 4: the logarithm of a single key's vote is."""
    x, y, words, captions = support(per_class=1)

    def logarithm(delta):
        settings = dict(alpha=1.0, beta=2.0, gamma=0.0, delta=delta)
        return np.log(CapSAdapter(text=words, **settings).fit(x, y, captions=captions)._scores(x))

    np.testing.assert_allclose(logarithm(0.3), 0.7 * logarithm(0.0) + 0.3 * logarithm(1.0), atol=1e-9)


def test_every_key_twice_at_half_the_weights_changes_nothing():
    """Card, fact 5."""
    x, y, words, captions = support()
    fixed = dict(text=words, beta=5.0, delta=0.4)
    one = CapSAdapter(alpha=3.0, gamma=4.0, **fixed).fit(x, y, captions=captions)
    two = CapSAdapter(alpha=1.5, gamma=2.0, **fixed).fit(
        np.tile(x, (2, 1)), np.tile(y, 2), captions=np.tile(captions, (2, 1))
    )
    np.testing.assert_allclose(one.logits(x), two.logits(x), atol=1e-9)


def test_support_can_be_shuffled_with_its_captions_and_views_are_averaged():
    """Card, fact 8."""
    x, y, words, captions = support()
    order = np.random.default_rng(0).permutation(len(y))
    settings = dict(text=words, deltas=DELTAS, **GRID)
    one = CapSAdapter(**settings).fit(x, y, captions=captions)
    two = CapSAdapter(**settings).fit(x[order], y[order], captions=captions[order])
    np.testing.assert_allclose(one.predict_proba(x), two.predict_proba(x), atol=1e-8)
    views = CapSAdapter(**settings).fit(
        np.concatenate([x, x]), np.tile(y, 2), captions=np.tile(captions, (2, 1)), groups=np.tile(np.arange(36), 2)
    )
    np.testing.assert_allclose(views.captions_, one.captions_, atol=1e-12)
    np.testing.assert_allclose(views.keys_, one.keys_, atol=1e-12)


def test_captions_help_where_generated_images_are_poor():
    x, y, words = shots(per_class=40, noise=1.3, word_noise=1.8, seed=5)
    centres = np.stack([x[y == c].mean(0) for c in range(6)])
    rng = np.random.default_rng(5)
    owner = np.repeat(np.arange(6), 8)
    made = unit(rng.normal(size=(48, 24)))  # images of nothing
    captions = unit(centres[owner] + rng.normal(size=(48, 24)) / 24**0.5)
    xv, yv, _ = shots(per_class=8, noise=1.3, word_noise=1.8, seed=5, draw=1)
    head = CapSAdapter(text=words).fit(made, owner, captions=captions, validation=(xv, yv))
    images = SusX(text=words).fit(made, owner, validation=(xv, yv))
    assert head.delta_ > 0.3
    assert head.score(x, y) > images.score(x, y) + 0.05


def test_one_image_of_each_class_takes_the_defaults():
    x, y, words, captions = support(per_class=1)
    head = CapSAdapter(text=words).fit(x, y, captions=captions)
    assert (head.beta_, head.gamma_, head.delta_, head.temperature_) == (1.0, 0.0, 0.5, 1.0)
    assert_equal_say(head, x, words)


def test_what_cannot_be_used_is_named():
    x, y, words, captions = support()
    for settings, given, message in (
        (dict(), dict(captions=captions[:-1]), "captions must have one row per row of x \\(36\\). Got 35"),
        (dict(), dict(captions=captions[:, :-1]), "captions must have the 24 columns of x. Got 23"),
        (dict(), dict(captions=np.full_like(x, np.nan)), "captions contains NaN"),
        (dict(delta=0.5), dict(), "captions must be given for delta"),
        (dict(delta=1.5), dict(captions=captions), "delta must lie in"),
        (dict(deltas=(0.5, 2.0)), dict(captions=captions), "deltas must lie in"),
        (dict(deltas=()), dict(captions=captions), "deltas must hold at least one"),
    ):
        with pytest.raises(ClipworksError, match=message):
            CapSAdapter(text=words, **settings).fit(x, y, **given)
    with pytest.raises(ClipworksError, match="Got neither"):
        CapSAdapter(text=words).fit(None, y)
    with pytest.raises(ClipworksError, match="captions must come from the encoder of x"):
        CapSAdapter().fit(Features(x, labels=y, fingerprint="a"), captions=Features(captions, fingerprint="b"))


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(CapSAdapter(betas=(1.0, 5.0)))
