"""Words that look alike: which they are, and the loss that tells a reader how wrong each would be (FDP's DQA)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import ClipworksError, check_range
from .common import edit_distance

CANDIDATES, OFFSET, SHORT = 5, 0.1, 5


def look_alikes(word: str, vocabulary: Sequence[str], count: int = CANDIDATES) -> dict[str, int]:
    """Words of a vocabulary within an edit distance of 1 (words of five letters and fewer) or 2, nearest first.

    The vocabulary must be of training words: words of the test set among them would tell what is asked there.

    >>> look_alikes("cat", ["cat", "hat", "cats", "dog", "chart"])
    {'hat': 1, 'cats': 1}
    """
    most = 1 if len(word) <= SHORT else 2
    found = {other: edit_distance(word, other, most) for other in vocabulary if other != word}
    near = sorted((d, i, other) for i, (other, d) in enumerate(found.items()) if d <= most)
    return {other: d for d, _, other in near[:count]}


def dqa_target(words: Sequence[str], vocabulary: Sequence[str], temperature: float = 1.0) -> torch.Tensor:
    """Target distributions (n, V): softmax(1 / (d + 0.1)) over each word and its look-alikes, 0 elsewhere.

    Parameters
    ----------
    words : n words, all in the vocabulary
    vocabulary : V words; one that occurs twice shares what it gets
    temperature : divides the exponent; at 1 (paper) a word keeps 0.9995 and more for itself
    """
    check_range("temperature", temperature, 1e-6)
    columns: dict[str, list[int]] = {}
    for j, word in enumerate(vocabulary):
        columns.setdefault(word, []).append(j)
    target = np.zeros((len(words), len(vocabulary)))
    for i, word in enumerate(words):
        if word not in columns:
            raise ClipworksError(f"words must be in the vocabulary. {word!r} is not.")
        near = {word: 0, **look_alikes(word, list(columns))}
        raw = np.array([1 / (d + OFFSET) for d in near.values()]) / temperature
        weights = np.exp(raw - raw.max())
        for other, weight in zip(near, weights / weights.sum(), strict=True):
            target[i, columns[other]] = weight / len(columns[other])
    return torch.from_numpy(target).float()


def dqa_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over rows of KL(target || softmax(logits)); both of shape (n, V)."""
    if logits.shape != target.shape:
        raise ClipworksError(f"target must have the shape {tuple(logits.shape)}. Got {tuple(target.shape)}.")
    return torch.nn.functional.kl_div(logits.log_softmax(1), target.to(logits.dtype), reduction="batchmean")
