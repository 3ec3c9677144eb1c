"""TaskRes: the words of the classes plus a residual that is trained.

Claim: keeping the words fixed and learning what the task adds to them, independently of the text encoder, adapts CLIP
better than learned prompts, with as many numbers as the words have.

Formula: t'_c = t_c + scale * r_c;  logits = SCALE * cos(x, t'_c);  min over r of CE, r starting at 0.

Paper: Yu et al. 2023, Task Residual for Tuning Vision-Language Models (CVPR).
Differs from the paper: every step is on all shots, not on batches of 256; so there are as many steps as the paper has
epochs (100, from 16 shots per class on 200), and no augmented views unless they are given as rows. Scale 0.5 is the
paper's, 1 the released code's; None chooses on folds. There the words keep the length that CLIP gives them, about 10,
which sets how far a step of Adam turns them: `length`. Rate 2e-3 (the release has 2e-4 for ImageNet).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import check_range
from ..registry import method
from .common import SCALE, Choice, Head, Shots, unit, zero_shot
from .descent import LENGTH, adam, single, train_and_choose

SCALES = (0.1, 0.25, 0.5, 1.0, 2.0)


@method(card="few-shot-foundations", level="M")
class TaskRes(Head):
    """Classify by words that a trained residual has moved.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; without text the means of
        the classes stand in their place
    alpha : None; the words are inside the sum, and no zero-shot logits are added
    scale : of the residual; None: the best of 0.1 ... 2 on images left out
    length : of the words when the residual is added
    lr : first step size of Adam, which falls as half a cosine
    steps : number of steps; None: 100, from 16 shots per class on 200
    folds : parts of the shots that are left out in turn

    Attributes
    ----------
    residual_, prototypes_, scale_, steps_ : (C, dim), the sum (C, dim), scale and number of steps taken
    classes_, temperature_ : labels, temperature of the probabilities

    Inputs
    ------
    features of labelled images; rows are brought to length 1

    Relations
    ---------
    `clap` holds the same prototypes to the words by a penalty; `clip_adapter` moves the images instead of the words.

    References
    ----------
    Yu et al. 2023, Task Residual for Tuning Vision-Language Models

    Examples
    --------
    >>> words, x = np.eye(2, 4), np.array([[0.8, 0, 0.6, 0], [0.9, 0, 0.3, 0], [0.4, 0.3, 0, 0.8], [0.5, 0.3, 0, 0.7]])
    >>> head = TaskRes(text=words, lr=0.1, steps=20).fit(x, [0, 0, 1, 1])
    >>> head.predict([[0.5, 0.4, 0, 0.6]])  # the words alone say 0
    array([1])
    """

    effort = 3

    def __init__(
        self,
        text: Any = None,
        alpha: None = None,
        scale: float | None = 0.5,
        length: float = LENGTH,
        lr: float = 2e-3,
        steps: int | None = None,
        folds: int = 5,
    ):
        self.text, self.alpha, self.scale, self.length = text, alpha, scale, length
        self.lr, self.steps, self.folds = lr, steps, folds

    def _learn(self, shots: Shots) -> Choice:
        for name, least in (("scale", 0), ("length", 1e-6), ("lr", 0), ("steps", 0), ("folds", 2)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), least)
        self.steps_ = self.steps if self.steps is not None else 100 if len(shots.y) < 16 * shots.classes else 200
        return train_and_choose(self, shots, self.folds, SCALES if self.scale is None else (self.scale,), self._train)

    def _train(self, x: np.ndarray, y: np.ndarray, start: np.ndarray, scale: float) -> None:
        rows, base = single(x, self.length * start)
        label, residual = torch.as_tensor(y), torch.zeros_like(base, requires_grad=True)

        def loss() -> torch.Tensor:
            return F.cross_entropy(SCALE * rows @ F.normalize(base + scale * residual).T, label)

        adam(loss, [residual], self.lr, self.steps_)
        self.scale_, self.residual_ = scale, residual.detach().double().numpy()
        self.prototypes_ = self.length * start + scale * self.residual_

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return zero_shot(x, unit(self.prototypes_))
