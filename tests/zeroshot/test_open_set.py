"""Unknown images: the four scores against plain numpy, the threshold's promise, and the facts of the card."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from clipworks.errors import ClipworksError
from clipworks.zeroshot.open_set import SCORES, OpenSet, energy, max_logit, mcm, msp

DIM = 8


def rows(n, seed):
    made = np.random.default_rng(seed).normal(size=(n, DIM))
    return made / np.linalg.norm(made, axis=1, keepdims=True)


TEXT, IMAGES = rows(5, 0), rows(200, 1)


def oracle(score, x, text, scale, t):
    found = []
    for image in x:
        c = [image @ w for w in text]
        if score == "mcm":
            found.append(max(np.exp(v / t) for v in c) / sum(np.exp(v / t) for v in c))
        elif score == "msp":
            found.append(max(np.exp(scale * v / t) for v in c) / sum(np.exp(scale * v / t) for v in c))
        elif score == "max_logit":
            found.append(scale * max(c))
        else:
            found.append(t * np.log(sum(np.exp(scale * v / t) for v in c)))
    return np.array(found)


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize(("scale", "temperature"), [(1, 1), (20, 1), (50, 2.5)])
def test_scores_equal_the_formulas(score, scale, temperature):
    fitted = OpenSet(TEXT, score=score, scale=scale, temperature=temperature).fit(IMAGES)
    expected = oracle(score, IMAGES, TEXT, scale, temperature)
    np.testing.assert_allclose(fitted.score_samples(IMAGES), expected, rtol=1e-5, atol=1e-6)


def test_relations_between_the_scores():
    c = IMAGES @ TEXT.T
    gap = energy(c, 30) - max_logit(c, 30)
    assert (gap >= 0).all()
    assert (gap <= np.log(5) + 1e-9).all()
    np.testing.assert_allclose(mcm(c, temperature=1 / 30), msp(c, 30))
    np.testing.assert_allclose(msp(c + 0.3, 30), msp(c, 30))
    np.testing.assert_allclose(max_logit(c + 0.3, 30), max_logit(c, 30) + 9)
    one = c[:, :1]
    assert (msp(one) == 1).all()
    assert (mcm(one) == 1).all()
    np.testing.assert_allclose(energy(one, 30), max_logit(one, 30))
    assert np.isfinite(energy(c, 1e5)).all()


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_the_threshold_refuses_the_share_it_was_asked_to(score, rate):
    fitted = OpenSet(TEXT, score=score, rate=rate).fit(IMAGES)
    assert (fitted.predict(IMAGES) == -1).sum() == int(rate * 201)
    assert np.array_equal(fitted.decision_function(IMAGES) > 0, fitted.predict(IMAGES) >= 0)
    kept = fitted.predict(IMAGES) >= 0
    assert np.array_equal(fitted.predict(IMAGES)[kept], (IMAGES @ TEXT.T).argmax(1)[kept])


def test_the_promise_holds_on_further_images():
    """Over many lots, at most `rate` of new images of the same kind are refused, and no more than 1 / (n + 1) fewer."""
    refused, small = [], []
    for seed in range(400):
        x = rows(80, 1000 + seed)
        fitted = OpenSet(TEXT, rate=0.1).fit(x[:59])
        refused.append((fitted.predict(x[59:]) == -1).mean())
        small.append((fitted.p_values(x[59:]) <= 0.1).mean())
    assert abs(np.mean(refused) - 6 / 60) < 0.012
    assert np.array_equal(refused, small)  # p <= rate and refusal are the same


def test_p_values_count():
    fitted = OpenSet(TEXT).fit(IMAGES)
    s, new = fitted.score_samples(IMAGES), rows(30, 7)
    expected = [(1 + sum(s <= v)) / 201 for v in fitted.score_samples(new)]
    np.testing.assert_allclose(fitted.p_values(new), expected)
    np.testing.assert_allclose(np.sort(fitted.p_values(IMAGES)), np.arange(2, 202) / 201)  # a fitted one counts itself


@pytest.fixture(scope="module")
def lots():
    """Images near 5 of 10 classes, and near the other 5."""
    rng = np.random.default_rng(3)
    y = rng.integers(0, 10, 3000)
    return np.eye(10)[y] + rng.normal(0, 0.15, (3000, 10)), y


@pytest.mark.parametrize("score", ["mcm", "max_logit", "energy"])
@pytest.mark.parametrize("rate", [0.05, None])
def test_images_of_other_classes_are_refused(lots, score, rate):
    x, y = lots
    fit_on = x[:1500] if rate is None else x[:1500][y[:1500] < 5]
    fitted = OpenSet(np.eye(10)[:5], score=score, scale=20, rate=rate).fit(fit_on)
    found = fitted.predict(x[1500:])
    truth = np.where(y[1500:] < 5, y[1500:], -1)
    assert (found == truth).mean() > 0.93
    assert roc_auc_score(truth >= 0, fitted.score_samples(x[1500:])) > 0.97


def test_a_mixed_lot_is_cut_where_two_normal_curves_cross():
    """One class, so that MaxLogit is the cosine: scores drawn from two known normal curves."""
    rng = np.random.default_rng(0)
    c = np.concatenate([rng.normal(0.2, 0.04, 6000), rng.normal(0.5, 0.08, 4000)])
    x = np.stack([c, np.sqrt(1 - c**2)], 1)
    fitted = OpenSet(np.array([[1.0, 0]]), score="max_logit", scale=1, rate=None).fit(x)
    crossing = brentq(lambda v: 0.6 * norm.pdf(v, 0.2, 0.04) - 0.4 * norm.pdf(v, 0.5, 0.08), 0.2, 0.5)
    assert abs(fitted.threshold_ - crossing) < 0.01


def test_names():
    names = ["a", "b", "c", "d", "e"]
    found = OpenSet(TEXT, names=names, rate=0.5, unknown="?").fit(IMAGES).predict(IMAGES)
    numbered = OpenSet(TEXT, rate=0.5).fit(IMAGES).predict(IMAGES)
    assert found.tolist() == [names[i] if i >= 0 else "?" for i in numbered]


@pytest.mark.parametrize(
    ("settings", "features", "message"),
    [
        ({"score": "mcn"}, IMAGES, "Did you mean 'mcm'"),
        ({"rate": 0}, IMAGES, "rate must lie between"),
        ({"rate": 1.0}, IMAGES, "rate must lie between"),
        ({"temperature": 0}, IMAGES, "temperature must be above 0"),
        ({"scale": -1}, IMAGES, "scale must lie in"),
        ({"names": ["a"]}, IMAGES, r"one entry per row of text \(5\)"),
        ({"names": ["a", "b", "c", "d", "none of these"]}, IMAGES, "unknown must differ"),
        ({"text": TEXT[:1]}, IMAGES, "'max_logit' or 'energy' for one class"),
        ({}, IMAGES[:18], r"at least 19 vectors for a rate of 0\.05"),
        ({"rate": None}, IMAGES[:3], "at least 4"),
        ({"rate": None}, IMAGES[[0] * 9], "at least 4 different"),
        ({}, IMAGES[:, :3], r"shape \(n, 8\)"),
    ],
)
def test_mistakes_are_named(settings, features, message):
    with pytest.raises(ClipworksError, match=message):
        OpenSet(**{"text": TEXT, **settings}).fit(features)


def test_as_few_images_as_the_rate_allows():
    fitted = OpenSet(TEXT, rate=0.05).fit(IMAGES[:19])
    assert fitted.threshold_ == fitted.scores_[0]
