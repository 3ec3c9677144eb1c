"""Linear probe: multinomial logistic regression on frozen features, its penalty chosen by cross-validation.

Claim: on features of CLIP a linear classifier rivals fine-tuned networks on most data sets with all training images,
but with one or two shots per class it stays below zero-shot (46 % against 65 % with one shot, mean of 11 sets).

Formula: min over W, b of  C * sum_i w_i * (-log softmax(W x_i + b)_{y_i}) + |W|^2 / 2, by L-BFGS;
logits = SCALE * cos(x, t_c) + alpha * (W x + b)_c where class words t_c are given.

Paper: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, section 3.2.
Differs from the paper: C is chosen by cross-validation on the shots instead of a validation set (which `validation=`
brings back), among the decades of the paper's range (paper: every second one, then eight halvings). L-BFGS runs in the
coordinates of the shots' principal axes, each divided by the square root of its expected curvature; the minimum is the
same. Fits for the choice are in float32, stop early and start from the last value of C; the search goes from strong
penalties to weak and ends where the shots are fitted, as weaker penalties change their answers no more. The last fit
starts from the mean of the folds' and ends in float64, at `tol`.
Two classes have two rows of weights, so the minimum is that of the two-class form of scikit-learn at twice the C.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from scipy.linalg import eigh

from ..errors import check_range
from ..registry import method
from .common import Choice, Head, Shots, unit
from .descent import lbfgs

GRID = tuple(10.0**k for k in range(-2, 7))  # stronger penalties give the direction of the class means, as 1e-2 does
FITTED = 0.1  # of the loss of a guess: with less left the shots are fitted
SINGLE = 1e-5  # the gradient per image that float32 can tell from 0
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
        search(choice, whole, [(whole.part(rows), whole.rotate(held)) for rows, held, _ in splits], self.C)
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
    whole : the problem of all shots, which gets the mean solution at the best C to start from
    splits : the training part and the rotated held-out rows of each
    only : the one value to offer, or None
    """
    for c in (GRID if only is None else (only,)) if splits else ():
        choice.offer(c, np.concatenate([part.step(c, rows) for part, rows in splits]).astype(float))
        if choice.setting == c:
            whole.at = np.mean([part.at for part, _ in splits], 0)
        if all(part.value < FITTED * np.log(part.classes) for part, _ in splits):
            break


class Regression:
    """Penalised multinomial regression on one set of rows, prepared once for all strengths.

    Parameters
    ----------
    x, y, classes : rows (n, dim), their class numbers, how many classes there are
    weight : weights of the rows in the loss (default 1 each)
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, classes: int, weight: np.ndarray | None = None):
        self.weight = np.ones(len(x)) if weight is None else weight
        self.y, self.classes = y, classes
        self.mean = self.weight @ x / self.weight.sum()
        centred = x - self.mean
        root = np.sqrt(self.weight)[:, None] * centred
        wide = len(x) <= x.shape[1]
        squares, vectors = eigh(root @ root.T if wide else root.T @ root, driver="evd", check_finite=False)
        kept = squares > max(squares[-1], 1e-300) * 1e-12
        self.squares = squares[kept] / self.weight.sum()  # mean squares along the axes
        self.axes = unit((root.T @ vectors[:, kept] if wide else vectors[:, kept]).T).T
        self.x = x
        self.rows = self.rotate(x, np.float32)
        self.at = np.zeros((self.rows.shape[1], classes), np.float32)  # the last solution; its last row: intercepts
        self.value = np.inf  # of its loss and penalty

    def part(self, rows: np.ndarray) -> Regression:
        """The problem of some of the rows, in the same coordinates (which change the way to the minimum only)."""
        made = copy.copy(self)
        made.weight, made.y, made.rows = self.weight[rows], self.y[rows], self.rows[rows]
        return made

    def rotate(self, x: np.ndarray, kind: type = np.float32) -> np.ndarray:
        """Return rows in the coordinates of the shots, with a column of ones."""
        rotated = np.ones((len(x), self.axes.shape[1] + 1), kind)
        np.matmul((x - self.mean).astype(kind), self.axes.astype(kind), out=rotated[:, :-1])
        return rotated

    def step(self, c: float, held: np.ndarray) -> np.ndarray:
        """Return scores of rotated rows at C = c, roughly, from the last solution."""
        self.solve(c, self.rows, 100, SINGLE, 0.01)
        return held @ self.at

    def fit(self, c: float, max_iter: int, tol: float) -> tuple[np.ndarray, np.ndarray, int]:
        """Return weights (C, dim) and intercepts (C,) at C = c, and how many rounds it took."""
        steepest, rounds = self.solve(c, self.rows, max_iter, max(tol, SINGLE), 0.0)
        if steepest > tol:
            rounds += self.solve(c, self.rotate(self.x, np.float64), max_iter, tol, 0.0)[1]
        coef = (self.axes @ self.at[:-1]).T
        return coef, self.at[-1] - coef @ self.mean, max(rounds, 1)

    def solve(self, c: float, z: np.ndarray, max_iter: int, gtol: float, ftol: float) -> tuple[float, int]:
        """Move `at` to the minimum of loss + |W|^2 / (2 C), both per unit of weight.

        Returns the largest entry of the gradient there, and the rounds it took.
        """
        total, number = self.weight.sum(), np.arange(len(z))
        weight = (self.weight / total).astype(z.dtype)
        penalty = np.append(np.full(len(self.squares), 1 / (c * total)), 0.0).astype(z.dtype)[:, None]
        curvature = 0.5 / self.classes * np.append(self.squares, 1.0).astype(z.dtype)[:, None] + penalty

        def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
            logits = z @ at
            logits -= logits.max(1, keepdims=True)
            own = logits[number, self.y]
            np.exp(logits, out=logits)
            sums = logits.sum(1)
            value = weight @ (np.log(sums) - own).astype(float) + (penalty * at**2).sum(dtype=float) / 2
            logits *= (weight / sums)[:, None]
            logits[number, self.y] -= weight
            return float(value), z.T @ logits + penalty * at

        self.at, self.value, steepest, rounds = lbfgs(loss, self.at.astype(z.dtype), curvature, max_iter, gtol, ftol)
        return steepest, rounds
