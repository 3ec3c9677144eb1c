"""CLAP: class prototypes that start at the words and are held to them by as much as the words already know.

Claim: a linear probe that starts at the words and is penalised for leaving them, class by class, needs no validation
images to choose anything and still comes near or above adapters that are tuned on large validation sets.

Formula: logits = SCALE * cos(x, w_c);  min over w of  CE + penalty * mean_c l_c |w_c - t_c|^2,  w_c starting at t_c;
l_c = mean zero-shot probability of the true class over the shots of c, so a class that its word describes well stays.

Paper: Silva-Rodriguez et al. 2024, A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models (CVPR).
Differs from the paper: every step is on all shots, not on batches of 256; augmented views (release: 20 of each image)
are up to whoever embeds the images. The penalty's part of a step is implicit, so that no weight makes it diverge:
w <- (w - rate * grad CE(w) + 0.9 (w - w_before) + 2 rate k t) / (1 + 2 rate k), k = penalty * l / C. Step size 0.1 and
300 steps are the release's; momentum and the falling rate are what its framework has by default. There the words keep
the length that CLIP gives them, about 10, which sets how much a step and the penalty mean: `length`.
The multipliers stay what they are at the start (the paper's outer steps change them no further).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import check_range
from ..registry import method
from .common import SCALE, Choice, Head, Shots, softmax, unit, zero_shot
from .descent import LENGTH, cosine_rate, single, train_and_choose

MOMENTUM = 0.9


@method(card="few-shot-foundations", level="M")
class CLAP(Head):
    """Classify by prototypes that are trained from the words and penalised for leaving them.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; without text the means of
        the classes stand in their place
    alpha : None; the words are inside the prototypes, and no zero-shot logits are added
    penalty : factor of all multipliers; 0 leaves a probe that starts at the words, a large one leaves the words
    length : of the words when training starts
    lr, steps : first step size, which falls as half a cosine, and number of steps
    folds : parts of the shots that are left out in turn, for the temperature alone

    Attributes
    ----------
    prototypes_, multipliers_ : (C, dim) of any length, (C,)
    classes_, temperature_ : labels, temperature of the probabilities

    Inputs
    ------
    features of labelled images; rows are brought to length 1

    Relations
    ---------
    `task_res` trains the same prototypes by Adam without a penalty; `cross_modal` keeps the words as shots instead.

    References
    ----------
    Silva-Rodriguez et al. 2024, A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models

    Examples
    --------
    >>> words, x = np.eye(2, 4), np.array([[0.8, 0, 0.6, 0], [0.9, 0, 0.3, 0], [0.4, 0.3, 0, 0.8], [0.5, 0.3, 0, 0.7]])
    >>> head = CLAP(text=words, steps=30).fit(x, [0, 0, 1, 1])
    >>> head.predict([[0.5, 0.4, 0, 0.6]])  # the words alone say 0
    array([1])
    """

    effort = 3

    def __init__(
        self,
        text: Any = None,
        alpha: None = None,
        penalty: float = 1.0,
        length: float = LENGTH,
        lr: float = 0.1,
        steps: int = 300,
        folds: int = 5,
    ):
        self.text, self.alpha, self.penalty, self.length = text, alpha, penalty, length
        self.lr, self.steps, self.folds = lr, steps, folds

    def _learn(self, shots: Shots) -> Choice:
        check_range("penalty", self.penalty, 0)
        check_range("length", self.length, 1e-6)
        check_range("lr", self.lr, 0)
        check_range("steps", self.steps, 0)
        check_range("folds", self.folds, 2)
        return train_and_choose(self, shots, self.folds, [self.penalty], self._train)

    def _train(self, x: np.ndarray, y: np.ndarray, start: np.ndarray, penalty: float) -> None:
        classes, own = len(start), softmax(zero_shot(x, start))[np.arange(len(y)), y]
        self.multipliers_ = np.bincount(y, own, classes) / np.bincount(y, minlength=classes)
        held = single(penalty * self.multipliers_ / classes)[0][:, None]
        rows, target = single(x, self.length * start)
        label = torch.as_tensor(y)
        w = before = target
        for step in range(self.steps):
            rate = self.lr * cosine_rate(step, self.steps)
            moved = w - rate * slope(w, rows, label) + MOMENTUM * (w - before)
            w, before = (moved + 2 * rate * held * target) / (1 + 2 * rate * held), w
        self.prototypes_ = w.double().numpy()

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return zero_shot(x, unit(self.prototypes_))


def slope(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the gradient in w (C, dim) of the mean cross-entropy of SCALE * cos(x, w), for unit rows x (n, dim)."""
    length = w.norm(dim=1, keepdim=True)
    direction = w / length
    off = torch.softmax(SCALE * x @ direction.T, 1)
    off[torch.arange(len(y)), y] -= 1
    pull = SCALE / len(y) * off.T @ x
    return (pull - (pull * direction).sum(1, keepdim=True) * direction) / length
