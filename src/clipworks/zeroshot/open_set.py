"""Open set: "none of these" for images that even the best class does not fit, at a threshold from unlabelled images.

Claim: how well the best of the given names fits separates images of these classes from others without any training
(MCM, ImageNet against iNaturalist, ViT-B/16: AUROC 94.6 in the paper).

Formula: with c_j = <x, t_j>,  MCM = max_j softmax(c / T)_j (T = 1, on the cosines themselves),
MSP = max_j softmax(scale c)_j,  MaxLogit = max_j scale c_j,  energy = T log sum_j exp(scale c_j / T);  an image is
unknown if its score is at or below the threshold.

Papers: Ming et al. 2022, Delving into Out-of-Distribution Detection with Vision-Language Representations (MCM);
Hendrycks et al. 2022, Scaling Out-of-Distribution Detection for Real-World Settings (MaxLogit); Liu et al. 2020,
Energy-based Out-of-distribution Detection; collected in Wang et al. 2023, CLIPN for Zero-Shot OOD Detection.
Differs from the papers: they compare scores at 95 % of known images kept, chosen with labels. Here the threshold is the
conformal quantile of unlabelled images of the known classes (at most `rate` of further such images are refused, on
average over draws), or, for a mixed lot, the point where two normal curves fitted to its scores are equally likely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from ..errors import ClipworksError, check_choice, check_range
from ..metrics.conformal import conformal_quantile
from ..registry import method
from .sentences import as_text, as_vectors, softmax


def mcm(cosines: np.ndarray, scale: float = 100.0, temperature: float = 1.0) -> np.ndarray:
    """Maximum concept matching: the largest softmax probability of cosines / temperature; `scale` is not used."""
    return softmax(cosines / temperature).max(-1)


def msp(cosines: np.ndarray, scale: float = 100.0, temperature: float = 1.0) -> np.ndarray:
    """Maximum softmax probability of scale * cosines / temperature."""
    return softmax(scale * cosines / temperature).max(-1)


def max_logit(cosines: np.ndarray, scale: float = 100.0, temperature: float = 1.0) -> np.ndarray:
    """Largest of scale * cosines; `temperature` is not used."""
    return (scale * cosines).max(-1)


def energy(cosines: np.ndarray, scale: float = 100.0, temperature: float = 1.0) -> np.ndarray:
    """Negative free energy: temperature * logsumexp(scale * cosines / temperature)."""
    logits = scale * cosines / temperature
    top = logits.max(-1, keepdims=True)
    return temperature * (top[..., 0] + np.log(np.exp(logits - top).sum(-1)))


SCORES: dict[str, Callable[..., np.ndarray]] = {"mcm": mcm, "msp": msp, "max_logit": max_logit, "energy": energy}


@method(card="clipn", level="M")
class OpenSet(BaseEstimator):
    """Classify by words, or answer "none of these".

    Parameters
    ----------
    text : one vector per class, shape (C, dim), such as `class_vectors` gives
    score : "mcm", "msp", "max_logit" or "energy"; higher is more surely one of the classes
    rate : share of images of the known classes that may be refused, where the images given to `fit` are of these;
        None where they are mixed with others
    scale : sharpness of the logits (the encoder's `logit_scale`); "mcm" does not use it
    temperature : of the softmax or energy
    names : optional class names in the order of `text`; labels are then names, else positions, and -1 for unknown
    unknown : label of images of none of the classes, where names are given

    Attributes
    ----------
    threshold_ : scores at or below it are unknown
    scores_ : scores of the images it was fitted on, ascending
    classes_ : the labels, in the order of `text`

    Inputs
    ------
    feature vectors of unlabelled images; no label is seen

    Relations
    ---------
    With a threshold below all scores it is plain zero-shot. MCM with temperature 1 / scale is MSP. `class_prior`
    corrects which class is chosen; this, whether any is.

    References
    ----------
    Ming et al. 2022, Delving into Out-of-Distribution Detection with Vision-Language Representations

    Examples
    --------
    >>> x = np.array([[1, 0.1, 0.2], [0.1, 1, 0.3], [1, 0.2, 0.1], [0, 0.1, 1]])
    >>> known = OpenSet(np.eye(3)[:2], rate=0.25, names=["cat", "dog"]).fit(x[:3])
    >>> known.predict(x).tolist()
    ['cat', 'dog', 'none of these', 'none of these']
    """

    def __init__(
        self,
        text: Any,
        *,
        score: str = "mcm",
        rate: float | None = 0.05,
        scale: float = 100.0,
        temperature: float = 1.0,
        names: Sequence[str] | None = None,
        unknown: str = "none of these",
    ):
        self.text = text
        self.score = score
        self.rate = rate
        self.scale = scale
        self.temperature = temperature
        self.names = names
        self.unknown = unknown

    def fit(self, features: Any, labels: Any = None) -> OpenSet:
        """Set the threshold from unlabelled images.

        Parameters
        ----------
        features : vectors of n images, shape (n, dim), or `Features`; at least 1 / rate - 1 of them, for a mixed lot 4
        labels : not used
        """
        text = as_text(self.text, self.names)
        check_choice("score", self.score, SCORES)
        check_range("scale", self.scale, 0)
        if not self.temperature > 0:
            raise ClipworksError(f"temperature must be above 0. Got {self.temperature!r}.")
        if len(text) == 1 and self.score in ("mcm", "msp"):
            raise ClipworksError(f"score must be 'max_logit' or 'energy' for one class. Got {self.score!r}, always 1.")
        if self.names is not None and self.unknown in list(self.names):
            raise ClipworksError(f"unknown must differ from the names. Got {self.unknown!r}.")
        x = as_vectors("features", features, text.shape[1], least=1)
        self.text_ = text
        self.classes_ = np.arange(len(text)) if self.names is None else np.array(list(self.names))
        scores = np.sort(self._scores(x @ text.T))
        threshold = _between(scores) if self.rate is None else lower_threshold(scores, self.rate)
        self.scores_, self.threshold_ = scores, threshold
        return self

    def score_samples(self, features: Any) -> np.ndarray:
        """How surely each image is of one of the classes; shape (n,)."""
        return self._scores(self._cosines(features))

    def decision_function(self, features: Any) -> np.ndarray:
        """The score less the threshold: above 0 for known; shape (n,)."""
        return self.score_samples(features) - self.threshold_

    def p_values(self, features: Any) -> np.ndarray:
        """Share of fitted images, with the image itself, that score no higher: small for unknown; shape (n,).

        If the fitted images and this one come from the same known classes, it is at most p with probability at most p.
        """
        at_most = np.searchsorted(self.scores_, self.score_samples(features), side="right")
        return (1 + at_most) / (len(self.scores_) + 1)

    def predict(self, features: Any) -> np.ndarray:
        """The class of each image, or -1 (with names: `unknown`); shape (n,)."""
        cosines = self._cosines(features)
        found = self.classes_[cosines.argmax(1)]
        nothing = -1 if self.names is None else self.unknown
        return np.where(self._scores(cosines) > self.threshold_, found, nothing)

    def _cosines(self, features: Any) -> np.ndarray:
        if not hasattr(self, "threshold_"):
            raise NotFittedError("fit OpenSet with unlabelled images before using it.")
        return as_vectors("features", features, self.text_.shape[1]) @ self.text_.T

    def _scores(self, cosines: np.ndarray) -> np.ndarray:
        return SCORES[self.score](cosines.astype(np.float64), self.scale, self.temperature)


def lower_threshold(scores: np.ndarray, rate: float) -> float:
    """Return the score that a further one is at or below with probability at most `rate`.

    Raises
    ------
    ClipworksError
        If there are too few scores for the rate.
    """
    need = fewest(rate)
    threshold = -conformal_quantile(-scores, rate)
    if threshold == -math.inf:
        raise ClipworksError(f"features must hold at least {need} vectors for a rate of {rate}. Got {len(scores)}.")
    return threshold


def fewest(rate: float) -> int:
    """How many scores a rate needs.

    >>> fewest(0.05)
    19
    """
    if not 0 < rate < 1:
        raise ClipworksError(f"rate must lie between 0 and 1, or be None for a mixed lot. Got {rate!r}.")
    return math.ceil(1 / rate - 1 - 1e-9)


def _between(scores: np.ndarray) -> float:
    """Where the lower of two normal curves, fitted to the scores, gives way to the upper one."""
    from sklearn.mixture import GaussianMixture

    if len(scores) < 4 or np.ptp(scores) < 1e-12:
        raise ClipworksError(f"features must hold at least 4 different vectors for a mixed lot. Got {len(scores)}.")
    centre, spread = scores.mean(), scores.std()
    z = ((scores - centre) / spread)[:, None]  # the fit's floor on variances is absolute
    half = np.array([[z[: len(z) // 2].mean()], [z[len(z) // 2 :].mean()]])
    fit = GaussianMixture(2, means_init=half, weights_init=[0.5, 0.5], random_state=0, max_iter=500).fit(z)
    low, high = np.sort(fit.means_[:, 0])
    upper = int(fit.means_[:, 0].argmax())
    grid = np.linspace(low, high, 2001)  # between the means the upper curve takes over once
    over = fit.predict_proba(grid[:, None])[:, upper] >= 0.5
    cut = grid[over.argmax()] if over.any() else high
    return float(centre + spread * cut)
