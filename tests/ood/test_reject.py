"""The reject option: its promise on further images, scores and ranks by hand, classifiers of all kinds."""

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from clipworks.errors import ClipworksError
from clipworks.heads.gda import GDA
from clipworks.heads.nearest_mean import NearestMean
from clipworks.metrics.detection import auroc
from clipworks.ood.reject import Reject, like, logits_of


def lot(n=40, known=3, seed=0, dim=8, noise=0.15):
    """n images of each of `known` classes, and as many of the other dimensions."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(known), n)
    x = np.eye(dim)[y] + rng.normal(0, noise, (len(y), dim))
    other = np.eye(dim)[rng.integers(known, dim, len(y))] + rng.normal(0, noise, (len(y), dim))
    return x, y, other


@pytest.mark.parametrize("scores", [["energy"], ["nearest"], ["energy", "nearest"]])
def test_the_share_of_known_images_refused_is_the_rate(scores):
    refused = []
    for seed in range(60):
        x, y, _ = lot(20, seed=seed, noise=0.3)
        fitted = Reject(NearestMean(), scores=scores, rate=0.1).fit(x, y)
        fresh = lot(30, seed=1000 + seed, noise=0.3)[0]
        refused.append((fitted.predict(fresh) == -1).mean())
    # the last classifier has seen a fifth more images than those of the folds, so slightly fewer are refused
    assert 0.05 < np.mean(refused) < 0.12


@pytest.mark.parametrize(
    "classifier",
    [NearestMean(), GDA(), LogisticRegression(), LinearSVC(), RandomForestClassifier(20, random_state=0)],
    ids=lambda c: type(c).__name__,
)
def test_unknown_images_are_refused_by_every_classifier(classifier):
    x, y, other = lot()
    fitted = Reject(classifier, scores=["msp", "energy", "nearest"]).fit(x, y)
    fresh, truth, _ = lot(seed=5)
    assert (fitted.predict(fresh) == truth).mean() > 0.8
    assert (fitted.predict(other) == -1).mean() > 0.8
    both = np.concatenate([fitted.score_samples(fresh), fitted.score_samples(other)])
    assert auroc(both, np.arange(len(both)) < len(fresh)) > 0.95


def test_scores_and_ranks_by_hand():
    x, y, other = lot(10)
    fitted = Reject(NearestMean(), scores=["energy", "nearest"], rate=0.2).fit(x, y)
    logits = fitted.classifier_.logits(other) / fitted.classifier_.temperature_
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    columns = [logsumexp(logits, axis=1), (unit(other) @ unit(x).T).max(1)]
    assert fitted.reference_.shape == (15, 2)
    expected = [
        np.mean([np.mean([r < c[i] for r in fitted.reference_[:, k]]) for k, c in enumerate(columns)])
        for i in range(len(other))
    ]
    np.testing.assert_allclose(fitted.score_samples(other), expected)
    one = Reject(NearestMean(), scores=["nearest"]).fit(x, y)
    np.testing.assert_allclose(one.score_samples(other), columns[1])


def test_held_out_scores_come_from_other_folds():
    """With "nearest" a shot in its own memory would score 1; the threshold must know better."""
    x, y, _ = lot(10)
    fitted = Reject(NearestMean(), scores=["nearest"], rate=0.05).fit(x, y)
    assert fitted.threshold_ < 0.999
    np.testing.assert_allclose(fitted.score_samples(x), 1)


def test_labels_of_words():
    x, y, other = lot()
    names = np.array(["ant", "bee", "cat"])[y]
    fitted = Reject(NearestMean(), scores=["nearest"]).fit(x, names)
    assert set(fitted.predict(other).tolist()) == {"none of these"}
    assert set(fitted.predict(np.eye(8)[:3]).tolist()) == {"ant", "bee", "cat"}
    assert Reject(NearestMean(), scores=["nearest"], unknown="?").fit(x, names).predict(np.eye(8)[7:]).tolist() == ["?"]


def test_folds_have_the_settings_of_the_last_classifier():
    """A head with words weighs them by cross-validation; were that done in every fold anew, energies would differ."""
    refused = []
    for seed in range(8):
        x, y, _ = lot(6, seed=seed, noise=0.35)
        fitted = Reject(NearestMean(text=np.eye(8)[:3]), scores=["energy"], rate=0.1).fit(x, y)
        refused.append((fitted.predict(lot(30, seed=100 + seed, noise=0.35)[0]) == -1).mean())
    assert np.mean(refused) < 0.2
    made = like(NearestMean(text=np.eye(8)[:3]), fitted.classifier_)
    assert made.alpha == fitted.classifier_.alpha_
    assert not hasattr(made, "alpha_")


def test_two_class_decision_values_become_two_logits():
    x, y, _ = lot(known=2)
    machine = LinearSVC().fit(x, y)
    logits = logits_of(machine, x)
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], machine.decision_function(x))
    with pytest.raises(ClipworksError, match=r"predict_proba\. object has none"):
        logits_of(object(), x)


@pytest.mark.parametrize(
    ("settings", "n", "message"),
    [
        ({"scores": ["msq"]}, 10, "Did you mean 'msp'"),
        ({"scores": []}, 10, "at least one"),
        ({"scores": "msp"}, 10, "a list of names"),
        ({"folds": 1}, 10, "folds must lie in"),
        ({}, 1, "two images or more"),
        ({"rate": 0.001}, 10, "at least 999 vectors for a rate"),
    ],
)
def test_mistakes_are_named(settings, n, message):
    x, y, _ = lot(n)
    with pytest.raises(ClipworksError, match=message):
        Reject(NearestMean(), **settings).fit(x, y)
