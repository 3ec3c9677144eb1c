"""Penalised multinomial regression on one set of rows, for one strength of the penalty after another, by L-BFGS."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from scipy.linalg import eigh

from .common import unit

SINGLE = 1e-5  # the gradient per image that float32 can tell from 0
MEMORY = 6  # steps of which L-BFGS remembers how they changed the gradient
FLAT = 0.9  # share of the slope at a step's start that may be left where it ends, as usual for quasi-Newton steps
TRIALS = 20  # lengths of a step that are tried; rounding alone needs so many
Moves = Sequence[tuple[np.ndarray, np.ndarray]]


class Regression:
    """Find min over W, b of  sum_i w_i * (-log softmax(W x_i + b)_{y_i}) + |W|^2 / (2 C), over the sum of the weights.

    The weights are sought in the coordinates of the rows' principal axes, where each has its own expected curvature;
    the minimum is the same. A step changes the logits by its length times (rows @ direction), so its length is found
    on logits, and a round of L-BFGS costs two products with the rows however many lengths it tries. What it has
    learned of the loss's curvature holds at every C, as the penalty's part is known.

    Parameters
    ----------
    x, y, classes : rows (n, dim), their class numbers, how many classes there are
    weight : weights of the rows in the loss (default 1 each)

    Attributes
    ----------
    at : the last solution, its last row the intercepts
    moves : the last changes of place, and of the gradient of the loss (without penalty) with them
    value : of loss and penalty

    References
    ----------
    Nocedal and Wright 2006, Numerical Optimization, algorithms 7.4 and 7.5
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, classes: int, weight: np.ndarray | None = None):
        self.weight = np.ones(len(x)) if weight is None else weight
        self.y, self.classes = y, classes
        self.mean = self.weight @ x / self.weight.sum()
        centred = x - self.mean
        root = centred if weight is None else np.sqrt(self.weight)[:, None] * centred
        wide = len(x) <= x.shape[1]
        squares, vectors = eigh(root @ root.T if wide else root.T @ root, driver="evd", check_finite=False)
        kept = squares > max(squares[-1], 1e-300) * 1e-12
        self.squares = squares[kept] / self.weight.sum()  # mean squares along the axes
        self.axes = unit((root.T @ vectors[:, kept] if wide else vectors[:, kept]).T).T
        self.x = x
        self.rows = self.rotate(x)
        self.value = np.inf
        self.start(np.zeros((self.rows.shape[1], classes), np.float32))

    def part(self, rows: np.ndarray) -> Regression:
        """The problem of some of the rows, in the same coordinates (which change the way to the minimum only)."""
        made = copy.copy(self)
        made.weight, made.y, made.rows = self.weight[rows], self.y[rows], self.rows[rows]
        return made

    def split(self, rows: np.ndarray, held: np.ndarray | None) -> tuple[Regression, np.ndarray]:
        """The problem of some of the rows, and what is held out, rotated: images of their own, or the other rows."""
        left = np.delete(self.rows, rows, 0) if held is None else self.rotate(held)
        return self.part(rows), left

    def start(self, at: np.ndarray, moves: Moves = ()) -> None:
        """Go on from other weights, with what was learned of the curvature there."""
        self.at, self.moves = at, moves
        self.seen: tuple[float, np.ndarray, np.ndarray] | None = None  # the loss at `at`, its gradient, the logits

    def rotate(self, x: np.ndarray, kind: type = np.float32) -> np.ndarray:
        """Return rows in the coordinates of the shots, with a column of ones."""
        rotated = np.ones((len(x), self.axes.shape[1] + 1), kind)
        np.matmul((x - self.mean).astype(kind), self.axes.astype(kind), out=rotated[:, :-1])
        return rotated

    def step(self, c: float, held: np.ndarray) -> np.ndarray:
        """Return scores of rotated rows at C = c, roughly, from the last solution."""
        self.solve(c, 100, SINGLE, 0.02)
        return held @ self.at

    def fit(self, c: float, max_iter: int, tol: float) -> tuple[np.ndarray, np.ndarray, int]:
        """Return weights (C, dim) and intercepts (C,) at C = c, and how many rounds it took."""
        steepest, rounds = self.solve(c, max_iter, max(tol, SINGLE), 0.0)
        if steepest > tol:
            self.rows = self.rotate(self.x, np.float64)
            self.start(self.at.astype(float), [(moved.astype(float), bent.astype(float)) for moved, bent in self.moves])
            rounds += self.solve(c, max_iter, tol, 0.0)[1]
        coef = (self.axes @ self.at[:-1]).T
        return coef, self.at[-1] - coef @ self.mean, max(rounds, 1)

    def solve(self, c: float, max_iter: int, gtol: float, ftol: float) -> tuple[float, int]:
        """Move `at` to the minimum, in the precision of the rows.

        Ends after `max_iter` rounds, with a gradient that has no entry above `gtol`, or with a round that lowers the
        value by no larger share than `ftol`. Returns the largest entry of the gradient, and the rounds it took.
        """
        total, kind = self.weight.sum(), self.rows.dtype
        weight = (self.weight / total).astype(kind)
        penalty = np.append(np.full(len(self.squares), 1 / (c * total)), 0.0).astype(kind)[:, None]
        curvature = 0.5 / self.classes * np.append(self.squares, 1.0).astype(kind)[:, None] + penalty
        at, moves = self.at, self.moves
        if self.seen is None:
            logits = self.rows @ at
            loss, chances = cross_entropy(logits, self.y, weight)
            self.seen = loss, self._slope(chances, weight), logits
        loss, slope, logits = self.seen
        value = loss + float(np.vdot(at, penalty * at)) / 2
        known, gradient = [(moved, bent + penalty * moved) for moved, bent in moves], slope + penalty * at
        rounds, gain = 0, np.inf
        while rounds < max_iter and abs(gradient).max() > gtol and gain > ftol * abs(value):
            towards = -quasi_newton(gradient, known, curvature)
            change = self.rows @ towards
            fall, pull = float(np.vdot(gradient, towards)), penalty * towards
            flat, bend = float(np.vdot(pull, at)), float(np.vdot(pull, towards))
            step, low, high = 1.0, 0.0, np.inf
            for _ in range(TRIALS):
                there = logits + kind.type(step) * change
                loss, chances = cross_entropy(there, self.y, weight)
                mean = np.einsum("nc,nc->n", chances, change)
                rise = float(weight @ (mean - change[np.arange(len(mean)), self.y])) + flat + step * bend
                if abs(rise) <= FLAT * abs(fall):
                    break
                steeper = float(weight @ (np.einsum("nc,nc,nc->n", chances, change, change) - mean**2)) + bend
                low, high = (step, high) if rise < 0 else (low, step)
                most, newton = min(high, 10 * step), step - rise / max(steeper, 1e-300)
                step = newton if low < newton < most else (low + most) / 2
            before, moved, logits = slope, kind.type(step) * towards, there
            at, slope = at + moved, self._slope(chances, weight)
            bent, pull = slope - before, penalty * at
            moves = [*moves[1 - MEMORY :], (moved, bent)]
            known = [*known[1 - MEMORY :], (moved, bent + penalty * moved)]
            lower, gradient = loss + float(np.vdot(at, pull)) / 2, slope + pull
            gain, value, rounds = value - lower, lower, rounds + 1
            if abs(rise) > FLAT * abs(fall):
                break
        self.at, self.moves, self.value, self.seen = at, moves, value, (loss, slope, logits)
        return float(abs(gradient).max()), rounds

    def _slope(self, chances: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Gradient of the loss where the classes have these probabilities, which are overwritten."""
        chances[np.arange(len(chances)), self.y] -= 1
        chances *= weight[:, None]
        return self.rows.T @ chances


def cross_entropy(logits: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
    """Return sum_i w_i * (-log softmax(logits_i)_{y_i}), and softmax(logits)."""
    chances = logits - logits.max(1, keepdims=True)
    own = chances[np.arange(len(y)), y]
    np.exp(chances, out=chances)
    sums = chances.sum(1)
    chances /= sums[:, None]
    return float(weight @ (np.log(sums) - own).astype(float)), chances


def quasi_newton(gradient: np.ndarray, moves: Moves, curvature: np.ndarray) -> np.ndarray:
    """Return gradient / curvature, corrected by how the last steps changed place and gradient.

    >>> half = quasi_newton(np.array([4.0, 2.0]), [], np.array([2.0, 2.0]))
    >>> half.tolist(), quasi_newton(np.array([4.0, 2.0]), [(half, 2 * half)], np.array([8.0, 8.0])).tolist()
    ([2.0, 1.0], [2.0, 1.0])
    """
    towards, shares = gradient.copy(), []
    inverses = [1 / np.vdot(moved, bent) for moved, bent in moves]
    for (moved, bent), inverse in zip(reversed(moves), reversed(inverses), strict=True):
        shares.append(inverse * np.vdot(moved, towards))
        towards -= shares[-1] * bent
    towards /= curvature
    if moves:
        bent = moves[-1][1]
        towards *= 1 / (inverses[-1] * np.vdot(bent, bent / curvature))
    for (moved, bent), inverse, share in zip(moves, inverses, reversed(shares), strict=True):
        towards += (share - inverse * np.vdot(bent, towards)) * moved
    return towards
