"""SupCon: every record is to be near all records of its class and far from the others.

Claim: with labels, a contrast of many positives at once teaches better than pairs of two views; record linkage with it
gains over training without labels (CLIPPINGS, newspaper photos with captions, ARI 43.0 -> 61.5).

Formula: L = mean over the i that have a positive of  -1 / |P(i)| sum_{p in P(i)} log( exp(z_i . z_p / tau) /
sum_{a != i} exp(z_i . z_a / tau) ),  P(i) the others of i's class.

Papers: Khosla et al. 2020, Supervised Contrastive Learning (NeurIPS); Arora, Yang, Jung and Dell 2023, Linking
Representations with Multimodal Contrastive Learning (CLIPPINGS).
Differs from the papers: a mean over records, not a sum, so that the batch size does not scale the gradient; a record
that is alone in its class contributes nothing and is not counted. One process only: there are no gathered rows.
Defaults: temperature 0.1 from the released code of CLIPPINGS.
"""

from __future__ import annotations

import torch

from ..errors import ClipworksError
from ..registry import method
from .common import check_rows, similarities, unit


@method(card="clippings", level="M")
def supcon(rows: torch.Tensor, labels: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Return the supervised contrast of the rows of a batch.

    Parameters
    ----------
    rows : vectors of shape (n, dim); brought to length 1 here
    labels : integers of shape (n,)
    temperature : divides the similarities (0.1: CLIPPINGS)

    Returns
    -------
    scalar tensor, float32 or better; 0 where no class has two rows

    Raises
    ------
    ClipworksError
        If shapes do not fit, the batch is empty, or the temperature is not above 0.

    Inputs
    ------
    vectors of records with their classes, two or more of a class

    Relations
    ---------
    With two rows of every class it is `simclr` of the two.

    References
    ----------
    Khosla et al. 2020, Supervised Contrastive Learning; Arora et al. 2023, CLIPPINGS

    Examples
    --------
    >>> rows, labels = torch.eye(3)[[0, 0, 1, 1, 2]], torch.tensor([0, 0, 1, 1, 2])
    >>> supcon(rows, labels) < 1e-3
    tensor(True)
    """
    check_rows(rows=rows)
    if labels.shape != (len(rows),) or labels.is_floating_point():
        raise ClipworksError(f"labels must be {len(rows)} integers, one per row. Got {labels.dtype} of shape "
                             f"{tuple(labels.shape)}.")  # fmt: skip
    if not temperature > 0:
        raise ClipworksError(f"temperature must be above 0. Got {temperature}.")
    rows = unit(rows)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logits = similarities(rows, rows, 1 / temperature).masked_fill(itself, float("-inf"))
    positive = (labels[:, None] == labels[None]) & ~itself
    count = positive.sum(1)
    if not bool(count.any()):
        return (0 * rows).sum()
    chance = logits.log_softmax(1).masked_fill(~positive, 0.0)
    return -(chance.sum(1)[count > 0] / count[count > 0]).mean()
