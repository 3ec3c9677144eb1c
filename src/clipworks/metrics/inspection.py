"""How good an inspection is: sensitivity and its like, and what more stored images would bring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.metrics import roc_auc_score

from ..errors import ClipworksError, check_range


def inspection_report(defective: Any, score: Any, threshold: float = 0.5) -> dict[str, float]:
    """Return accuracy, sensitivity, specificity, precision, f1 and auc; NaN where there is nothing to divide by.

    Parameters
    ----------
    defective : n truth values, true for a defective part
    score : n numbers, higher for more surely defective (auc does not depend on their scale)
    threshold : parts above it are called defective; never choose it on the images that are reported

    Examples
    --------
    >>> found = inspection_report([1, 1, 0, 0], [0.9, 0.4, 0.2, 0.1])
    >>> found["sensitivity"], found["specificity"], found["auc"]
    (0.5, 1.0, 1.0)
    """
    truth, score = np.asarray(defective).astype(bool), np.asarray(score, float)
    if truth.ndim != 1 or score.shape != truth.shape or not len(truth):
        raise ClipworksError(f"score must have one number per part ({truth.shape}), at least one. Got {score.shape}.")
    if not np.isfinite(score).all():
        raise ClipworksError("score must be finite. Got NaN or infinity.")
    called = score > threshold
    hit, false = int((called & truth).sum()), int((called & ~truth).sum())
    missed, passed = int((~called & truth).sum()), int((~called & ~truth).sum())

    def share(part: int, whole: int) -> float:
        return part / whole if whole else float("nan")

    return {
        "accuracy": share(hit + passed, len(truth)),
        "sensitivity": share(hit, hit + missed),
        "specificity": share(passed, passed + false),
        "precision": share(hit, hit + false),
        "f1": share(2 * hit, 2 * hit + missed + false),
        "auc": float(roc_auc_score(truth, score)) if 0 < truth.sum() < len(truth) else float("nan"),
    }


def learning_curve(
    head: Any,
    x: np.ndarray,
    y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    sizes: Sequence[int] = (10, 20, 50, 100),
    repeats: int = 3,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Return the test accuracy of a head with so many images of each class, drawn anew in every repeat.

    Parameters
    ----------
    head : unfitted; a clone is fitted each time
    x, y : images to draw from; test_x, test_y : images that are never fitted
    sizes : images per class; a size that some class does not have is left out
    repeats, seed : draws per size; the same seed gives the same draws

    Returns
    -------
    list of {"per_class", "accuracy", "deviation"}: mean and standard deviation over the repeats
    """
    check_range("repeats", repeats, 1)
    y = np.asarray(y)
    members = [np.flatnonzero(y == label) for label in np.unique(y)]
    rng, rows = np.random.default_rng(seed), []
    for size in sizes:
        check_range("sizes", size, 1)
        if size > min(map(len, members)):
            continue
        found = []
        for _ in range(repeats):
            taken = np.concatenate([rng.permutation(own)[:size] for own in members])
            found.append(float(np.mean(clone(head).fit(x[taken], y[taken]).predict(test_x) == np.asarray(test_y))))
        rows.append({"per_class": size, "accuracy": float(np.mean(found)), "deviation": float(np.std(found))})
    return rows
