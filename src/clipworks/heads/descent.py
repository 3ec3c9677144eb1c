"""What the heads that are trained by gradient steps share: where they start, how they descend, how folds choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .common import Choice, Head, Shots, one_hot, unit

LENGTH = 10.0  # of CLIP's word vectors before they are made unit rows, 10 to 11; some releases train at that length


def anchors(words: np.ndarray | None, x: np.ndarray, y: np.ndarray, classes: int) -> np.ndarray:
    """Return unit vectors (C, dim) of the classes to start from: their words; without words the means of unit rows.

    >>> anchors(None, np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), np.array([0, 1, 1]), 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return unit(one_hot(y, classes).T @ unit(x)) if words is None else words


def single(*arrays: np.ndarray) -> list[torch.Tensor]:
    """Return arrays as float32 tensors, in which the heads are trained."""
    return [torch.tensor(array, dtype=torch.float32) for array in arrays]


def cosine_rate(step: int, steps: int) -> float:
    """Share of the first step size that is left at a step, falling from 1 to 0 as half a cosine.

    >>> [round(cosine_rate(step, 4), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    return (1 + math.cos(math.pi * step / steps)) / 2


def adam(loss: Callable[[], torch.Tensor], weights: Sequence[torch.Tensor], rate: float, steps: int) -> None:
    """Change weights in place by steps of Adam on a loss of all shots, its rate falling to 0 as half a cosine.

    The same as torch.optim.Adam, whose first step alone takes longer than all of these on a few hundred shots.
    """
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(steps):
        slopes = torch.autograd.grad(loss(), weights)
        now = rate * cosine_rate(step, steps) / (1 - 0.9 ** (step + 1))
        scale = 1 / math.sqrt(1 - 0.999 ** (step + 1))
        with torch.no_grad():
            for w, slope, mean, square in zip(weights, slopes, first, second, strict=True):
                mean.mul_(0.9).add_(slope, alpha=0.1)
                square.mul_(0.999).addcmul_(slope, slope, value=0.001)
                w.addcdiv_(mean, square.sqrt().mul_(scale).add_(1e-8), value=-now)


def lbfgs(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]],
    at: np.ndarray,
    curvature: np.ndarray,
    max_iter: int,
    gtol: float,
    ftol: float = 0.0,
    memory: int = 6,
) -> tuple[np.ndarray, float, float, int]:
    """Find the minimum of a smooth convex loss by L-BFGS, in the precision of `at`.

    The same as scipy's, whose own work on a matrix of weights, in float64, takes as long as the products with a
    thousand shots. Returns the minimum, its loss, the largest entry of the gradient there and the rounds.

    Parameters
    ----------
    loss : gives the loss at an array and its gradient there
    at : where to start
    curvature : about that of the loss along every entry (or one that broadcasts), which the first steps go by
    max_iter, gtol, ftol : ends after so many rounds, with a gradient that has no larger entry, or with a round that
        lowers the loss by no larger share
    memory : rounds whose change of the gradient is remembered

    References
    ----------
    Nocedal and Wright 2006, Numerical Optimization, algorithms 7.4 and 7.5

    Examples
    --------
    >>> def bowl(w):
    ...     return float(w @ w), 2 * w
    >>> at, value, steepest, rounds = lbfgs(bowl, np.array([3.0, 1.0]), np.full(2, 8.0), 9, 1e-9)
    >>> at.tolist(), rounds  # the first step is as long as the curvature given, the second as that which it found
    ([0.0, 0.0], 2)
    """
    square, noise = (1 / curvature).astype(at.dtype), 8 * float(np.finfo(at.dtype).eps)
    moves: list[tuple[np.ndarray, np.ndarray, float]] = []  # change of place and of gradient, 1 / their product
    value, slope = loss(at)
    rounds = 0
    while rounds < max_iter and abs(slope).max() > gtol:
        towards, shares = slope.copy(), []
        for moved, bent, inverse in reversed(moves):
            shares.append(inverse * np.vdot(moved, towards))
            towards -= shares[-1] * bent
        towards *= square
        if moves:
            moved, bent, inverse = moves[-1]
            towards *= 1 / (inverse * np.vdot(bent, square * bent))
        for (moved, bent, inverse), share in zip(moves, reversed(shares), strict=True):
            towards += (share - inverse * np.vdot(bent, towards)) * moved
        fall, step = float(np.vdot(slope, towards)), 1.0
        while True:
            there = at - at.dtype.type(step) * towards
            lower, new = loss(there)
            if lower <= value - 1e-4 * step * fall + noise * abs(value) or step < 1e-6:
                break
            # the minimum of the parabola through both values and the slope
            step = min(max(fall * step**2 / 2 / (lower - value + step * fall), 0.1 * step), 0.5 * step)
        moved, bent = there - at, new - slope
        product = float(np.vdot(moved, bent))
        if product > 0:
            moves = [*moves[-memory + 1 :], (moved, bent, 1 / product)]
        gain, at, value, slope = value - lower, there, lower, new
        rounds += 1
        if step < 1e-6 or (step == 1 and gain <= ftol * abs(value)):
            break
    return at, value, float(abs(slope).max()), rounds


def train_and_choose(
    head: Head,
    shots: Shots,
    folds: int,
    settings: Sequence[Any],
    train: Callable[[np.ndarray, np.ndarray, np.ndarray, Any], None],
) -> Choice:
    """Train with each setting on folds of the shots, offer what the held-out images get, train on all with the best.

    Parameters
    ----------
    head : whose `_scores` answers after `train`; its words are inside them, so none are added to the logits
    shots, folds : images, and in how many parts they are left out in turn
    settings : to choose from; the first one where nothing can be left out
    train : given unit rows, class numbers, vectors of the classes to start from and a setting, sets what is learned
    """
    words, head.text_ = head.text_, None

    def learn(rows: Any, setting: Any) -> None:
        x, y = shots.x[rows], shots.y[rows]
        train(unit(x), y, anchors(words, x, y, shots.classes), setting)

    splits = shots.splits(folds)
    choice = head._choice(*splits)
    for setting in settings if splits else ():
        scores = []
        for rows, held, _ in splits:
            learn(rows, setting)
            scores.append(head._scores(held))
        choice.offer(setting, np.concatenate(scores))
    learn(slice(None), choice.setting if splits else settings[0])
    return choice
