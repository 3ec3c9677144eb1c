"""FarSLIP's losses: patches of a whole image follow those of its crops, and crops of objects follow their category.

Claim: pulling region-pooled patches to the patches of the crop (not to its class token) makes dense features better and
spares the image level; objects teach best through the class token of their crop (mean mIoU of open-vocabulary
segmentation on satellite images, ViT-B/16: CLIP 32.3, GeoRSCLIP 34.3, both stages 35.4).

Formula: L_d = 1 - mean cos(pool(F(image), box), pool(F(crop)));  y_ij = [c_j = c_i] / |{k : c_k = c_i}|,
L_reg = (H(y, s r t^T) + H(y, s t r^T)) / 2, H the mean cross-entropy over the M objects of the batch;
L = a L_d + b L_reg.

Paper: Li et al. 2025, FarSLIP: Discovering Effective CLIP Adaptation for Fine-Grained Remote Sensing Understanding.
Differs from the paper: a batch without any object gives 0, where the released code divides by 0.
Defaults: a = 0.1 (first stage) and b = 1 (second stage) from the released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_range
from ..registry import method
from .common import Scale, wide
from .infonce import infonce, shared_targets
from .regions import check_regions, nothing


@method(card="farslip", level="M")
def farslip(
    full: torch.Tensor,
    crop: torch.Tensor,
    region: torch.Tensor,
    text: torch.Tensor,
    scale: Scale,
    labels: torch.Tensor,
    *,
    distillation: float = 0.1,
    categories: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Return the weighted distillation between patches and the weighted contrast of objects with their categories.

    Parameters
    ----------
    full, crop : patches of the whole image pooled over a box, and patches of that crop pooled, shape (n, dim)
    region, text : unit rows of the crops of objects and of the words of their categories, shape (M, dim)
    scale : factor on their similarities
    labels : categories (M,) of the objects; rows below 0 fill up and count for nothing
    distillation, categories : weights of the two terms

    Returns
    -------
    dict with `distillation` and `categories`, whose sum is the loss

    Raises
    ------
    ClipworksError
        If shapes do not fit or a weight is negative.

    Inputs
    ------
    dense features of images and of their crops; vectors of objects. Either part may have no rows: that stage is off

    Relations
    ---------
    With categories that are all different the contrast is `infonce`; CLIPSelf and `declip` pull pooled patches to the
    class token of the crop instead.

    References
    ----------
    Li et al. 2025, FarSLIP: Discovering Effective CLIP Adaptation for Fine-Grained Remote Sensing Understanding

    Examples
    --------
    >>> rows, labels = torch.eye(4), torch.tensor([0, 1, 2, -1])
    >>> found = farslip(rows, rows.roll(1, 0), rows, rows, 20.0, labels)
    >>> {name: round(abs(value.item()), 4) for name, value in found.items()}
    {'distillation': 0.1, 'categories': 0.0}
    """
    for name, weight in {"distillation": distillation, "categories": categories}.items():
        check_range(name, weight, 0.0)
    return {
        "distillation": distillation * patch_distillation(full, crop),
        "categories": categories * category_contrast(region, text, scale, labels),
    }


def patch_distillation(full: torch.Tensor, crop: torch.Tensor) -> torch.Tensor:
    """Return 1 - the mean cosine of two sets of rows (n, dim), in [0, 2]; detach the side that is to teach only."""
    check_regions({"full": (None, None)}, full=full)
    check_regions({"crop": tuple(full.shape)}, crop=crop)
    if len(full) == 0:
        return nothing(full, crop)
    return 1 - F.cosine_similarity(wide(full), wide(crop), dim=-1).mean()


def category_contrast(region: torch.Tensor, text: torch.Tensor, scale: Scale, labels: torch.Tensor) -> torch.Tensor:
    """Return the contrast in which all rows of a category are right, in equal shares.

    Parameters
    ----------
    region, text, scale, labels : as for `farslip`
    """
    check_regions({"region": (None, None)}, region=region)
    check_regions({"text": tuple(region.shape), "labels": (len(region),)}, text=text, labels=labels)
    if labels.is_floating_point():
        raise ClipworksError(f"labels must be integers. Got {labels.dtype}.")
    kept = labels >= 0
    if not bool(kept.any()):
        return nothing(region, text)
    return infonce(region[kept], text[kept], scale, targets=shared_targets(labels[kept]))
