"""Detection metrics against scikit-learn and counting by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from clipworks.errors import ClipworksError
from clipworks.metrics.detection import aupr, auroc, f1_max, fpr_at_tpr


def draw(seed, n=200, digits=None):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.3
    scores = rng.normal(size=n) + labels
    return (scores if digits is None else scores.round(digits)), labels


@pytest.mark.parametrize("digits", [None, 1, 0])  # ties of all kinds
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_scikit_learn(seed, digits):
    scores, labels = draw(seed, digits=digits)
    assert abs(auroc(scores, labels) - roc_auc_score(labels, scores)) < 1e-12
    assert abs(aupr(scores, labels) - average_precision_score(labels, scores)) < 1e-12
    best = max(f1_score(labels, scores >= t) for t in np.unique(scores))
    value, threshold = f1_max(scores, labels)
    assert abs(value - best) < 1e-12
    assert abs(f1_score(labels, scores >= threshold) - best) < 1e-12


@pytest.mark.parametrize("tpr", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("digits", [None, 1])
def test_false_positives_by_counting(tpr, digits):
    scores, labels = draw(7, digits=digits)
    kept = [t for t in scores if (scores[labels] >= t).mean() >= tpr - 1e-12]
    assert fpr_at_tpr(scores, labels, tpr) == (scores[~labels] >= max(kept)).mean()


def test_limits():
    labels = np.arange(100) < 50
    separated = np.where(labels, 2.0, 1.0) + np.linspace(0, 0.1, 100)
    assert (auroc(separated, labels), fpr_at_tpr(separated, labels)) == (1, 0)
    assert auroc(np.ones(100), labels) == 0.5
    same = np.tile(np.random.default_rng(0).normal(size=5000), 2)
    assert abs(fpr_at_tpr(same, np.arange(10000) < 5000) - 0.95) < 0.001
    scores = np.random.default_rng(1).normal(size=100) + labels
    for function in (auroc, aupr, fpr_at_tpr):
        assert function(np.exp(3 * scores), labels) == function(scores, labels)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1, 2], [1], r"one entry per score \(2\). Got 1"),
        ([1, np.nan], [0, 1], "finite. Got NaN or infinity in 1"),
        ([1, 2], [1, 1], "both kinds. Got 2 positive of 2"),
        ([1, 2], [0, 2], "true or false. Got"),
    ],
)
def test_mistakes_are_named(scores, labels, message):
    with pytest.raises(ClipworksError, match=message):
        auroc(scores, labels)
