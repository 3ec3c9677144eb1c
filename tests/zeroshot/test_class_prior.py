"""Class priors against other ways to compute them, on images whose true probabilities are known."""

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.zeroshot.class_prior import ClassPrior

ANGLES = np.array([0, 2 * np.pi / 3, 4 * np.pi / 3])
TEXT = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
SCALE = 2.0  # von Mises images of this concentration have softmax(SCALE * cosine) as their exact class probabilities


def lot(shares, n=4000, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.choice(3, n, p=shares)
    angle = rng.vonmises(ANGLES[y], SCALE)
    return np.stack([np.cos(angle), np.sin(angle)], 1), y


def soft(a):
    e = np.exp(a - a.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def plain(x):
    return SCALE * x @ TEXT.T


def fitted(x, **settings):
    return ClassPrior(TEXT, scale=SCALE, **settings).fit(x)


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], None])
def test_match_equals_alternate_scaling_of_rows_and_columns(shares):
    x, _ = lot([0.7, 0.2, 0.1], 300)
    found = fitted(x, prior=shares)
    target = np.full(3, 1 / 3) if shares is None else np.array(shares)
    table = np.exp(plain(x))
    for _ in range(5000):
        table *= target / table.mean(0)
        table /= table.sum(1, keepdims=True)
    np.testing.assert_allclose(found.predict_proba(x), table, atol=1e-5)
    np.testing.assert_allclose(found.predict_proba(x).mean(0), target, atol=1e-6)
    np.testing.assert_allclose(found.prior_, target)
    assert abs(found.bias_.mean()) < 1e-9


def test_match_at_the_scale_of_clip():
    rng = np.random.default_rng(0)
    text, x = rng.normal(size=(20, 16)), rng.normal(size=(500, 16)) + 1
    found = ClassPrior(text, scale=100).fit(x)
    np.testing.assert_allclose(found.predict_proba(x).mean(0), 1 / 20, atol=1e-5)


def test_a_mean_that_is_right_already_is_left():
    x, _ = lot([0.5, 0.3, 0.2], 500)
    np.testing.assert_allclose(fitted(x, prior=soft(plain(x)).mean(0)).bias_, 0, atol=1e-4)


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [0.05, 0.15, 0.8]])
def test_shift_is_bayes(shares):
    x, _ = lot(shares, 200)
    joint = np.exp(plain(x)) * shares
    np.testing.assert_allclose(
        fitted(x[:1], correction="shift", prior=np.array(shares) * 7).predict_proba(x),
        joint / joint.sum(1, keepdims=True), atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("shares", [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]])
def test_estimate_finds_the_true_shares(shares):
    x, y = lot(shares)
    found = fitted(x, correction="estimate")
    np.testing.assert_allclose(found.prior_, np.bincount(y) / len(y), atol=0.03)
    likelihood = np.log(soft(plain(x)) @ found.prior_).mean()
    rng = np.random.default_rng(1)  # it is the most likely mixture: no neighbour is likelier
    for _ in range(200):
        other = np.abs(found.prior_ + rng.normal(0, 0.02, 3))
        assert np.log(soft(plain(x)) @ (other / other.sum())).mean() <= likelihood + 1e-9
    np.testing.assert_allclose(found.predict_proba(x).mean(0), found.prior_, atol=1e-5)  # its fixed point


def test_estimated_and_known_shares_help_on_uneven_lots():
    x, y = lot([0.85, 0.1, 0.05])
    base = (plain(x).argmax(1) == y).mean()
    known = fitted(x, correction="shift", prior=[0.85, 0.1, 0.05]).score(x, y)
    estimated = fitted(x, correction="estimate").score(x, y)
    assert known > base + 0.05
    assert abs(estimated - known) < 0.01


def test_match_repairs_a_favoured_word():
    """One word's vector leans towards what all images share."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 1500)
    common = np.eye(5)[4]
    x = np.eye(5)[y] + 2 * common + rng.normal(0, 0.2, (1500, 5))
    text = np.eye(5)[:3] + np.array([[0.8], [0.0], [0.0]]) * common
    base = ClassPrior(text, scale=20, strength=0).fit(x).score(x, y)
    assert base < 0.6
    assert ClassPrior(text, scale=20).fit(x).score(x, y) > 0.95


@pytest.mark.parametrize("correction", ["match", "shift", "estimate"])
def test_without_strength_or_with_equal_shares_it_is_plain(correction):
    x, _ = lot([0.6, 0.3, 0.1], 200)
    np.testing.assert_allclose(fitted(x, correction=correction, strength=0).predict_proba(x), soft(plain(x)), atol=1e-6)
    if correction == "shift":
        np.testing.assert_allclose(fitted(x, correction="shift").predict_proba(x), soft(plain(x)), atol=1e-6)


@pytest.mark.parametrize("correction", ["match", "estimate"])
def test_every_image_twice_changes_nothing(correction):
    x, _ = lot([0.6, 0.3, 0.1], 200)
    twice = fitted(np.concatenate([x, x]), correction=correction).bias_
    np.testing.assert_allclose(twice, fitted(x, correction=correction).bias_, atol=1e-4)


def test_strength_scales_the_constants():
    x, _ = lot([0.6, 0.3, 0.1], 200)
    found = fitted(x, strength=0.5)
    np.testing.assert_allclose(found.decision_function(x), plain(x) + 0.5 * found.bias_, atol=1e-6)


def test_names():
    x, _ = lot([0.6, 0.3, 0.1], 50)
    found = fitted(x, names=["a", "b", "c"]).predict(x)
    assert found.tolist() == ["abc"[i] for i in fitted(x).predict(x)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"correction": "mach"}, "Did you mean 'match'"),
        ({"prior": [0.5, 0.5]}, "3 numbers above 0"),
        ({"prior": [0.5, 0.5, 0]}, "3 numbers above 0"),
        ({"prior": [1, 1, np.nan]}, "3 numbers above 0"),
        ({"correction": "estimate", "prior": [1, 1, 1]}, "prior must be None"),
        ({"scale": -1}, "scale must lie in"),
        ({"strength": -1}, "strength must lie in"),
        ({"names": ["a"]}, r"one entry per row of text \(3\)"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ClipworksError, match=message):
        ClassPrior(**{"text": TEXT, **settings}).fit(lot([0.6, 0.3, 0.1], 20)[0])
