"""Cross-modal probe: logistic regression on the shots and the class words together, the words as further shots.

Claim: a text encoder in the same space makes the class name one more training sample; a linear classifier on images and
words together beats adapters and prompts of more parts with few shots (Lin et al.).

Formula: min over W, b of  C * ( sum_i -log softmax(W x_i + b)_{y_i} + sum_c v_c * -log softmax(W t_c + b)_c )
+ |W|^2 / 2 with v_c = share * (shots / classes), all rows of length 1; logits = W x + b.

Paper: Lin et al. 2023, Multimodality Helps Unimodality: Cross-Modal Few-Shot Learning with Multimodal Models (CVPR).
Differs from the paper: the minimum itself by L-BFGS with its penalty from folds of the shots, instead of AdamW from the
words' weights to an early stop on a validation set, so the start does not matter; there is an intercept; augmented
views are up to whoever embeds the images. share = 1 gives words and images the same weight in all, as the paper's
batches do, half words and half images. The words are in training in every fold; only images are held out.
The word of a class without shots also takes the weight of the shots that it lacks, as many as the other classes have in
the mean; otherwise the intercept alone would keep such a class from being found.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import check_range
from ..registry import method
from .common import Choice, Head, Shots, unit
from .linear_probe import ONE_SHOT_C, search
from .regression import Regression


@method(card="few-shot-foundations", level="MR")
class CrossModalProbe(Head):
    """Classify by logistic regression on images and words.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; classes without any shot
        are learned from their word; without text this is `linear_probe` on unit rows
    alpha : None; the words are inside the probe, and no zero-shot logits are added
    C : inverse strength of the penalty; default: the best on images left out
    share : weight of all words, in units of the weight of all images (1: paper)
    folds : parts of the shots that are left out in turn
    max_iter, tol : of the last fit: rounds, and the largest entry of the gradient per image (1e-4: as scikit-learn)

    Attributes
    ----------
    coef_, intercept_, C_, n_iter_ : (C, dim), (C,), the C taken (100 where nothing can be left out), rounds of L-BFGS
    classes_, temperature_ : labels, temperature of the probabilities

    Inputs
    ------
    features of labelled images and of class words, of one encoder; rows are brought to length 1

    Relations
    ---------
    With share=0, or without text, it is `linear_probe`; there words are added to the logits instead.

    References
    ----------
    Lin et al. 2023, Multimodality Helps Unimodality: Cross-Modal Few-Shot Learning with Multimodal Models

    Examples
    --------
    >>> words, x = np.eye(3), np.array([[0.9, 0.1, 0.0], [0.8, 0.0, 0.1], [0.1, 0.9, 0.0], [0.0, 0.8, 0.1]])
    >>> CrossModalProbe(text=words).fit(x, [0, 0, 1, 1]).predict([[0.1, 0.1, 0.9]])  # no shot of class 2
    array([2])
    """

    unseen, steady = True, True

    def __init__(
        self,
        text: Any = None,
        alpha: None = None,
        C: float | None = None,
        share: float = 1.0,
        folds: int = 3,
        max_iter: int = 1000,
        tol: float = 1e-4,
    ):
        self.text, self.alpha, self.C, self.share = text, alpha, C, share
        self.folds, self.max_iter, self.tol = folds, max_iter, tol

    def _learn(self, shots: Shots) -> Choice:
        check_range("folds", self.folds, 2)
        check_range("share", self.share, 0)
        if self.C is not None:
            check_range("C", self.C, 1e-12)
        rows, own, words = self._rows(shots.x), shots.y, self.text_
        weight, number = np.ones(len(rows)), len(rows)
        if words is not None and self.share > 0:
            rows, own = np.concatenate([rows, words]), np.append(own, np.arange(len(words)))
            count = np.bincount(shots.y, minlength=len(words))
            lacking = np.where(count == 0, number / (count > 0).sum(), 0.0)
            weight = np.append(weight, self.share * number / len(words) + lacking)
        self.text_ = None  # the words are in the weights: nothing is added to the logits
        whole, splits = Regression(rows, own, shots.classes, weight), shots.splits(self.folds)
        choice = self._choice(*splits)
        always, among = np.arange(number, len(rows)), shots.validation is None  # the words are in every part
        parts = [whole.split(np.append(part, always), None if among else self._rows(held)) for part, held, _ in splits]
        search(choice, whole, parts, self.C)
        self.C_ = float(self.C or choice.setting or ONE_SHOT_C)
        self.coef_, self.intercept_, self.n_iter_ = whole.fit(self.C_, self.max_iter, self.tol)
        return choice

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return self._rows(x) @ self.coef_.T + self.intercept_

    def _rows(self, x: np.ndarray) -> np.ndarray:
        """Rows beside words have length 1 as they do; without words they stay as they are."""
        return x if self.text is None else unit(x)
