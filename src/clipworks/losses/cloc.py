"""CLOC's losses of regions: embeddings of boxes against the words of those boxes, and boxes found from words.

Claim: an image tower whose tokens can be asked about a box classifies COCO's boxes above 70 % and lifts multimodal
language models on referring and grounding by 1 to 6 points, where CLIP's image-level contrast gives no such thing.

Formula: Z = s r w^T over all regions of the batch; entries (i, j), i != j, whose texts are equal or nearly so are left
out;  L = a (CE(Z, own) + CE(Z^T, own)) / 2 + b mean( |b - b*|_1 + 1 - GIoU(b, b*) ).

Paper: Chen et al. 2024, Contrastive Localized Language-Image Pre-Training (ICML 2025).
Differs from the paper: neither code nor all settings are public; the box loss, weights 1 and the threshold 0.95 on
cosines of texts are the plain readings of its text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import check_range
from ..registry import method
from .common import Scale, own_columns, similarities, unit
from .regions import box_distance, check_regions, nothing


@method(card="cloc", level="M")
def cloc(
    region: torch.Tensor,
    text: torch.Tensor,
    scale: Scale,
    predicted: torch.Tensor,
    target: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    threshold: float | None = 0.95,
    contrast: float = 1.0,
    grounding: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Return the weighted contrast of regions with their words and the weighted distance of boxes.

    Parameters
    ----------
    region, text : unit rows of all regions of the batch and of their words, shape (R, dim)
    scale : factor on their similarities
    predicted, target : boxes found from the words and true ones, (left, top, right, bottom), shape (R, 4)
    labels : integers (R,), equal where the words are equal; None compares nothing but vectors
    threshold : cosine of two texts from which they count as the same; None leaves that out
    contrast, grounding : weights of the two terms

    Returns
    -------
    dict with `contrast` and `grounding`, whose sum is the loss; both 0 where there is no region

    Raises
    ------
    ClipworksError
        If shapes do not fit or a number is out of range.

    Inputs
    ------
    vectors of regions and of their words; rows of all processes together, without those that fill up

    Relations
    ---------
    Without equal texts, or with labels=None and threshold=None, the contrast is `infonce`. `farslip` shares the target
    among equal texts instead of leaving them out.

    References
    ----------
    Chen et al. 2024, Contrastive Localized Language-Image Pre-Training

    Examples
    --------
    >>> rows, boxes = torch.eye(4), torch.tensor([[0.1, 0.1, 0.5, 0.5]]).repeat(4, 1)
    >>> found = cloc(rows, rows, 20.0, boxes, boxes)
    >>> {name: round(abs(value.item()), 4) for name, value in found.items()}
    {'contrast': 0.0, 'grounding': 0.0}
    """
    check_regions({"region": (None, None)}, region=region)
    count = len(region)
    check_regions(
        {"text": tuple(region.shape), "predicted": (count, 4), "target": (count, 4)},
        text=text, predicted=predicted, target=target,
    )  # fmt: skip
    for name, weight in {"contrast": contrast, "grounding": grounding}.items():
        check_range(name, weight, 0.0)
    if count == 0:
        return {"contrast": nothing(region, text), "grounding": nothing(predicted)}
    logits = similarities(region, text, scale).masked_fill(same_text(text, labels, threshold), float("-inf"))
    own = own_columns(logits)
    both = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return {"contrast": contrast * both, "grounding": grounding * box_distance(predicted, target).mean()}


def same_text(text: torch.Tensor, labels: torch.Tensor | None, threshold: float | None) -> torch.Tensor:
    """Return which texts other than the own one say the same: bool (R, R), symmetric, its diagonal False.

    Parameters
    ----------
    text, labels, threshold : as for `cloc`
    """
    count = len(text)
    same = torch.zeros(count, count, dtype=torch.bool, device=text.device)
    if labels is not None:
        check_regions({"labels": (count,)}, labels=labels)
        same |= labels[:, None] == labels[None]
    if threshold is not None:
        check_range("threshold", threshold, -1.0, 1.0)
        rows = unit(text.detach())
        near = similarities(rows, rows) >= threshold
        same |= near | near.T
    return same & ~torch.eye(count, dtype=torch.bool, device=text.device)
