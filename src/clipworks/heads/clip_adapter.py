"""CLIP-Adapter: a small network on the image vectors, mixed with the vectors as they were.

Claim: two small layers after the image encoder, blended with its own output, adapt CLIP to a task with a few images per
class, and are simpler than learned prompts and better.

Formula: A(x) = relu(W2 relu(W1 x)), dim -> dim / reduction -> dim, no bias;  x' = ratio * A(x) + (1 - ratio) * x;
logits = SCALE * cos(x', t_c);  min over W1, W2 of CE.

Paper: Gao et al. 2024, CLIP-Adapter: Better Vision-Language Models with Feature Adapters (IJCV).
Differs from the paper: every step is on all shots, by Adam with a falling rate, where the release takes many steps of
SGD on small batches; no augmented views unless they are given as rows. Ratio 0.2 and reduction 4 are the release's,
rate 1e-3 and 200 steps this library's; ratio None chooses on folds (the paper takes the best ratio for every data set).
Without bias A grows with x, so the length of the rows does not matter.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import check_range
from ..registry import method
from .common import SCALE, Choice, Head, Shots, unit, zero_shot
from .descent import adam, single, train_and_choose

RATIOS = (0.2, 0.4, 0.6, 0.8)


@method(card="few-shot-foundations", level="M")
class ClipAdapter(Head):
    """Classify by the words, after a small trained network has moved the images.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; without text the means of
        the classes stand in their place
    alpha : None; the words are what the moved images are compared with, and no zero-shot logits are added
    ratio : share of the network's output, in [0, 1]; None: the best of 0.2, 0.4, 0.6, 0.8 on images left out
    reduction : how many times narrower the inner layer is
    lr, steps : first step size of Adam, which falls as half a cosine, and number of steps
    folds : parts of the shots that are left out in turn
    seed : of the first weights

    Attributes
    ----------
    down_, up_, ratio_ : W1 (dim / reduction, dim), W2 (dim, dim / reduction), the ratio taken
    prototypes_ : unit rows (C, dim), the words
    classes_, temperature_ : labels, temperature of the probabilities

    Inputs
    ------
    features of labelled images; rows are brought to length 1

    Relations
    ---------
    With ratio=0 it is zero-shot classification. `task_res` and `clap` move the words instead of the images.

    References
    ----------
    Gao et al. 2024, CLIP-Adapter: Better Vision-Language Models with Feature Adapters

    Examples
    --------
    >>> words, x = np.eye(2, 4), np.array([[0.8, 0, 0.6, 0], [0.9, 0, 0.3, 0], [0.4, 0.3, 0, 0.8], [0.5, 0.3, 0, 0.7]])
    >>> head = ClipAdapter(text=words, reduction=1, lr=0.1, steps=60)
    >>> head.fit(x, [0, 0, 1, 1]).predict([[0.5, 0.4, 0, 0.6]])  # the words alone say 0
    array([1])
    """

    effort = 3

    def __init__(
        self,
        text: Any = None,
        alpha: None = None,
        ratio: float | None = 0.2,
        reduction: int = 4,
        lr: float = 1e-3,
        steps: int = 200,
        folds: int = 5,
        seed: int = 0,
    ):
        self.text, self.alpha, self.ratio, self.reduction = text, alpha, ratio, reduction
        self.lr, self.steps, self.folds, self.seed = lr, steps, folds, seed

    def _learn(self, shots: Shots) -> Choice:
        for name, least in (("lr", 0), ("steps", 0), ("reduction", 1), ("folds", 2)):
            check_range(name, getattr(self, name), least)
        if self.ratio is not None:
            check_range("ratio", self.ratio, 0, 1)
        return train_and_choose(self, shots, self.folds, RATIOS if self.ratio is None else (self.ratio,), self._train)

    def _train(self, x: np.ndarray, y: np.ndarray, start: np.ndarray, ratio: float) -> None:
        rows, words = single(x, start)
        dim = rows.shape[1]
        dice = torch.Generator().manual_seed(self.seed)
        down = first_weights(max(dim // self.reduction, 1), dim, dice)
        up = first_weights(dim, len(down), dice)
        label = torch.as_tensor(y)

        def loss() -> torch.Tensor:
            moved = ratio * torch.relu(torch.relu(rows @ down.T) @ up.T) + (1 - ratio) * rows
            return F.cross_entropy(SCALE * F.normalize(moved) @ words.T, label)

        adam(loss, [down, up], self.lr, self.steps)
        self.prototypes_, self.ratio_ = start, ratio
        self.down_, self.up_ = (w.detach().double().numpy() for w in (down, up))

    def _scores(self, x: np.ndarray) -> np.ndarray:
        rows = unit(x)
        added = np.maximum(np.maximum(rows @ self.down_.T, 0) @ self.up_.T, 0)
        return zero_shot(self.ratio_ * added + (1 - self.ratio_) * rows, self.prototypes_)


def first_weights(out: int, into: int, dice: torch.Generator) -> torch.Tensor:
    """Return weights (out, into), even in [-1, 1] / sqrt(into), as torch's linear layers start."""
    bound = 1 / math.sqrt(into)
    return torch.empty(out, into).uniform_(-bound, bound, generator=dice).requires_grad_()
