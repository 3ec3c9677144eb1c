"""How well heat maps find defects: pixel AUROC and F1, and the overlap per region (PRO) with the area under it.

Pixel AUROC is dominated by large defects; PRO gives every connected region the same weight, however small.
Maps and masks come as arrays (n, H, W) or as lists of (H, W) arrays of different sizes. Image scores are judged by
`metrics.detection`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from ..errors import ClipworksError, check_range
from .detection import auroc, f1_max

LIMIT = 0.3  # false positive rate up to which PRO is integrated, as on MVTec AD


def pixel_auroc(maps: Any, masks: Any) -> float:
    """Return the AUROC of all pixels of all maps together.

    Parameters
    ----------
    maps : heat maps, higher where a defect is suspected
    masks : truth, not zero where there is a defect; a map of zeros for a good image
    """
    return auroc(*_flat(maps, masks))


def pixel_f1_max(maps: Any, masks: Any) -> tuple[float, float]:
    """Return the best F1 over all pixels, and its threshold."""
    return f1_max(*_flat(maps, masks))


def pro_curve(maps: Any, masks: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return false positive rates and per-region overlaps at every threshold, from (0, 0) to (1, 1).

    The overlap of a threshold is the mean over all connected regions (8 neighbours) of the share of the region's
    pixels at or above it; the false positive rate is the share of good pixels there.
    """
    pairs = _pairs(maps, masks)
    scores = np.concatenate([m.reshape(-1) for m, _ in pairs])
    regions, total = [], 0
    for _, mask in pairs:
        found, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions.append(np.where(found > 0, found + total, 0).reshape(-1))
        total += count
    region = np.concatenate(regions)
    good = region == 0
    if not total or not good.any():
        raise ClipworksError(f"masks must hold defects and good pixels. Got {total} regions, {int(good.sum())} good.")
    size = np.bincount(region)
    share = np.where(good, 0, 1 / (total * size[region]))
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    pro, fpr = np.cumsum(share[order])[last], np.cumsum(good[order])[last] / good.sum()
    return np.append(0.0, fpr), np.append(0.0, pro)


def aupro(maps: Any, masks: Any, limit: float = LIMIT) -> float:
    """Return the area under the PRO curve up to the false positive rate `limit`, divided by `limit`; 1 is perfect.

    Examples
    --------
    >>> mask = np.zeros((1, 4, 4)); mask[0, 1, 1] = 1
    >>> aupro(mask, mask)
    1.0
    """
    if not check_range("limit", limit, 0, 1):
        raise ClipworksError(f"limit must be above 0. Got {limit!r}.")
    fpr, pro = pro_curve(maps, masks)
    inside = fpr <= limit
    x = np.append(fpr[inside], limit)
    y = np.append(pro[inside], np.interp(limit, fpr, pro))
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit)


def _pairs(maps: Sequence[Any], masks: Sequence[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    if len(maps) != len(masks):
        raise ClipworksError(f"masks must be as many as the maps ({len(maps)}). Got {len(masks)}.")
    if not len(maps):
        raise ClipworksError("maps must hold at least one heat map. Got none.")
    pairs = []
    for number, (heat, mask) in enumerate(zip(maps, masks, strict=True)):
        heat, mask = np.asarray(heat), np.asarray(mask) != 0
        if heat.ndim != 2 or heat.shape != mask.shape:
            raise ClipworksError(f"map and mask {number} must have the same shape (H, W). "
                                 f"Got {heat.shape} and {mask.shape}.")  # fmt: skip
        if not np.isfinite(heat).all():
            raise ClipworksError(f"maps must be finite. Got NaN or infinity in map {number}.")
        pairs.append((heat, mask))
    return pairs


def _flat(maps: Any, masks: Any) -> tuple[np.ndarray, np.ndarray]:
    pairs = _pairs(maps, masks)
    return np.concatenate([m.reshape(-1) for m, _ in pairs]), np.concatenate([m.reshape(-1) for _, m in pairs])
