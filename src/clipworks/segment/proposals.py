"""Masks without names: of a promptable model at given boxes or at a grid of points, cleaned, without doubles.

The model is a `Predict` of `segment.prompts`, such as `open_sam(name)(image)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import check_range
from .prompts import Predict
from .visual_prompts import box_region

SMALLEST = 400  # pixels below which a hole is filled and an island dropped (FGVP's release)
MARGIN = 1.0  # of the logits, between which a stable mask does not change (SAM)


def box_masks(predict: Predict, size: tuple[int, int], boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """One mask per box, bool (N, H, W): the box itself where nothing is answered.

    Parameters
    ----------
    predict : of the image
    size : height and width of the image
    boxes : left, top, right, bottom in pixels
    """
    found = []
    for box in boxes:
        left, top, right, bottom = (round(v) for v in box)
        logits, _ = predict((left, top, right - 1, bottom - 1), None, None)
        mask = without_specks((logits > 0).cpu().numpy())
        found.append(mask if mask.any() else box_region(*size, box))
    return np.array(found, bool).reshape(-1, *size)


def point_masks(
    predict: Predict,
    size: tuple[int, int],
    *,
    points: int = 16,
    quality: float = 0.86,
    stable: float = 0.92,
    overlap: float = 0.7,
) -> np.ndarray:
    """Masks of everything, bool (N, H, W), best first: asked for at a grid of points, the doubtful ones left out.

    Parameters
    ----------
    predict : of the image
    size : height and width of the image
    points : along each side
    quality : IoU, as the model predicts it, from which on a mask is taken
    stable : IoU of the mask's tighter and wider form from which on it is taken
    overlap : IoU above which the lesser of two masks is a double
    """
    check_range("points", points, 1)
    height, width = size
    found, scores = [], []
    for y in (np.arange(points) + 0.5) * height / points:
        for x in (np.arange(points) + 0.5) * width / points:
            logits, score = predict(None, (int(x), int(y)), None)
            if score >= quality and stability(logits) >= stable:
                mask = without_specks((logits > 0).cpu().numpy())
                if mask.any():
                    found.append(mask)
                    scores.append(score)
    masks = np.array(found, bool).reshape(-1, height, width)
    return masks[without_doubles(masks, np.array(scores), overlap)]


def stability(logits: torch.Tensor, margin: float = MARGIN) -> float:
    """IoU of the masks at a threshold above and one below 0.

    >>> stability(torch.tensor([[3.0, 0.5], [-0.5, -3.0]]))
    0.3333333432674408
    """
    wide = (logits > -margin).sum()
    return float((logits > margin).sum() / wide) if wide else 0.0


def without_specks(mask: np.ndarray, smallest: int = SMALLEST) -> np.ndarray:
    """A mask (H, W) with small holes filled and small islands dropped; if all are small, the largest stays."""
    from scipy.ndimage import label

    mask = np.asarray(mask, bool)
    for kind in (False, True):  # holes, then islands
        numbers, count = label(mask == kind, np.ones((3, 3)))
        areas = np.bincount(numbers.ravel(), minlength=count + 1)
        small = areas < smallest
        small[0] = False
        if kind and count and small[1:].all():
            small[1 + areas[1:].argmax()] = False
        mask = np.where(small[numbers], not kind, mask)
    return mask


def without_doubles(masks: np.ndarray, scores: np.ndarray, overlap: float = 0.7) -> np.ndarray:
    """Numbers of the masks that stay, best first: none has more than this IoU with a better one.

    >>> without_doubles(np.array([[[1, 1, 0]], [[1, 1, 0]], [[0, 1, 1]]], bool), np.array([0.5, 0.9, 0.1])).tolist()
    [1, 2]
    """
    check_range("overlap", overlap, 0, 1)
    flat = np.asarray(masks, bool).reshape(len(masks), int(np.prod(np.shape(masks)[1:]))).astype(np.float32)
    both, areas = flat @ flat.T, flat.sum(1)
    union = areas[:, None] + areas - both
    kept: list[int] = []
    for n in np.argsort(-np.asarray(scores, float), kind="stable"):
        if all(both[n, k] <= overlap * union[n, k] for k in kept):
            kept.append(int(n))
    return np.array(kept, int)
