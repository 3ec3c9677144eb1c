"""Linear probe: multinomial logistic regression on frozen features, its penalty chosen by cross-validation.

Claim: on features of CLIP a linear classifier rivals fine-tuned networks on most data sets with all training images,
but with one or two shots per class it stays below zero-shot (46 % against 65 % with one shot, mean of 11 sets).

Formula: min over W, b of  C * sum_i w_i * (-log softmax(W x_i + b)_{y_i}) + |W|^2 / 2, by L-BFGS;
logits = SCALE * cos(x, t_c) + alpha * (W x + b)_c where class words t_c are given.

Paper: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, section 3.2.
Differs from the paper: C is chosen by cross-validation on the shots instead of a validation set (which `validation=`
brings back), among the decades of the paper's range (paper: every second one, then eight halvings). Fits for the choice
are in float32, stop early and start from the last value of C; the search goes from strong penalties to weak and ends
where the shots are fitted, as weaker penalties change their answers no more. The last fit starts from the mean of the
folds' and goes on at `tol`, in float64 where float32 cannot tell. How L-BFGS runs is told in `regression.py`.
Two classes have two rows of weights, so the minimum is that of the two-class form of scikit-learn at twice the C.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import check_range
from ..registry import method
from .common import Choice, Head, Shots
from .regression import Regression

GRID = tuple(10.0**k for k in range(-2, 7))  # stronger penalties give the direction of the class means, as 1e-2 does
FITTED = 0.1  # of the loss of a guess: with less left the shots are fitted
ONE_SHOT_C = 100.0  # where nothing can be left out: unit rows then get logits of a few units


@method(card="few-shot-foundations", level="M")
class LinearProbe(Head):
    """Classify by logistic regression.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; adds zero-shot logits
    alpha : weight of the probe beside the words; default: the best of 1e-4 ... 100 on images left out
    C : inverse strength of the penalty; default: the best on images left out
    folds : parts of the shots that are left out in turn (3: the choice among decades is no surer with more)
    max_iter, tol : of the last fit: rounds, and the largest entry of the gradient per image (1e-4: as scikit-learn)

    Attributes
    ----------
    coef_, intercept_, C_, n_iter_ : (C, dim), (C,), the C taken (100 where nothing can be left out), rounds of L-BFGS
    classes_, text_, alpha_, temperature_ : labels, words, weight, temperature of the probabilities

    Inputs
    ------
    features of labelled images

    Relations
    ---------
    `cross_modal` is the same with the class words among the shots; `ridge` has least squares as its loss.

    References
    ----------
    Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> LinearProbe().fit(x, ["cat", "cat", "dog", "dog"]).predict([[0.8, 0.3]])
    array(['cat'], dtype='<U3')
    """

    steady = True

    def __init__(
        self,
        text: Any = None,
        alpha: float | None = None,
        C: float | None = None,
        folds: int = 3,
        max_iter: int = 1000,
        tol: float = 1e-4,
    ):
        self.text, self.alpha, self.C, self.folds = text, alpha, C, folds
        self.max_iter, self.tol = max_iter, tol

    def _learn(self, shots: Shots) -> Choice:
        check_range("folds", self.folds, 2)
        if self.C is not None:
            check_range("C", self.C, 1e-12)
        whole, splits = Regression(shots.x, shots.y, shots.classes), shots.splits(self.folds)
        choice = self._choice(*splits)
        among = shots.validation is None  # the rows themselves: what is held out of some are the others
        parts = [whole.split(rows, None if among else held) for rows, held, _ in splits]
        search(choice, whole, parts, self.C)
        self.C_ = float(self.C or choice.setting or ONE_SHOT_C)
        self.coef_, self.intercept_, self.n_iter_ = whole.fit(self.C_, self.max_iter, self.tol)
        return choice

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return x @ self.coef_.T + self.intercept_


def search(choice: Choice, whole: Regression, splits: list[tuple[Regression, np.ndarray]], only: float | None) -> None:
    """Offer values of C to a choice, from strong penalties to weak, until they fit the shots of every split.

    Parameters
    ----------
    choice : made for the held-out images, split by split
    whole : the problem of all shots, which starts from the mean solution at the best C
    splits : the training part and the rotated held-out rows of each
    only : the one value to offer, or None
    """
    start = whole.at, whole.moves
    for c in (GRID if only is None else (only,)) if splits else ():
        choice.offer(c, np.concatenate([part.step(c, rows) for part, rows in splits]).astype(float))
        if choice.setting == c:
            start = np.mean([part.at for part, _ in splits], 0), splits[-1][0].moves
        if all(part.value < FITTED * np.log(part.classes) for part, _ in splits):
            break
    whole.start(*start)
