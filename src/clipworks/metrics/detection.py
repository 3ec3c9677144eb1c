"""Detection of one kind among others: AUROC, AUPR, false positives at a given recall, the best F1.

All functions take scores (higher: more surely positive) and labels (true: positive). Which side is positive is a
convention: in the literature on unknown classes it is the known images, in that on defects the defective ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import rankdata

from ..errors import ClipworksError, check_range


def auroc(scores: Any, labels: Any) -> float:
    """Return the probability that a positive scores above a negative; ties count half.

    Parameters
    ----------
    scores : n numbers
    labels : n truth values; both kinds must occur

    Examples
    --------
    >>> auroc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1])
    0.875
    """
    scores, labels = check_scores(scores, labels)
    positives = int(labels.sum())
    below = rankdata(scores)[labels].sum() - positives * (positives + 1) / 2
    return float(below / (positives * (len(labels) - positives)))


def aupr(scores: Any, labels: Any) -> float:
    """Return the average precision: the precision at every threshold, weighted by the recall that it adds."""
    _, true, false = counts(*check_scores(scores, labels))
    recall = true / true[-1]
    return float(np.sum(np.diff(recall, prepend=0) * true / (true + false)))


def fpr_at_tpr(scores: Any, labels: Any, tpr: float = 0.95) -> float:
    """Return the share of negatives at or above the largest threshold that keeps at least `tpr` of the positives.

    Published codes differ: some interpolate between thresholds, some take the nearest one. This one interpolates not.
    """
    check_range("tpr", tpr, 0, 1)
    _, true, false = counts(*check_scores(scores, labels))
    return float(false[np.argmax(true >= tpr * true[-1] - 1e-9)] / false[-1])


def f1_max(scores: Any, labels: Any) -> tuple[float, float]:
    """Return the best F1 of all thresholds, and that threshold (positive: at or above it; of equal ones the largest).

    Found with labels, so it says what is possible, not what a threshold set beforehand reaches.
    """
    thresholds, true, false = counts(*check_scores(scores, labels))
    f1 = 2 * true / (true + false + true[-1])
    best = int(f1.argmax())
    return float(f1[best]), float(thresholds[best])


def counts(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the different scores, descending, and how many positives and negatives lie at or above each."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # the last of every run of equal scores
    true = np.cumsum(labels[order])[last]
    return ordered[last], true, last + 1 - true


def check_scores(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return scores as float64 and labels as truth values, both flat, or raise where they cannot be compared."""
    scores, labels = np.asarray(scores, np.float64).reshape(-1), np.asarray(labels).reshape(-1)
    if len(scores) != len(labels):
        raise ClipworksError(f"labels must have one entry per score ({len(scores)}). Got {len(labels)}.")
    if not np.isfinite(scores).all():
        raise ClipworksError(f"scores must be finite. Got NaN or infinity in {int((~np.isfinite(scores)).sum())}.")
    if not np.isin(labels, (0, 1)).all():
        raise ClipworksError(f"labels must be true or false. Got {labels[~np.isin(labels, (0, 1))][0]!r}.")
    labels = labels.astype(bool)
    if labels.all() or not labels.any():
        raise ClipworksError(f"labels must hold both kinds. Got {int(labels.sum())} positive of {len(labels)}.")
    return scores, labels
