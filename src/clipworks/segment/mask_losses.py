"""Losses of decoders that propose masks: cross-entropy or focal, dice, and which proposal answers for which segment.

    pixels(x, y) = mean softplus(-x) y + softplus(x) (1 - y);   with gamma each pixel times (1 - p_right)^gamma
    dice(x, y)   = 1 - (2 sum p y + 1) / (sum p + sum y + 1),   p = sigmoid(x)
    assignment   = Hungarian over  -w_c p(class) + w_m pixels + w_d dice

A proposal without a segment is taught the last class, "no object", at a small weight; masks are compared at points,
drawn among the pixels that have a label.

Cheng et al. 2022, Masked-attention Mask Transformer for Universal Image Segmentation (CVPR). Milletari et al. 2016,
V-Net (3DV). Lin et al. 2017, Focal Loss for Dense Object Detection (ICCV).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..metrics.segmentation import IGNORE
from .mask_decoder import Proposals


def pixel_terms(logits: torch.Tensor, gamma: float = 0.0, alpha: float | None = None) -> tuple[torch.Tensor, ...]:
    """What every pixel costs if it belongs to the segment, and if it does not; the shape of the logits each.

    Parameters
    ----------
    logits : of any shape
    gamma : of the focal loss; 0 is binary cross-entropy
    alpha : weight of pixels of the segment, 1 - alpha that of others; None weighs both 1
    """
    yes, no = F.softplus(-logits), F.softplus(logits)
    if gamma:
        p = logits.sigmoid()
        yes, no = (1 - p) ** gamma * yes, p**gamma * no
    return (yes, no) if alpha is None else (alpha * yes, (1 - alpha) * no)


def pixel_loss(
    logits: torch.Tensor, targets: torch.Tensor, gamma: float = 0.0, alpha: float | None = None
) -> torch.Tensor:
    """Binary cross-entropy, or focal loss, of masks (..., N) with targets in [0, 1]: (...).

    >>> pixel_loss(torch.zeros(1, 4), torch.ones(1, 4))
    tensor([0.6931])
    """
    yes, no = pixel_terms(logits, gamma, alpha)
    return (targets * yes + (1 - targets) * no).mean(-1)


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One minus the overlap of masks (..., N) with targets in [0, 1]: (...).

    >>> dice_loss(torch.tensor([[50.0, -50.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([0.])
    """
    p = logits.sigmoid()
    return 1 - (2 * (p * targets).sum(-1) + 1) / (p.sum(-1) + targets.sum(-1) + 1)


def pixel_costs(
    logits: torch.Tensor, targets: torch.Tensor, gamma: float = 0.0, alpha: float | None = None
) -> torch.Tensor:
    """`pixel_loss` of every mask (Q, N) with every segment (M, N): (Q, M)."""
    yes, no = pixel_terms(logits, gamma, alpha)
    return (yes @ targets.T + no @ (1 - targets).T) / logits.shape[-1]


def dice_costs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`dice_loss` of every mask (Q, N) with every segment (M, N): (Q, M)."""
    p = logits.sigmoid()
    return 1 - (2 * p @ targets.T + 1) / (p.sum(-1)[:, None] + targets.sum(-1) + 1)


def soft_iou(probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """sum(p y) / sum(p + y - p y) of every mask (Q, N) with every segment (M, N), values in [0, 1]: (Q, M)."""
    both = probabilities @ targets.T
    return both / (probabilities.sum(-1)[:, None] + targets.sum(-1) - both).clamp(min=1e-8)


def segments(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The labels (M,) among those of pixels (N,), and the pixels of each as 0 and 1, (M, N)."""
    found = labels.unique()
    return found, (labels == found[:, None]).float()


def at_points(maps: torch.Tensor, points: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps (Q, h, w) that cover an image of a size, interpolated at pixels given by their number (N,): (Q, N).

    The same numbers as a bilinear resize to that size, without its memory.
    """
    y, x = ((n.double() + 0.5) / length for n, length in zip((points // size[1], points % size[1]), size, strict=True))
    places = (2 * torch.stack([x, y], dim=-1) - 1).to(maps)[None, None]
    found = F.grid_sample(maps[None], places, mode="bilinear", padding_mode="border", align_corners=False)
    return found[0, :, 0]


def draw_points(labels: torch.Tensor, count: int | None) -> torch.Tensor:
    """Numbers of pixels that have a label, of a map (H, W); at most `count` of them, drawn by torch's generator."""
    kept = (labels.flatten() != IGNORE).nonzero()[:, 0]
    if count is None or len(kept) <= count:
        return kept
    return kept[torch.randperm(len(kept), device=kept.device)[:count]]


@dataclass(frozen=True)
class MaskCriterion:
    """The sum of losses over the proposals of a decoder.

    Parameters
    ----------
    classes, masks, dice : weights of the three losses, in the assignment as well (Mask2Former: 2, 5, 5)
    no_object : weight of the class "no object" in the cross-entropy (published: 0.1)
    gamma, alpha : of the focal loss in the place of the cross-entropy of pixels
    points : pixels of an image at which masks are compared; None takes all
    """

    classes: float = 2.0
    masks: float = 5.0
    dice: float = 5.0
    no_object: float = 0.1
    gamma: float = 0.0
    alpha: float | None = None
    points: int | None = 3136

    @torch.no_grad()
    def assign(
        self, logits: torch.Tensor, masks: torch.Tensor, classes: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The cheapest pairs of proposals and segments of one image: two index vectors of the same length.

        Parameters
        ----------
        logits : (Q, K + 1), the last column is "no object"
        masks : (Q, N), logits at points
        classes : int64 (M,), of the segments
        targets : (M, N), 0 and 1
        """
        from scipy.optimize import linear_sum_assignment

        cost = -self.classes * logits.float().softmax(-1)[:, classes]
        cost = cost + self.masks * pixel_costs(masks.float(), targets, self.gamma, self.alpha)
        cost = cost + self.dice * dice_costs(masks.float(), targets)
        rows, columns = linear_sum_assignment(cost.nan_to_num(nan=1e6).cpu().numpy())
        return torch.from_numpy(rows).to(masks.device), torch.from_numpy(columns).to(masks.device)

    def __call__(self, logits: torch.Tensor, masks: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Weighted losses "class", "mask" and "dice", each the mean over the proposals or segments of the batch.

        Parameters
        ----------
        logits : (B, Q, K + 1), the last column is "no object"
        masks : (B, Q, h, w), logits that cover the images
        labels : int64 (B, H, W), 255 where there is none
        """
        aims = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)
        found = []
        for number, (one, maps, truth) in enumerate(zip(logits, masks, labels, strict=True)):
            points = draw_points(truth, self.points)
            if not len(points):
                continue
            classes, targets = segments(truth.flatten()[points])
            values, targets = at_points(maps, points, (truth.shape[0], truth.shape[1])), targets.to(maps)
            rows, columns = self.assign(one, values, classes, targets)
            aims[number, rows] = classes[columns]
            found.append((values[rows], targets[columns]))
        weights = torch.ones(logits.shape[2], device=logits.device)
        weights[-1] = self.no_object
        entropy = F.cross_entropy(logits.flatten(0, 1).float(), aims.flatten(), weights)
        count = max(1, sum(len(a) for a, _ in found))
        none = masks.sum() * 0
        pixel = sum((pixel_loss(a, b, self.gamma, self.alpha).sum() for a, b in found), none) / count
        dice = sum((dice_loss(a, b).sum() for a, b in found), none) / count
        return {"class": self.classes * entropy, "mask": self.masks * pixel, "dice": self.dice * dice}


def proposal_losses(
    proposals: Proposals,
    classify: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    criterion: MaskCriterion,
) -> dict[str, torch.Tensor]:
    """The losses of all layers of a decoder together.

    Parameters
    ----------
    proposals : of the last layer, with the earlier ones
    classify : from queries (B, Q, width) to logits (B, Q, K + 1), such as a `WordHead` with its words
    labels : int64 (B, H, W), 255 where there is none
    criterion : of one layer
    """
    total: dict[str, torch.Tensor] = {}
    for one in (*proposals.earlier, proposals):
        for name, value in criterion(classify(one.queries), one.masks, labels).items():
            total[name] = total[name] + value if name in total else value
    return total
