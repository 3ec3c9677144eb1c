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
