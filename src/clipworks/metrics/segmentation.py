"""How well masks agree with the truth: IoU from one confusion matrix over a data set, boundaries, panoptic quality.

Counts are added up over all images before anything is divided; a mean of images' IoUs is another, easier number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import ClipworksError, check_range

IGNORE = 255


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int, ignore: int = IGNORE) -> np.ndarray:
    """Count pixels by true class (row) and predicted class (column).

    Parameters
    ----------
    truth, prediction : integer label maps of one shape
    classes : number of classes C
    ignore : label of pixels in `truth` that do not count

    Returns
    -------
    int64 (C, C); matrices of several images add up

    Raises
    ------
    ClipworksError
        If the shapes differ, or a label that counts is not in [0, C).

    Examples
    --------
    >>> confusion(np.array([0, 0, 1, 255]), np.array([0, 1, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    if truth.shape != prediction.shape:
        raise ClipworksError(f"prediction must have the truth's shape {truth.shape}. Got {prediction.shape}.")
    kept = truth != ignore
    pairs = {"truth": truth[kept].astype(np.int64), "prediction": prediction[kept].astype(np.int64)}
    for name, values in pairs.items():
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise ClipworksError(f"{name} must hold labels from 0 to {classes - 1}. "
                                 f"Got {values.min()} to {values.max()}.")  # fmt: skip
    code = pairs["truth"] * classes + pairs["prediction"]
    return np.bincount(code, minlength=classes**2).reshape(classes, classes)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """IoU of every class from a confusion matrix; NaN where a class is neither true nor predicted anywhere."""
    counts = np.asarray(counts, np.float64)
    both = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - both
    return np.divide(both, union, out=np.full(len(both), np.nan), where=union > 0)


def mean_iou(counts: np.ndarray, classes: Sequence[int] | None = None) -> float:
    """Mean IoU over the classes that occur in truth or prediction, or over those of a list that do.

    >>> mean_iou(np.array([[2, 0, 0], [1, 1, 0], [0, 0, 0]]))
    0.5833333333333333
    """
    values = class_iou(counts)
    values = values if classes is None else values[list(classes)]
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def pixel_accuracy(counts: np.ndarray) -> float:
    """Share of the pixels that are right; NaN without pixels."""
    total = np.sum(counts)
    return float(np.trace(counts) / total) if total else float("nan")


def weighted_iou(counts: np.ndarray) -> float:
    """IoU of the classes weighted by how many pixels they truly have."""
    share = np.sum(counts, axis=1)
    return float((share * np.nan_to_num(class_iou(counts))).sum() / share.sum()) if share.sum() else float("nan")


def harmonic_iou(seen: float, unseen: float) -> float:
    """Harmonic mean of the IoU of seen and of unseen classes.

    >>> round(harmonic_iou(0.8, 0.2), 6)
    0.32
    """
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


def boundary(mask: np.ndarray, share: float = 0.02) -> np.ndarray:
    """The pixels of a mask within a distance of its contour; what lies outside the image counts as outside.

    Parameters
    ----------
    mask : bool (H, W)
    share : the distance, as a share of the image's diagonal (2 %, paper); at least one pixel
    """
    from scipy.ndimage import binary_erosion

    mask = np.asarray(mask, bool)
    steps = max(1, round(share * float(np.hypot(*mask.shape))))
    return mask & ~binary_erosion(mask, np.ones((3, 3), bool), iterations=steps)


def boundary_counts(
    truth: np.ndarray, prediction: np.ndarray, classes: int, ignore: int = IGNORE, share: float = 0.02
) -> np.ndarray:
    """Pixels in both boundaries and in either of them, for every class: (C, 2), to be added up over images.

    Cheng et al. 2021, Boundary IoU: Improving Object-Centric Image Segmentation Evaluation (CVPR).
    """
    check_range("share", share, 0, 1)
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    if truth.shape != prediction.shape:
        raise ClipworksError(f"prediction must have the truth's shape {truth.shape}. Got {prediction.shape}.")
    counts = np.zeros((classes, 2), np.int64)
    kept = truth != ignore
    for c in np.union1d(np.unique(truth[kept]), np.unique(prediction[kept])):
        one, two = boundary((truth == c), share) & kept, boundary((prediction == c), share) & kept
        counts[int(c)] = (one & two).sum(), (one | two).sum()
    return counts


def boundary_iou(counts: np.ndarray) -> float:
    """Mean over the classes that have a boundary of (pixels in both) / (pixels in either)."""
    both, either = np.asarray(counts, np.float64).T
    return float(np.mean(both[either > 0] / either[either > 0])) if (either > 0).any() else float("nan")


def panoptic_counts(
    truth: np.ndarray, truth_classes: Mapping[int, int], prediction: np.ndarray, classes: Mapping[int, int]
) -> dict[int, tuple[int, int, int, float]]:
    """Match segments of one image: of one class and with an IoU above a half, which no two can have with a third.

    Parameters
    ----------
    truth, prediction : segment numbers of every pixel; 0 is void in `truth` and "no segment" in `prediction`
    truth_classes, classes : segment number -> class

    Returns
    -------
    class -> (matches, predicted segments without a match, true ones without, sum of the matches' IoU); predicted
    segments that are void for more than half do not count
    """
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    numbers, inverse = np.unique(np.stack([truth.ravel(), prediction.ravel()]), axis=1, return_counts=True)
    overlap = {(int(a), int(b)): int(n) for (a, b), n in zip(numbers.T, inverse, strict=True)}
    true_area = {s: int((truth == s).sum()) for s in truth_classes}
    area = {s: int((prediction == s).sum()) for s in classes}
    found: dict[int, list[float]] = {c: [0, 0, 0, 0.0] for c in {*truth_classes.values(), *classes.values()}}
    matched: set[int] = set()
    for s, c in truth_classes.items():
        best = 0.0
        for p in classes:
            both = overlap.get((s, p), 0)
            if classes[p] == c and both:
                union = true_area[s] + area[p] - both - overlap.get((0, p), 0)
                if both / union > 0.5:
                    best = both / union
                    matched.add(p)
        found[c][0] += best > 0
        found[c][2] += best == 0
        found[c][3] += best
    for p, c in classes.items():
        if p not in matched and area[p] and overlap.get((0, p), 0) <= area[p] / 2:
            found[c][1] += 1
    return {c: (int(a), int(b), int(d), float(e)) for c, (a, b, d, e) in found.items()}


def panoptic_quality(counts: Mapping[int, Sequence[float]]) -> dict[str, float]:
    """Panoptic, segmentation and recognition quality, means over classes, from counts added up over images.

    >>> panoptic_quality({0: (2, 0, 1, 1.2)})
    {'pq': 0.48, 'sq': 0.6, 'rq': 0.8}
    """
    rows = []
    for hit, extra, missed, total in counts.values():
        if hit + extra + missed:
            good, found = total / hit if hit else 0.0, hit / (hit + extra / 2 + missed / 2)
            rows.append((good * found, good, found))
    if not rows:
        raise ClipworksError("counts must hold at least one segment. Got none.")
    return {name: round(float(v), 12) for name, v in zip(("pq", "sq", "rq"), np.mean(rows, axis=0), strict=True)}
