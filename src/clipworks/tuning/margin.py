"""Angular margins: a right answer has to be nearer by an angle than a wrong one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..encoders.layers import wide

EDGE = 1e-6  # cosines are kept this far from 1 and -1, where the angle has no derivative


def widened(cosine: torch.Tensor, margin: float) -> torch.Tensor:
    """Return cos(angle + margin), continued beyond angle + margin = pi so that it goes on falling.

    Parameters
    ----------
    cosine : of any shape
    margin : in radians, from 0 to pi

    >>> round(widened(torch.tensor(0.5), math.pi / 6).item(), 6)
    0.0
    """
    cosine = wide(cosine).clamp(-1 + EDGE, 1 - EDGE)
    added = cosine * math.cos(margin) - (1 - cosine.square()).sqrt() * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), added, cosine - margin * math.sin(margin))


def arc_margin(
    rows: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor, scale: float = 64.0, margin: float = 0.3
) -> torch.Tensor:
    """Return the cross-entropy of unit rows against class centres, the right angle widened by the margin (ArcFace).

    Parameters
    ----------
    rows : unit rows (n, dim)
    centres : (C, dim), of any length
    labels : int64 (n,)
    scale : factor of the cosines
    margin : in radians
    """
    cosine = wide(rows) @ F.normalize(wide(centres), dim=-1).T
    own = labels[:, None]
    return F.cross_entropy(scale * cosine.scatter(1, own, widened(cosine.gather(1, own), margin)), labels)


def caption_margin(
    rows: torch.Tensor, captions: torch.Tensor, labels: torch.Tensor, scale: float = 64.0, margin: float = 0.3
) -> torch.Tensor:
    """Return the mean contrast of every image with each of its captions, the right angle widened by the margin.

    Captions of the other classes' images in the batch are wrong. An image's own other captions, and captions of images
    of its class, are neither right nor wrong.

    Parameters
    ----------
    rows : unit rows of images (n, dim)
    captions : unit rows of K captions of each image, (n, K, dim)
    labels : int64 (n,), classes
    scale, margin : as in `arc_margin`
    """
    cosine = torch.einsum("id,jkd->ijk", wide(rows), wide(captions))
    own = scale * widened(cosine.diagonal(dim1=0, dim2=1).T, margin)
    same = labels[:, None] == labels
    wrong = (scale * cosine).masked_fill(same[:, :, None], -torch.inf).flatten(1).logsumexp(1, keepdim=True)
    return F.softplus(wrong - own).mean()
