"""Class priors: correct zero-shot scores for how often the classes occur, or for words that are favoured throughout.

Claim: zero-shot scores treat all classes as equally frequent and favour some words over others whatever the image; a
constant per class, found without labels, repairs either.

Formula: p(c|x) = softmax_c( scale <x, t_c> + b_c ), with one of
shift: b = log pi for known frequencies pi;
estimate: b = log pi, pi by expectation maximisation, pi <- mean_i softmax(scale <x_i, t> + log pi);
match: b such that mean_i p(c|x_i) = pi_c, the minimum of the convex mean_i logsumexp(scale <x_i, t> + b) - pi . b.

Papers: Saerens et al. 2002, Adjusting the Outputs of a Classifier to New a Priori Probabilities (shift, estimate);
Liusie et al. 2023, Mitigating Word Bias in Zero-shot Prompt-based Classifiers (match).
Differs from the papers: Saerens et al. divide by the frequencies of training, which a classifier from words does not
have; they are taken as equal. Liusie et al. match language models' answers; here it is images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError

from ..errors import ClipworksError, check_choice, check_range
from ..registry import method
from .sentences import as_text, as_vectors, softmax


@method(card="few-shot-foundations", level="M")
class ClassPrior(ClassifierMixin, BaseEstimator):
    """Zero-shot classifier with a constant per class, found from known frequencies or from unlabelled images.

    Parameters
    ----------
    text : one vector per class, shape (C, dim), such as `class_vectors` gives
    correction : "match" makes the mean prediction over the fitted images equal `prior`; "shift" adds log `prior`;
        "estimate" finds the frequencies from the fitted images and adds their logarithm
    prior : share of each class, C numbers above 0, scaled to sum 1 (default: equal shares)
    scale : sharpness (the encoder's `logit_scale`)
    strength : of the correction; 0 leaves plain zero-shot, 1 corrects fully
    names : optional class names in the order of `text`; labels are then names, else positions 0 .. C-1

    Attributes
    ----------
    bias_ : the constant of each class, mean 0, before `strength`; shape (C,)
    prior_ : shares that the bias stands for: given, or estimated; shape (C,)
    classes_ : the labels, in the order of `text`

    Inputs
    ------
    feature vectors of unlabelled images such as it will be used on; no label is seen

    Relations
    ---------
    With equal shares "shift" is plain zero-shot; so is any with `strength=0`. "match" and "estimate" pull in opposite
    ways: the first takes an uneven mean prediction for a fault of the words, the second for the truth.

    References
    ----------
    Saerens et al. 2002, Adjusting the Outputs of a Classifier to New a Priori Probabilities
    Liusie et al. 2023, Mitigating Word Bias in Zero-shot Prompt-based Classifiers

    Examples
    --------
    >>> x = np.array([[1, 0.9], [1, 0.8], [1, 0.2], [1, 0.1]])  # all look more like the first class
    >>> plain, even = (ClassPrior(np.eye(2), scale=10, strength=s).fit(x) for s in (0, 1))
    >>> plain.predict(x).tolist(), even.predict(x).tolist()
    ([0, 0, 0, 0], [1, 1, 0, 0])
    >>> even.predict_proba(x).mean(0).round(3).tolist()
    [0.5, 0.5]
    """

    def __init__(
        self,
        text: Any,
        *,
        correction: str = "match",
        prior: Sequence[float] | None = None,
        scale: float = 100.0,
        strength: float = 1.0,
        names: Sequence[str] | None = None,
    ):
        self.text = text
        self.correction = correction
        self.prior = prior
        self.scale = scale
        self.strength = strength
        self.names = names

    def fit(self, features: Any, labels: Any = None) -> ClassPrior:
        """Find the constants.

        Parameters
        ----------
        features : vectors of n unlabelled images, shape (n, dim), or `Features`; "shift" only checks them
        labels : not used
        """
        text = as_text(self.text, self.names)
        check_choice("correction", self.correction, ("match", "shift", "estimate"))
        check_range("scale", self.scale, 0)
        check_range("strength", self.strength, 0)
        if self.correction == "estimate" and self.prior is not None:
            raise ClipworksError('prior must be None where correction is "estimate", which finds it.')
        prior = _shares(self.prior, len(text))
        x = as_vectors("features", features, text.shape[1], least=1)
        logits = self.scale * (x @ text.T).astype(np.float64)
        if self.correction == "match":
            bias = _match(logits, prior)
        else:
            prior = _estimate(logits) if self.correction == "estimate" else prior
            bias = np.log(np.maximum(prior, 1e-12))
        self.text_, self.prior_, self.bias_ = text, prior, bias - bias.mean()
        self.classes_ = np.arange(len(text)) if self.names is None else np.array(list(self.names))
        return self

    def decision_function(self, features: Any) -> np.ndarray:
        """Scaled cosines with the constants added; shape (n, C)."""
        if not hasattr(self, "bias_"):
            raise NotFittedError("fit ClassPrior with unlabelled images before using it.")
        x = as_vectors("features", features, self.text_.shape[1])
        return self.scale * (x @ self.text_.T).astype(np.float64) + self.strength * self.bias_

    def predict_proba(self, features: Any) -> np.ndarray:
        """Probability of each class; shape (n, C), rows sum to 1."""
        return softmax(self.decision_function(features))

    def predict(self, features: Any) -> np.ndarray:
        """The label of each image; shape (n,)."""
        scores = self.decision_function(features)
        return self.classes_[scores.argmax(1)]


def _shares(prior: Any, classes: int) -> np.ndarray:
    if prior is None:
        return np.full(classes, 1 / classes)
    found = np.asarray(prior, np.float64)
    if found.shape != (classes,) or not np.isfinite(found).all() or not (found > 0).all():
        raise ClipworksError(f"prior must be {classes} numbers above 0, one per class. Got {prior!r}.")
    return found / found.sum()


def _match(logits: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """The constants that make the mean softmax equal the prior, up to a common one."""

    def objective(bias: np.ndarray) -> tuple[float, np.ndarray]:
        shifted = logits + bias
        top = shifted.max(1, keepdims=True)
        weights = np.exp(shifted - top)
        sums = weights.sum(1, keepdims=True)
        value = float((top + np.log(sums)).mean() - prior @ bias)
        return value, (weights / sums).mean(0) - prior

    options = {"maxiter": 5000, "maxfun": 10000, "gtol": 1e-7, "ftol": 1e-15}
    return minimize(objective, np.zeros(len(prior)), jac=True, method="L-BFGS-B", options=options).x


def _estimate(logits: np.ndarray, rounds: int = 2000, tolerance: float = 1e-8) -> np.ndarray:
    """Shares of the classes by expectation maximisation, from equal ones."""
    likely = softmax(logits)
    shares = np.full(logits.shape[1], 1 / logits.shape[1])
    for _ in range(rounds):
        inverse = 1 / np.maximum(likely @ shares, 1e-300)  # mean of likely * shares / its sum, as two products
        last, shares = shares, shares * (likely.T @ inverse) / len(likely)
        if np.abs(shares - last).max() < tolerance:
            break
    return shares / shares.sum()
