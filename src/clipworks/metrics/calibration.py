"""Calibration: whether predictions that are 80 % sure are right 80 % of the time.

All functions take probabilities (n, C) and the numbers of the true classes (n,). The probability of the predicted class
is its confidence. The temperature that calibrates logits is found by `heads.common.fit_temperature`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ClipworksError, check_choice, check_range

BINS = 15
SPACING = ("width", "count")


@dataclass
class Reliability:
    """Predictions in bins of their confidence; only bins that hold some.

    Attributes
    ----------
    low, high : ends of each bin (b,), which holds low < confidence <= high; with bins of equal count its extremes
    count, confidence, accuracy : predictions in it, their mean confidence, the share of them that is right (b,)
    """

    low: np.ndarray
    high: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """Mean distance of accuracy and confidence, every bin weighing as many predictions as it holds."""
        return float(self.count @ np.abs(self.accuracy - self.confidence) / self.count.sum())

    @property
    def worst(self) -> float:
        """Greatest distance of accuracy and confidence (maximum calibration error)."""
        return float(np.abs(self.accuracy - self.confidence).max())

    def as_rows(self) -> list[dict[str, float]]:
        """One dictionary per bin, for tables and files."""
        names = ("low", "high", "count", "confidence", "accuracy")
        columns = [getattr(self, name).tolist() for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def reliability(probabilities: Any, labels: Any, bins: int = BINS, spacing: str = "width") -> Reliability:
    """Return the reliability table of the predicted classes.

    Parameters
    ----------
    probabilities : (n, C), rows sum to 1
    labels : n numbers of classes
    bins : how many
    spacing : "width", equal parts of [0, 1]; "count", parts with equally many predictions (equal ones stay together)

    Examples
    --------
    >>> found = reliability([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]], [0, 1, 1], bins=10)
    >>> found.count.tolist(), found.accuracy.tolist(), round(found.error, 3)
    ([1, 2], [1.0, 0.5], 0.4)
    """
    p, y = check_probabilities(probabilities, labels)
    return _table(p.max(1), p.argmax(1) == y, bins, spacing)


def expected_calibration_error(probabilities: Any, labels: Any, bins: int = BINS) -> float:
    """Return ECE = sum_b n_b / n * |accuracy_b - confidence_b| over bins of equal width (Guo et al. 2017).

    >>> round(expected_calibration_error([[0.8, 0.2]] * 5, [0, 0, 0, 0, 1]), 6)  # as sure as it deserves to be
    0.0
    """
    return reliability(probabilities, labels, bins).error


def adaptive_calibration_error(probabilities: Any, labels: Any, bins: int = BINS) -> float:
    """Return the same over bins that hold equally many predictions, so that none rests on a few.

    >>> round(adaptive_calibration_error([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.7, 0.3]], [0, 0, 0, 1], bins=2), 3)
    0.15
    """
    return reliability(probabilities, labels, bins, "count").error


def classwise_calibration_error(probabilities: Any, labels: Any, bins: int = BINS) -> float:
    """Return the mean over classes of the error of each class's probability, predicted or not (Kull et al. 2019).

    >>> classwise_calibration_error([[0.5, 0.5, 0.0]] * 4, [0, 0, 1, 1])
    0.0
    """
    p, y = check_probabilities(probabilities, labels)
    return float(np.mean([_table(p[:, c], y == c, bins, "width").error for c in range(p.shape[1])]))


def brier_score(probabilities: Any, labels: Any) -> float:
    """Return the mean over predictions of sum_k (p_k - 1[y = k])^2, in [0, 2].

    >>> brier_score([[1.0, 0.0], [0.5, 0.5]], [0, 0])
    0.25
    """
    p, y = check_probabilities(probabilities, labels)
    own = p[np.arange(len(y)), y]
    return float(np.mean((p**2).sum(1) - 2 * own + 1))


def negative_log_likelihood(probabilities: Any, labels: Any) -> float:
    """Return the mean of -log p of the true class; a probability of 0 counts as the smallest step from 1, 2e-16.

    >>> round(negative_log_likelihood([[0.5, 0.5], [0.25, 0.75]], [0, 0]), 4)  # log(8) / 2
    1.0397
    """
    p, y = check_probabilities(probabilities, labels)
    return float(-np.log(np.maximum(p[np.arange(len(y)), y], np.finfo(np.float64).eps)).mean())


def check_probabilities(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities as float64 (n, C) and labels as class numbers (n,), or raise naming what is wrong."""
    p = probabilities.detach().cpu().numpy() if hasattr(probabilities, "detach") else probabilities
    y = labels.detach().cpu().numpy() if hasattr(labels, "detach") else labels
    try:
        p, y = np.asarray(p, np.float64), np.asarray(y)
    except (TypeError, ValueError):
        raise ClipworksError(
            f"probabilities must be a matrix of numbers. Got {type(probabilities).__name__}."
        ) from None
    if p.ndim != 2 or not p.size:
        raise ClipworksError(f"probabilities must be of shape (n, C), at least one row. Got shape {p.shape}.")
    if not np.isfinite(p).all() or p.min() < 0 or np.abs(p.sum(1) - 1).max() > 1e-3:
        bad = int((~(np.abs(p.sum(1) - 1) <= 1e-3) | ~(p.min(1) >= 0)).argmax())
        raise ClipworksError(f"probabilities must be at least 0 and sum to 1 in every row. Row {bad} does not.")
    if y.shape != (len(p),) or y.dtype.kind not in "iu":
        raise ClipworksError(f"labels must be {len(p)} numbers of classes. Got {y.dtype} of shape {y.shape}.")
    if y.min() < 0 or y.max() >= p.shape[1]:
        wrong = int(y[(y < 0) | (y >= p.shape[1])][0])
        raise ClipworksError(f"labels must lie in [0, {p.shape[1] - 1}], the columns of probabilities. Got {wrong}.")
    return p, y


def _table(confidence: np.ndarray, right: np.ndarray, bins: int, spacing: str) -> Reliability:
    check_range("bins", bins, 1)
    check_choice("spacing", spacing, SPACING)
    confidence = np.clip(confidence, 0, 1)  # rows may sum to a hair more than 1
    edges = np.linspace(0, 1, bins + 1)
    if spacing == "width":
        of = np.maximum(np.searchsorted(edges, confidence, side="left") - 1, 0)
    else:  # by how many are less sure, which is the same for equal ones in any order
        of = np.searchsorted(np.sort(confidence), confidence, side="left") * bins // len(confidence)
    kept, of, count = np.unique(of, return_inverse=True, return_counts=True)
    mean = np.bincount(of, confidence) / count
    share = np.bincount(of, right) / count
    if spacing == "width":
        return Reliability(edges[kept], edges[kept + 1], count, mean, share)
    low, high = np.ones(len(kept)), np.zeros(len(kept))
    np.minimum.at(low, of, confidence)
    np.maximum.at(high, of, confidence)
    return Reliability(low, high, count, mean, share)
