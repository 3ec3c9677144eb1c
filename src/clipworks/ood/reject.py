"""A reject option for any classifier: "none of these" by several scores at once, at a rate that is kept.

Claim: no score of unknown classes is best everywhere (MSP, energy and distance to the known images fail on different
ones); their mean rank is near the best of them without knowing which, and a conformal quantile keeps the share of known
images that are refused.

Formula: scores s_k of known images that the classifier was not fitted on;  rank_k(x) = share of reference images with
s_k below s_k(x);  combined(x) = mean_k rank_k(x);  x is unknown if combined(x) is at or below the conformal quantile
of the combined scores of further known images.

Papers: Hendrycks and Gimpel 2017 (MSP), Hendrycks et al. 2022 (MaxLogit), Liu et al. 2020 (energy), Ming et al. 2022
(MCM); Vovk et al. 2005, Algorithmic Learning in a Random World (the quantile).
Differs from the papers: the combination is this library's, none of theirs; they compare scores by AUROC and set the
threshold with labelled unknown images or not at all.
Defaults: energy and the nearest known image, which fail differently; a rate of 5 %, the field's point of comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.utils.validation import check_is_fitted

from ..errors import ClipworksError, check_choice, check_range
from ..heads.common import check_vectors, fold_numbers, unit
from ..registry import method
from ..types import Features
from ..zeroshot.open_set import lower_threshold
from .common import UNKNOWN
from .energy import energy
from .max_logit import max_logit
from .msp import msp

SCORES = ("msp", "max_logit", "energy", "nearest")
LOGIT_SCORES = {"msp": msp, "max_logit": max_logit, "energy": energy}


@method(card="clipn", level="MR")
class Reject(BaseEstimator):
    """Let a classifier answer "none of these".

    Parameters
    ----------
    classifier : anything on scikit-learn's contract: a head of this library, a scikit-learn classifier ...
    scores : which of "msp", "max_logit", "energy" (of the classifier's logits) and "nearest" (cosine with the nearest
        image that the classifier was fitted on); their ranks are averaged
    rate : share of images of known classes that may be refused
    folds : parts of the shots; each is scored by a classifier fitted on the others
    unknown : label of refused images; None for -1 where labels are numbers, "none of these" where they are words

    Attributes
    ----------
    classifier_ : fitted on all shots
    threshold_ : combined scores at or below it are unknown
    classes_ : of the classifier

    Inputs
    ------
    features of labelled images of known classes; no unknown image is seen

    Relations
    ---------
    `zeroshot.open_set` is this for class words, which need no folds as nothing is fitted. With one score the ranks
    change nothing, and all shots set the threshold; with several, half of them make the ranks.

    References
    ----------
    Hendrycks and Gimpel 2017; Liu et al. 2020; Ming et al. 2022; Vovk et al. 2005, Algorithmic Learning in a Random
    World

    Examples
    --------
    >>> from clipworks.heads.nearest_mean import NearestMean
    >>> rng = np.random.default_rng(0)
    >>> y = np.repeat([0, 1], 30)
    >>> x = np.eye(4)[y] + rng.normal(0, 0.1, (60, 4))
    >>> Reject(NearestMean(), scores=["nearest"]).fit(x, y).predict(np.eye(4))
    array([ 0,  1, -1, -1])
    """

    def __init__(
        self,
        classifier: Any,
        *,
        scores: Sequence[str] = ("energy", "nearest"),
        rate: float = 0.05,
        folds: int = 5,
        unknown: Any = None,
    ):
        self.classifier = classifier
        self.scores = scores
        self.rate = rate
        self.folds = folds
        self.unknown = unknown

    def fit(self, x: Any, y: Any = None) -> Reject:
        """Fit the classifier, and set the threshold with the shots that it is not fitted on.

        Parameters
        ----------
        x : vectors (n, dim), or `Features`
        y : n labels (default: those of `Features`); most classes need two images or more
        """
        if isinstance(self.scores, str) or not list(self.scores):
            raise ClipworksError(f"scores must be a list of names, at least one. Got {self.scores!r}.")
        for name in self.scores:
            check_choice("scores", name, SCORES)
        check_range("folds", self.folds, 2)
        if not is_classifier(self.classifier):
            kind = type(self.classifier).__name__
            raise ClipworksError(f"classifier must be a classifier on scikit-learn's contract. Got {kind}.")
        y = x.labels if y is None and isinstance(x, Features) else y
        vectors, labels = check_vectors(self, x, y, fit=True)
        codes = np.unique(labels, return_inverse=True)[1]
        fold = fold_numbers(codes, np.arange(len(codes)), self.folds)
        self.classifier_ = clone(self.classifier).fit(vectors, labels)
        self.classes_, self.shots_ = self.classifier_.classes_, unit(vectors)
        held: list[np.ndarray] = []
        for number in range(self.folds):
            out = fold == number
            if out.any():
                fitted = like(self.classifier, self.classifier_).fit(vectors[~out], labels[~out])
                held.append(self._table(fitted, unit(vectors[~out]), vectors[out]))
        if not held:
            raise ClipworksError("y must hold a class with two images or more: nothing can be left out. Got none.")
        table = np.concatenate(held)
        table = table[np.random.default_rng(0).permutation(len(table))]
        half = len(table) // 2 if len(self.scores) > 1 else 0
        self.reference_ = np.sort(table[:half] if half else table, axis=0)
        self.threshold_ = lower_threshold(self._combined(table[half:]), self.rate)
        return self

    def score_samples(self, x: Any) -> np.ndarray:
        """How surely each image is of a known class: the mean rank of its scores, in [0, 1]; with one score, it."""
        check_is_fitted(self, "threshold_")
        return self._combined(self._table(self.classifier_, self.shots_, check_vectors(self, x)))

    def decision_function(self, x: Any) -> np.ndarray:
        """The score less the threshold: above 0 for known; shape (n,)."""
        scores = self.score_samples(x)
        return scores - self.threshold_

    def predict(self, x: Any) -> np.ndarray:
        """The classifier's answer, or the label of unknown images."""
        known = self.decision_function(x) > 0
        found = np.asarray(self.classifier_.predict(check_vectors(self, x)))
        words = found.dtype.kind not in "biuf"
        unknown = (UNKNOWN if words else -1) if self.unknown is None else self.unknown
        return np.where(known, found.astype(object), unknown).astype(object if words else np.int64)

    def _table(self, classifier: Any, shots: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The scores (n, scores) of unit-independent vectors, by a fitted classifier and the shots it knows."""
        # one temperature for all folds: each would choose its own, and energies could not be compared
        heat = getattr(self.classifier_, "temperature_", 1.0)
        logits = logits_of(classifier, x) / heat if set(self.scores) - {"nearest"} else None
        columns = [(unit(x) @ shots.T).max(1) if name == "nearest" else LOGIT_SCORES[name](logits)
                   for name in self.scores]  # fmt: skip
        return np.stack(columns, 1)

    def _combined(self, table: np.ndarray) -> np.ndarray:
        if table.shape[1] == 1:
            return table[:, 0]
        ranks = [np.searchsorted(r, s, side="left") for r, s in zip(self.reference_.T, table.T, strict=True)]
        return np.mean(ranks, axis=0) / len(self.reference_)


def like(classifier: Any, fitted: Any) -> Any:
    """An unfitted copy with the settings that the fitted one chose for itself: None, with a value in `name_`.

    A fold that chose its own weight of the words, say, would have logits of another size.
    """
    made = clone(classifier)
    chosen = {name: getattr(fitted, name + "_", None) for name, value in made.get_params(deep=False).items()
              if value is None}  # fmt: skip
    return made.set_params(**{name: value for name, value in chosen.items() if isinstance(value, int | float)})


def logits_of(classifier: Any, x: np.ndarray) -> np.ndarray:
    """Logits (n, C) of a fitted classifier: those of a head, else decision values, else log probabilities."""
    if hasattr(classifier, "logits"):
        return classifier.logits(x)
    if hasattr(classifier, "decision_function"):
        found = np.asarray(classifier.decision_function(x))
        return np.stack([-found / 2, found / 2], 1) if found.ndim == 1 else found
    if hasattr(classifier, "predict_proba"):
        return np.log(np.maximum(classifier.predict_proba(x), 1e-300))
    kind = type(classifier).__name__
    raise ClipworksError(f"classifier must have logits, decision_function or predict_proba. {kind} has none.")
