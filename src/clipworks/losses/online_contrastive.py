"""Online contrastive loss: of the pairs of a batch, only those that are in the wrong order are corrected.

Claim: trained with it on labelled duplicates, a text encoder finds reprints that share few words (NEWS-COPY, ARI 91.5
against 75.0 for n-grams); a headline's body, once found, gives its paraphrases for nothing (HEADLINES).

Formula: d_ij = 1 - cos(x_i, x_j).  Kept: duplicates with d > min over non-duplicates of d, and non-duplicates with d <
max over duplicates of d.  L = sum over kept duplicates of d^2 + sum over kept others of max(margin - d, 0)^2.

Papers: Silcock and Dell 2023, A Massive Scale Semantic Similarity Dataset of Historical English (HEADLINES, NeurIPS);
Reimers and Gurevych 2019, Sentence-BERT (EMNLP), for the loss.
Differs from the papers: all pairs of the batch are used, where the released code is given pairs.
Defaults: margin 0.2 from the companion code (NEWS-COPY).
"""

from __future__ import annotations

import torch

from ..errors import ClipworksError, check_range
from ..registry import method
from .common import check_rows, similarities, unit


@method(card="headlines", level="M")
def online_contrastive(rows: torch.Tensor, labels: torch.Tensor, margin: float = 0.2) -> torch.Tensor:
    """Return the loss of the pairs of a batch that are in the wrong order.

    Parameters
    ----------
    rows : vectors of shape (n, dim); brought to length 1 here
    labels : integers of shape (n,); equal ones are duplicates
    margin : cosine distance that others are to keep

    Returns
    -------
    scalar tensor, float32 or better; 0 where every duplicate is nearer than every other pair

    Raises
    ------
    ClipworksError
        If shapes do not fit, the batch is empty, or the margin is negative.

    Inputs
    ------
    vectors of documents with the number of their group

    Relations
    ---------
    `supcon` pulls all duplicates, however near they are.

    References
    ----------
    Silcock and Dell 2023, A Massive Scale Semantic Similarity Dataset of Historical English; Reimers and Gurevych 2019

    Examples
    --------
    >>> rows = torch.eye(2)[[0, 0, 1]]
    >>> right, wrong = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    >>> online_contrastive(rows, right).item(), round(online_contrastive(rows, wrong).item(), 4)
    (0.0, 1.04)
    """
    check_rows(rows=rows)
    if labels.shape != (len(rows),) or labels.is_floating_point():
        raise ClipworksError(f"labels must be {len(rows)} integers, one per row. Got {labels.dtype} of shape "
                             f"{tuple(labels.shape)}.")  # fmt: skip
    check_range("margin", margin, 0.0)
    rows = unit(rows)
    first, second = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    distance = 1 - similarities(rows, rows)[first, second]
    same = labels[first] == labels[second]
    near, far = distance[same], distance[~same]
    if not len(near) or not len(far):
        return (0 * rows).sum()
    pull, push = near[near > far.min()], far[far < near.max()]
    return (pull**2).sum() + ((margin - push).clamp(min=0) ** 2).sum()
