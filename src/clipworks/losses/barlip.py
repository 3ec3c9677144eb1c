"""BarLIP: Barlow Twins between images and texts, their cross-correlation is to be the identity.

Claim: a loss without negatives that was made for two views of an image works for image and text; added to plain CLIP it
helps, but no more than the views that are used with it (see `improved_baselines`).

Formula: C = cross-correlation of the columns of both sides, each brought to mean 0 and variance 1 over the batch;
L = w (sum_i (1 - C_ii)^2 + r sum_{i != j} C_ij^2).

Paper: Fini et al. 2023, Improved baselines for vision-language pre-training (TMLR); after Zbontar et al. 2021, Barlow
Twins (ICML).
Differs from the paper: nothing in the arithmetic. The batch is part of the method: give the rows of all processes.
Defaults: w = 0.025, r = 5e-3, on projectors of 3000 and 8192, from the released code.
"""

from __future__ import annotations

import torch

from ..errors import check_range
from ..registry import method
from .common import check_rows, wide

SMALLEST = 1e-5  # added to the variance, as batch normalisation has it


@method(card="improved-baselines", level="M")
def barlip(image: torch.Tensor, text: torch.Tensor, *, weight: float = 0.025, redundancy: float = 5e-3) -> torch.Tensor:
    """Return the weighted distance of the cross-correlation from the identity.

    Parameters
    ----------
    image, text : outputs of two projectors for the whole batch, shape (n, width), n at least 2
    weight : of the loss
    redundancy : of the entries off the diagonal

    Returns
    -------
    scalar tensor, float32 or better

    Raises
    ------
    ClipworksError
        If shapes do not fit, there are fewer than 2 rows, or a weight is negative.

    Inputs
    ------
    outputs of projectors of both towers; they are thrown away after training

    Relations
    ---------
    Added to `infonce`. `siamlip` and `swalip` are its siblings.

    References
    ----------
    Fini et al. 2023, Improved baselines for vision-language pre-training; Zbontar et al. 2021, Barlow Twins

    Examples
    --------
    >>> rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # whitened
    >>> round(barlip(rows, rows).item(), 6)
    0.0
    """
    check_rows(least=2, image=image, text=text)
    check_range("weight", weight, 0.0)
    check_range("redundancy", redundancy, 0.0)
    with torch.autocast(image.device.type, enabled=False):
        correlation = _standard(image).T @ _standard(text) / len(image)
    own = correlation.diagonal()
    aside = correlation.square().sum() - own.square().sum()
    return weight * ((1 - own).square().sum() + redundancy * aside)


def _standard(rows: torch.Tensor) -> torch.Tensor:
    rows = wide(rows)
    return (rows - rows.mean(0)) / (rows.var(0, correction=0) + SMALLEST).sqrt()
