"""k nearest neighbours: an image gets the class of the shots most like it.

Claim: with no training at all, the vote of the nearest training images tells how far features group the classes; it is
the usual check of an encoder beside the linear probe (Caron et al.).

Formula: N_k(x) = the k shots nearest to x;  score_c = sum_{i in N_k, y_i = c} v_i / sum_{i in N_k} v_i, with v_i = 1
or v_i = exp(cos(x, x_i) / 0.07);  logits = SCALE * cos(x, t_c) + alpha * SCALE * score_c where class words are given.

Paper: Cover and Hart 1967, Nearest Neighbor Pattern Classification; votes by similarity: Caron et al. 2021, Emerging
Properties in Self-Supervised Vision Transformers.
Differs from the papers: k is chosen by leaving out every shot; shares of votes become probabilities by a temperature.
Every class needs as many shots for a fair vote; k stays below the number of shots. The 0.07 is that of Caron et al.;
they try 10, 20, 100 and 200 neighbours, the grid here begins lower, for sets of few shots.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import check_choice, check_range
from ..registry import method
from .common import SCALE, Choice, Head, Shots, unit

METRICS, WEIGHTS = ("cosine", "euclidean"), ("uniform", "similarity")
NEIGHBOURS = (1, 3, 5, 10, 20, 50)
TEMPERATURE = 0.07  # of votes by similarity
CELLS = 1 << 24  # similarities held at a time


@method(card="few-shot-foundations", level="M")
class KNN(Head):
    """Classify by the vote of the nearest shots.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; adds zero-shot logits
    alpha : weight of the vote beside the words; default: the best of 1e-4 ... 100 on images left out
    k : how many neighbours vote; default: the best of 1, 3, 5, 10, 20, 50 on images left out
    metric : "euclidean" or "cosine", by which neighbours are near (the same for unit rows)
    weights : "uniform", or "similarity" for exp(cos / 0.07) per vote

    Attributes
    ----------
    k_ : the k taken (1 where nothing can be left out)
    classes_, text_, alpha_, temperature_ : labels, words, weight, temperature of the probabilities

    Inputs
    ------
    features of labelled images

    Relations
    ---------
    With k = all shots and votes by similarity it is the cache of Tip-Adapter with its sum brought to 1. With one
    shot per class and k=1 it is `nearest_mean`.

    References
    ----------
    Cover and Hart 1967, Nearest Neighbor Pattern Classification

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> KNN(k=1).fit(x, ["cat", "cat", "dog", "dog"]).predict([[0.8, 0.3]])
    array(['cat'], dtype='<U3')
    """

    effort = 1

    def __init__(
        self,
        text: Any = None,
        alpha: float | None = None,
        k: int | None = None,
        metric: str = "euclidean",
        weights: str = "uniform",
    ):
        self.text, self.alpha, self.k, self.metric, self.weights = text, alpha, k, metric, weights

    def _learn(self, shots: Shots) -> Choice:
        check_choice("metric", self.metric, METRICS)
        check_choice("weights", self.weights, WEIGHTS)
        if self.k is not None:
            check_range("k", self.k, 1, len(shots.y))
        self.shots_, self.owners_ = shots.x, shots.y
        tried = tuple(k for k in NEIGHBOURS if k < len(shots.y)) if self.k is None else (self.k,)
        choice, votes = self._choice(shots.held), self._votes(shots.held[0], tried, shots.held_images, shots.images)
        for k, scores in zip(tried, votes, strict=True):
            choice.offer(k, scores)
        self.k_ = int(self.k or choice.setting or 1)
        return choice

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return self._votes(x, (self.k_,))[0]

    def _votes(
        self, x: np.ndarray, tried: tuple[int, ...], image: np.ndarray | None = None, images: np.ndarray | None = None
    ) -> np.ndarray:
        """Scores (len(tried), m, C) of rows; shots of a row's own image are passed over where images are given."""
        found = np.zeros((len(tried), len(x), len(self.classes_)))
        size = max(1, CELLS // len(self.shots_))
        shots, most = unit(self.shots_), max(tried, default=1)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            cosine = unit(x[part]) @ shots.T
            near = cosine.copy() if self.metric == "cosine" else x[part] @ self.shots_.T - (self.shots_**2).sum(1) / 2
            if image is not None:
                near[image[part, None] == images] = -np.inf
            best = nearest(near, most)
            closeness = np.take_along_axis(near, best, 1)
            value = np.ones_like(closeness)
            if self.weights == "similarity":
                value = np.exp((np.take_along_axis(cosine, best, 1) - 1) / TEMPERATURE)
            value[np.isinf(closeness)] = 0
            rows = np.arange(start, start + len(best))
            for t, k in enumerate(tried):
                for j in range(k):
                    np.add.at(found[t], (rows, self.owners_[best[:, j]]), value[:, j])
        return SCALE * found / np.maximum(found.sum(2, keepdims=True), 1e-300)


def nearest(near: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of the k largest values of every row, largest first; among equals the first column.

    >>> nearest(np.array([[0.1, 0.9, 0.5, 0.9]]), 3)
    array([[1, 3, 2]])
    """
    if 4 * k < near.shape[1]:
        kept = np.sort(np.argpartition(-near, k - 1, axis=1)[:, :k], axis=1)
        order = np.argsort(-np.take_along_axis(near, kept, 1), axis=1, kind="stable")
        return np.take_along_axis(kept, order, 1)
    return np.argsort(-near, axis=1, kind="stable")[:, :k]
