"""What losses of regions share: arithmetic of boxes, checks of rows that may be none, a zero that has a graph."""

from __future__ import annotations

import torch

from ..errors import ClipworksError
from .common import wide

EPS = 1e-7


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """Return (left, top, right, bottom) of boxes (..., 4) given by centre x, centre y, width, height."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def centres(boxes: torch.Tensor) -> torch.Tensor:
    """Return (centre x, centre y, width, height) of boxes (..., 4) given by left, top, right, bottom."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def giou(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the generalised intersection over union of boxes, in [-1, 1].

    Parameters
    ----------
    one, other : left, top, right, bottom, of shapes that broadcast to (..., 4); `one[:, None]`, `other[None]` give all
        pairs

    References
    ----------
    Rezatofighi et al. 2019, Generalized Intersection over Union (CVPR)

    Examples
    --------
    >>> giou(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 3.0, 1.0]]))
    tensor([ 1.0000, -0.3333])
    """
    inside = _area(torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:]))
    around = _area(torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:]))
    union = _area(one[..., :2], one[..., 2:]) + _area(other[..., :2], other[..., 2:]) - inside
    return inside / union.clamp(min=EPS) - (around - union) / around.clamp(min=EPS)


def box_distance(predicted: torch.Tensor, target: torch.Tensor, centred: bool = False) -> torch.Tensor:
    """Return |b - b*|_1 + 1 - GIoU(b, b*) of pairs of boxes, shape (R,).

    Parameters
    ----------
    predicted, target : (left, top, right, bottom), or centre and size where `centred`, shape (R, 4)
    """
    predicted, target = wide(predicted), wide(target)
    overlap = giou(corners(predicted), corners(target)) if centred else giou(predicted, target)
    return (predicted - target).abs().sum(-1) + 1 - overlap


def _area(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (high - low).clamp(min=0).prod(-1)


def nothing(*tensors: torch.Tensor) -> torch.Tensor:
    """Return 0 with a graph to every tensor: the loss of a batch in which there is no region."""
    return torch.stack([0 * wide(t).sum() for t in tensors]).sum()


def check_regions(shapes: dict[str, tuple[int | None, ...]], **named: torch.Tensor) -> None:
    """Raise unless tensors have these shapes; None is any length, and the number of regions may be 0.

    Parameters
    ----------
    shapes : name -> lengths wanted
    named : the tensors
    """
    for name, value in named.items():
        wanted = shapes[name]
        fits = value.ndim == len(wanted) and all(w in (None, g) for w, g in zip(wanted, value.shape, strict=True))
        if not fits:
            form = ", ".join("any" if w is None else str(w) for w in wanted)
            raise ClipworksError(f"{name} must have the shape ({form}). Got {tuple(value.shape)}.")
