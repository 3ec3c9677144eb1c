"""Ridge regression onto the classes in closed form, its strength chosen exactly by leaving out every image.

Claim: least squares with an L2 penalty onto one-hot labels is a classifier about as good as logistic regression
(Rifkin et al.), and one decomposition of the features gives the answers, and the answers without each image, for a
whole grid of strengths (Golub et al.).

Formula: centred X = U S V^T, centred one-hot Y;  W(l) = V diag(s / (s^2 + l)) U^T Y;  hat matrix
H(l) = 1/n + U diag(s^2 / (s^2 + l)) U^T;  what image i would get without being seen: y_i - (y_i - H y)_i / (1 - H_ii),
for views of one image with the block of H in place of H_ii. Logits = SCALE * cos(x, t_c) + alpha * (W x + b)_c.

Paper: Rifkin, Yeo and Poggio 2003, Regularized Least-Squares Classification; leaving out in closed form: Golub, Heath
and Wahba 1979, Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter.
Differs from the papers: the strength with the highest accuracy on what was left out is taken, not the least error; the
intercept carries no penalty; the sum with zero-shot logits is that of GDA and Tip-Adapter. U, S and V come from the
eigenvectors of the smaller Gram matrix in float64, several times quicker than an SVD and exact to about 1e-9 at
strengths above 1e-6. The grid, 1e-3 to 1e3 in half decades, spans the eigenvalues of a few to some ten thousand rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import eigh

from ..errors import ClipworksError, check_range
from ..registry import method
from .common import ALPHAS, SCALE, Choice, Head, Shots, one_hot

STRENGTHS = tuple(float(10 ** (k / 2)) for k in range(-6, 7))


@method(card="few-shot-foundations", level="M")
class Ridge(Head):
    """Classify by ridge regression onto one-hot labels.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; adds zero-shot logits
    alpha : weight of the regression beside the words; default: the best of 0.01 ... 1e4 on images left out
    strength : penalty on the squared weights; default: the best of `strengths` on images left out
    strengths : penalties to try (1e-3 to 1e3 in half decades)

    Attributes
    ----------
    coef_, intercept_, strength_ : (C, dim), (C,), the penalty taken (1 where nothing can be left out)
    classes_, text_, alpha_, temperature_ : labels, words, weight, temperature of the probabilities

    Inputs
    ------
    features of labelled images

    Relations
    ---------
    `linear_probe` has the same form and another loss. With a very strong penalty the weights point from the mean of all
    images to the class means, times the size of the class: `nearest_mean` without its squares.

    References
    ----------
    Rifkin, Yeo and Poggio 2003, Regularized Least-Squares Classification

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> Ridge().fit(x, ["cat", "cat", "dog", "dog"]).predict([[0.8, 0.3]])
    array(['cat'], dtype='<U3')
    """

    effort = 1
    alphas = tuple(SCALE * a for a in ALPHAS)  # its scores lie in [0, 1], zero-shot logits in [-SCALE, SCALE]

    def __init__(
        self,
        text: Any = None,
        alpha: float | None = None,
        strength: float | None = None,
        strengths: Sequence[float] = STRENGTHS,
    ):
        self.text, self.alpha, self.strength, self.strengths = text, alpha, strength, strengths

    def _learn(self, shots: Shots) -> Choice:
        strengths = self._grid()
        path = Path.of(shots)
        choice = self._choice(shots.held)
        inside = None if shots.validation is None else (shots.validation[0] - path.mean) @ path.v
        for strength in strengths if len(choice.y) else ():
            if inside is None:
                choice.offer(strength, path.left_out(strength)[shots.testable])
            else:
                choice.offer(strength, inside @ path.weights(strength) + path.target_mean)
        self.strength_ = strengths[0] if len(strengths) == 1 else choice.setting or 1.0
        self.coef_ = (path.v @ path.weights(self.strength_)).T
        self.intercept_ = path.target_mean - self.coef_ @ path.mean
        return choice

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return x @ self.coef_.T + self.intercept_

    def _grid(self) -> list[float]:
        """Strengths to try, the strongest first."""
        if self.strength is not None:
            return [check_range("strength", self.strength, 1e-9)]
        if len(self.strengths) == 0:
            raise ClipworksError("strengths must hold at least one penalty. Got none.")
        return sorted((float(check_range("strengths", s, 1e-9)) for s in self.strengths), reverse=True)


@dataclass
class Path:
    """Everything about the shots that no strength changes: one decomposition, and the targets within it."""

    u: np.ndarray  # (n, r) left singular vectors of the centred rows
    squares: np.ndarray  # (r,) squared singular values
    v: np.ndarray  # (dim, r) right singular vectors
    inside: np.ndarray  # (r, C) u.T @ centred targets
    target: np.ndarray  # (n, C) one-hot
    target_mean: np.ndarray
    mean: np.ndarray  # of x
    groups: list[np.ndarray]  # rows of each image that has several views

    @classmethod
    def of(cls, shots: Shots) -> Path:
        mean = shots.x.mean(0)
        x = shots.x - mean
        wide = len(x) <= x.shape[1]
        squares, vectors = eigh(x @ x.T if wide else x.T @ x, driver="evd", overwrite_a=True, check_finite=False)
        kept = squares > max(squares[-1], 1e-300) * 1e-12
        squares, vectors = squares[kept], vectors[:, kept]
        u = vectors if wide else x @ (vectors / np.sqrt(squares))
        v = x.T @ (vectors / np.sqrt(squares)) if wide else vectors
        target = one_hot(shots.y, shots.classes)
        image = shots.images
        shared = np.flatnonzero(np.bincount(image) > 1)
        groups = [np.flatnonzero(image == k) for k in shared]
        return cls(u, squares, v, u.T @ (target - target.mean(0)), target, target.mean(0), mean, groups)

    def weights(self, strength: float) -> np.ndarray:
        """Return (r, C) weights on x @ v."""
        return (np.sqrt(self.squares) / (self.squares + strength))[:, None] * self.inside

    def left_out(self, strength: float) -> np.ndarray:
        """Return (n, C): what every row would get from the other images (without all views of its own)."""
        kept = self.squares / (self.squares + strength)
        residual = self.target - self.target_mean - self.u @ (kept[:, None] * self.inside)
        leverage = 1 / len(self.u) + (self.u**2) @ kept
        out = residual / np.maximum(1 - leverage, 1e-12)[:, None]
        for rows in self.groups:
            block = 1 / len(self.u) + (self.u[rows] * kept) @ self.u[rows].T
            out[rows] = np.linalg.lstsq(np.eye(len(rows)) - block, residual[rows], rcond=None)[0]
        return self.target - out
