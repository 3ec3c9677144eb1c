"""Made-up shots for the tests of the heads: Gaussian classes on the sphere with words beside them."""

import numpy as np
from scipy.special import logsumexp
from sklearn.utils.estimator_checks import check_estimator

# scikit-learn leaves these out where pandas is not installed or array API dispatch is not switched on
SKIPPED = {"check_array_api_input", "check_classifier_data_not_an_array"}


def shots(classes=6, per_class=8, dim=24, noise=0.8, seed=0, word_noise=0.6, draw=0):
    """Unit vectors, labels 0..C-1 and unit word vectors; another `draw` is other images of the same
    classes. The noises are lengths, the centres have length 1."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(classes, dim)))
    words = unit(centres + word_noise * rng.normal(size=(classes, dim)) / dim**0.5)
    rng = np.random.default_rng([seed, draw])
    y = np.repeat(np.arange(classes), per_class)
    x = unit(centres[y] + noise * rng.normal(size=(len(y), dim)) / dim**0.5)
    order = rng.permutation(len(y))
    return x[order], y[order], words


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def nll(logits, y):
    return float(np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]))


def calibrated(logits, y):
    """Least mean negative log-likelihood over temperatures, on a fine grid of them."""
    spread = (logits - logits.mean(1, keepdims=True)).std()
    return min(nll(logits / t, y) for t in spread * np.geomspace(0.01, 100, 1001))


def assert_equal_say(head, x, words):
    """What the head adds spreads over the classes as far as the zero-shot logits do."""
    zero = 100 * x @ words.T
    added = head.logits(x) - zero
    both = [np.sqrt(np.mean((a - a.mean(1, keepdims=True)) ** 2)) for a in (added, zero)]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-6)


def assert_sklearn_accepts(head):
    """Every check of scikit-learn's `check_estimator` that can run here passes."""
    results = check_estimator(head, on_fail=None, on_skip=None)
    assert len(results) > 40
    failed = {r["check_name"]: str(r["exception"])[:200] for r in results if r["status"] == "failed"}
    assert not failed, failed
    assert {r["check_name"] for r in results if r["status"] == "skipped"} <= SKIPPED
