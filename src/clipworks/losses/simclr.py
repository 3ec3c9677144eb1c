"""SimCLR's loss (NT-Xent): one view of an image is to find its other view among all views of the batch.

Claim: telling images apart through strong changes of view is enough supervision to learn features without labels; SLIP
adds it to CLIP.

Formula: for view a of image i the logits are [a_i . b_j / tau for all j;  a_i . a_j / tau for j != i], the right answer
being b_i;  L = mean cross-entropy over images and over both views as the query.

Paper: Chen, Kornblith, Norouzi and Hinton 2020, A Simple Framework for Contrastive Learning of Visual Representations
(ICML); in this form: Mu et al. 2022, SLIP (ECCV).
Differs from the paper: nothing in the arithmetic.
Defaults: temperature 0.1 from SLIP's code.
"""

from __future__ import annotations

import torch

from ..errors import ClipworksError
from ..registry import method
from .common import check_gathered, check_rows, cross_entropy, own_columns, similarities, unit


@method(card="contrastive-foundations", level="M")
def simclr(
    first: torch.Tensor,
    second: torch.Tensor,
    temperature: float = 0.1,
    *,
    all_first: torch.Tensor | None = None,
    all_second: torch.Tensor | None = None,
    offset: int = 0,
) -> torch.Tensor:
    """Return the mean cross-entropy of either view finding the other.

    Parameters
    ----------
    first, second : rows of the two views of the same images, shape (n, dim); brought to length 1 here
    temperature : divides the similarities (0.1: SLIP)
    all_first, all_second : rows of all processes, shape (N, dim), in the order of their ranks; default the local ones
    offset : position of the local rows among all

    Returns
    -------
    scalar tensor, float32 or better

    Raises
    ------
    ClipworksError
        If shapes do not fit, the batch is empty, the temperature is not above 0, or the local rows do not lie within
        the gathered ones.

    Inputs
    ------
    outputs of a projection head for two augmented views of every image

    Relations
    ---------
    `slip` adds it to `infonce`, which has no negatives within one side.

    References
    ----------
    Chen et al. 2020, A Simple Framework for Contrastive Learning of Visual Representations; Mu et al. 2022, SLIP

    Examples
    --------
    >>> views = torch.eye(4)
    >>> simclr(views, views) < 1e-3
    tensor(True)
    """
    check_rows(first=first, second=second)
    if not temperature > 0:
        raise ClipworksError(f"temperature must be above 0. Got {temperature}.")
    all_first, all_second = check_gathered(first, second, all_first, all_second, offset, "first", "second")
    first, second, all_first, all_second = unit(first), unit(second), unit(all_first), unit(all_second)

    def find(query: torch.Tensor, there: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        across, within = similarities(query, there, 1 / temperature), similarities(query, here, 1 / temperature)
        rows, own = own_columns(within), own_columns(within, offset)
        within[rows, own] = float("-inf")
        return cross_entropy(torch.cat([across, within], 1), offset)

    return (find(first, all_second, all_first) + find(second, all_first, all_second)) / 2
