"""GRAIN's losses: an image with its caption, region queries with grounded boxes, and with the descriptions of those.

Claim: a decoder whose queries are tied to described regions makes prompts with descriptions ("a dog, which has floppy
ears") fit what is in the image; its paper reports gains over CLIP on eleven sets (figures not at hand).

Formula: matching of Q predictions with the g described boxes of an image at least cost 5 |b - b*|_1 - 2 GIoU;
L = InfoNCE(e_I, caption) + mean over matched ( |b - b*|_1 + 1 - GIoU ) + mean over matched CE(s e_R d^T, own d), the
last over all descriptions of the batch and in this direction alone.

Paper: Halbe et al. 2024, Grounding Descriptions in Images informs Zero-Shot Visual Recognition (WACV 2026).
Differs from the paper: the box term is the paper's; the released code's is 1.5 times that. A description that occurs
several times in the batch is right wherever it stands (`labels`), where the released code counts its twins as wrong.
Defaults: costs 5 and 2, weights 1 from the released code.
"""

from __future__ import annotations

import torch

from ..errors import check_range
from ..registry import method
from .common import Scale, cross_entropy, similarities, wide
from .infonce import infonce, shared_targets
from .regions import box_distance, check_regions, corners, giou, nothing


@method(card="grain", level="M")
def grain(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: Scale,
    region: torch.Tensor,
    predicted: torch.Tensor,
    description: torch.Tensor,
    target: torch.Tensor,
    labels: torch.Tensor,
    *,
    boxes: float = 1.0,
    descriptions: float = 1.0,
    costs: tuple[float, float] = (5.0, 2.0),
) -> dict[str, torch.Tensor]:
    """Return the contrast of images, the weighted distance of boxes and the weighted contrast of descriptions.

    Parameters
    ----------
    image, text : unit rows of images and captions, shape (n, dim)
    scale : factor on all similarities
    region : unit rows of the region queries, shape (n, Q, dim)
    predicted : their boxes (centre x, centre y, width, height), shape (n, Q, 4)
    description : unit rows of the described regions, shape (n, G, dim), G <= Q
    target : their boxes, in the same form, shape (n, G, 4)
    labels : integers (n, G), equal where the words are equal; below 0 where there is no region
    boxes, descriptions : weights of the two further terms
    costs : of the L1 distance and of the GIoU in the matching

    Returns
    -------
    dict with `infonce`, `boxes` and `descriptions`, whose sum is the loss; the last two 0 where there is no region

    Raises
    ------
    ClipworksError
        If shapes do not fit, there are more regions than queries, or a weight is negative.

    Inputs
    ------
    outputs of a decoder for images, vectors of captions and of described regions

    Relations
    ---------
    Without regions it is `infonce`. `cloc` asks about given boxes instead of finding them.

    References
    ----------
    Halbe et al. 2024, Grounding Descriptions in Images informs Zero-Shot Visual Recognition

    Examples
    --------
    >>> rows, box = torch.eye(4), torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(4, 1, 4)
    >>> found = grain(rows, rows, 20.0, rows[:, None], box, rows[:, None], box, torch.arange(4)[:, None])
    >>> {name: round(abs(value.item()), 4) for name, value in found.items()}
    {'infonce': 0.0, 'boxes': 0.0, 'descriptions': 0.0}
    """
    check_regions({"region": (len(image), None, image.shape[-1])}, region=region)
    queries = region.shape[1]
    check_regions({"predicted": (len(image), queries, 4)}, predicted=predicted)
    check_regions({"description": (len(image), None, image.shape[-1])}, description=description)
    count = description.shape[1]
    check_regions({"target": (len(image), count, 4), "labels": (len(image), count)}, target=target, labels=labels)
    check_range("regions per image", count, 0, queries)
    for name, weight in {"boxes": boxes, "descriptions": descriptions}.items():
        check_range(name, weight, 0.0)
    found = {"infonce": infonce(image, text, scale)}
    sample, query, truth = match(predicted, target, labels >= 0, costs)
    if len(sample) == 0:
        return found | {"boxes": nothing(predicted), "descriptions": nothing(region, description)}
    apart = box_distance(predicted[sample, query], target[sample, truth], centred=True).mean()
    kept = labels >= 0
    shared = shared_targets(labels[sample, truth], labels[kept])
    logits = similarities(region[sample, query], description[kept], scale)
    return found | {"boxes": boxes * apart, "descriptions": descriptions * cross_entropy(logits, targets=shared)}


@torch.no_grad()
def match(
    predicted: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, costs: tuple[float, float] = (5.0, 2.0)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the pairs of least cost: numbers of the image, of the query and of the true box, (K,) each.

    Parameters
    ----------
    predicted, target : boxes (centre x, centre y, width, height), shapes (n, Q, 4) and (n, G, 4)
    valid : bool (n, G), which of the true boxes there are
    costs : as for `grain`
    """
    from scipy.optimize import linear_sum_assignment

    one, other = wide(predicted)[:, :, None], wide(target)[:, None]
    cost = costs[0] * (one - other).abs().sum(-1) - costs[1] * giou(corners(one), corners(other))
    cost = cost.nan_to_num(1e6).cpu()  # a prediction that is no number matches last, and is found by the loss
    found: list[tuple[int, int, int]] = []
    for number, here in enumerate(valid.cpu()):
        columns = here.nonzero()[:, 0]
        queries, rows = linear_sum_assignment(cost[number][:, columns].numpy())
        found += [(number, int(q), int(columns[r])) for q, r in zip(queries, rows, strict=True)]
    pairs = torch.tensor(found, dtype=torch.long, device=predicted.device).reshape(-1, 3)
    return pairs[:, 0], pairs[:, 1], pairs[:, 2]
