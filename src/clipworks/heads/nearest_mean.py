"""Nearest class mean: an image belongs to the class whose mean vector is nearest.

Claim: means of class vectors adapt to new classes at no cost in training and, on good features, come close to
classifiers that are trained (Mensink et al.); with few shots they are what prototypical networks compare with.

Formula: mu_c = mean of the vectors of class c;  score = -SCALE / 2 * |x - mu_c|^2, or SCALE * cos(x, mu_c);
logits = SCALE * cos(x, t_c) + alpha * score where class words t_c are given.

Paper: Mensink et al. 2013, Distance-Based Image Classification: Generalizing to New Classes at Near-Zero Cost; as a
few-shot classifier: Snell et al. 2017, Prototypical Networks for Few-shot Learning.
Differs from the papers: no metric is learned, the features are taken as they are; the sum with zero-shot logits is that
of GDA and Tip-Adapter. Means are not brought back to length 1 (Euclidean); with cosine their length does not matter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import check_choice
from ..registry import method
from .common import SCALE, Choice, Head, Shots, one_hot, unit

METRICS = ("euclidean", "cosine")


@method(card="few-shot-foundations", level="M")
class NearestMean(Head):
    """Classify by the nearest class mean.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; adds zero-shot logits
    alpha : weight of the means beside the words; default: the best of 1e-4 ... 100 on images left out
    metric : "euclidean" or "cosine"

    Attributes
    ----------
    means_ : (C, dim)
    classes_, text_, alpha_, temperature_ : labels, words, weight, temperature of the probabilities

    Inputs
    ------
    features of labelled images

    Relations
    ---------
    `gda` measures the distance by the scatter of the shots; with an identity in its place it is this. With one shot per
    class it is `knn` with k=1.

    References
    ----------
    Mensink et al. 2013, Distance-Based Image Classification: Generalizing to New Classes at Near-Zero Cost

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> NearestMean().fit(x, ["cat", "cat", "dog", "dog"]).predict([[0.8, 0.3]])
    array(['cat'], dtype='<U3')
    """

    effort = 1

    def __init__(self, text: Any = None, alpha: float | None = None, metric: str = "euclidean"):
        self.text, self.alpha, self.metric = text, alpha, metric

    def _learn(self, shots: Shots) -> Choice:
        check_choice("metric", self.metric, METRICS)
        member = one_hot(shots.y, shots.classes)
        sums, count = member.T @ shots.x, member.sum(0)
        self.means_ = sums / count[:, None]
        choice = self._choice(shots.held)
        if shots.validation is None:
            choice.offer(None, self._left_out(shots, sums, count)[shots.testable])
        else:
            choice.offer(None, self._scores(shots.held[0]))
        return choice

    def _left_out(self, shots: Shots, sums: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Scores of every shot with its own image taken out of its class's mean; no other mean changes."""
        scores, image = self._scores(shots.x), shots.images
        views = np.zeros((image.max() + 1, shots.x.shape[1]))
        np.add.at(views, image, shots.x)
        size = np.maximum(count[shots.y] - np.bincount(image)[image], 1)
        rest = (sums[shots.y] - views[image]) / size[:, None]
        scores[np.arange(len(shots.y)), shots.y] = self._score(shots.x, rest)
        return scores

    def _score(self, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Score of row i against mean i."""
        if self.metric == "cosine":
            return SCALE * (unit(x) * unit(mean)).sum(1)
        return -SCALE / 2 * ((x - mean) ** 2).sum(1)

    def _scores(self, x: np.ndarray) -> np.ndarray:
        if self.metric == "cosine":
            return SCALE * (unit(x) @ unit(self.means_).T)
        squares = (x**2).sum(1)[:, None] - 2 * x @ self.means_.T + (self.means_**2).sum(1)
        return -SCALE / 2 * squares
