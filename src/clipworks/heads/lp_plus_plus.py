"""LP++: a linear probe beside the words, each class with a weight of its own for its word; step sizes are derived.

Claim: the standard linear probe is a far stronger baseline than reported once the words enter its scores with trained
weights per class and its step sizes come from the curvature of the loss (mean of 11 data sets, 16 shots: 80.3 %).

Formula: logits_c = w_c x + b_c + a_c <x, t_c>;  min over w, b, a of CE, by steps on all shots with momentum 0.9;
w starts at the class sums of the shots, b at 0, every a_c at 250 * mean own-class similarity;
step size of w and b: 4 N / lambda_max(X^T X), of a: N / (4 max_c sum_i <x_i, t_c>^2), every tenth step.

Paper: Shakeri et al. 2024, LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP (CVPR).
Differs from the paper: the step that is kept is the best on folds of the shots (release: on validation images), among
equals the earliest; where nothing can be left out, all steps are taken. a moves by its gradient at that step; the
release, which never clears it, by the sum of all gradients so far. Class sums are the release's; the paper has means.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import check_range
from ..registry import method
from .common import Choice, Head, Shots, one_hot, unit
from .descent import single

MOMENTUM, EVERY = 0.9, 10


@method(card="few-shot-foundations", level="M")
class LPPlusPlus(Head):
    """Classify by a linear probe that blends in the words class by class.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; without text: no words
    alpha : None; the words are inside the probe, with weights per class, and no zero-shot logits are added
    steps : most steps taken
    folds : parts of the shots that are left out in turn

    Attributes
    ----------
    coef_, intercept_ : (C, dim), (C,)
    word_weights_ : (C,), or None without text
    step_ : the step kept, 0 for the start
    classes_, temperature_ : labels, temperature of the probabilities

    Inputs
    ------
    features of labelled images; beside words, rows are brought to length 1

    Relations
    ---------
    `linear_probe` goes to the minimum of the same loss with a penalty; its one weight for all words is `alpha`.

    References
    ----------
    Shakeri et al. 2024, LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP

    Examples
    --------
    >>> words, x = np.eye(2, 4), np.array([[0.8, 0, 0.6, 0], [0.9, 0, 0.3, 0], [0.4, 0.3, 0, 0.8], [0.5, 0.3, 0, 0.7]])
    >>> head = LPPlusPlus(text=words, steps=30).fit(x, [0, 0, 1, 1])
    >>> head.predict([[0.5, 0.4, 0, 0.6]])  # the words alone say 0
    array([1])
    """

    def __init__(self, text: Any = None, alpha: None = None, steps: int = 300, folds: int = 5):
        self.text, self.alpha, self.steps, self.folds = text, alpha, steps, folds

    def _learn(self, shots: Shots) -> Choice:
        check_range("steps", self.steps, 0)
        check_range("folds", self.folds, 2)
        self._words, self.text_ = self.text_, None  # they are inside the scores: nothing is added to the logits
        splits = shots.splits(self.folds)
        choice = self._choice(*splits)
        paths = [descent(self._rows(shots.x[rows]), shots.y[rows], shots.classes, self._words) for rows, *_ in splits]
        held = [single(self._rows(x))[0] for _, x, _ in splits]
        words = None if self._words is None else single(self._words)[0]
        for step, probes in zip(range(self.steps + 1), zip(*paths, strict=True), strict=False):
            scores = [probe.scores(rows, words) for probe, rows in zip(probes, held, strict=True)]
            choice.offer(step, torch.cat(scores).double().numpy())
        self.step_ = choice.setting if splits else self.steps
        last = next(islice(descent(self._rows(shots.x), shots.y, shots.classes, self._words), self.step_, None))
        self.coef_, self.intercept_ = last.w.double().numpy(), last.b.double().numpy()
        self.word_weights_ = None if self._words is None else last.a.double().numpy()
        return choice

    def _scores(self, x: np.ndarray) -> np.ndarray:
        rows = self._rows(x)
        scores = rows @ self.coef_.T + self.intercept_
        return scores if self._words is None else scores + self.word_weights_ * (rows @ self._words.T)

    def _rows(self, x: np.ndarray) -> np.ndarray:
        """Rows beside words have length 1 as they do; without words they stay as they are."""
        return x if self._words is None else unit(x)


class Probe(NamedTuple):
    """Weights (C, dim), intercepts (C,) and weights of the words (C,)."""

    w: torch.Tensor
    b: torch.Tensor
    a: torch.Tensor

    def scores(self, x: torch.Tensor, words: torch.Tensor | None) -> torch.Tensor:
        found = x @ self.w.T + self.b
        return found if words is None else found + self.a * (x @ words.T)


def descent(x: np.ndarray, y: np.ndarray, classes: int, words: np.ndarray | None) -> Iterator[Probe]:
    """Yield the probe at the start and after every step, without end."""
    n, member = len(x), one_hot(y, classes)
    gram = x.T @ x if n > x.shape[1] else x @ x.T
    similarity = np.zeros((n, classes)) if words is None else x @ words.T
    rate_w = 4 * n / max(np.linalg.eigvalsh(gram)[-1], 1e-12)
    rate_a = n / (4 * max((similarity**2).sum(0).max(), 1e-12))
    own = (similarity * member).sum(0) / np.maximum(member.sum(0), 1)  # mean over the shots of each class
    rows, shown, label, w = single(x, similarity, member, member.T @ x)
    b, a = torch.zeros(classes), torch.full((classes,), 250 * float(own.mean()))
    moved_w, moved_b = torch.zeros_like(w), torch.zeros_like(b)
    step = 0
    while True:
        yield Probe(w, b, a)
        step += 1
        off = (torch.softmax(rows @ w.T + b + a * shown, 1) - label) / n
        moved_w, moved_b = MOMENTUM * moved_w + off.T @ rows, MOMENTUM * moved_b + off.sum(0)
        w, b = w - rate_w * moved_w, b - rate_w * moved_b
        if step % EVERY == 0 and words is not None:
            a = a - rate_a * (off * shown).sum(0)
