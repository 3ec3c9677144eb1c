"""Sigmoid loss, that of SigLIP: every image-text pair of the batch is judged by itself, right or wrong.

Claim: without a softmax over the batch no pair needs the others, so batches may be small or cut into blocks, at the
quality of the softmax or above it.

Formula: z_ij = s image_i . text_j + c;  L = -(1/n) sum_ij log sigmoid(y_ij z_ij), y = 1 for own pairs and -1 otherwise.

Paper: Zhai, Mustafa, Kolesnikov and Beyer 2023, Sigmoid Loss for Language Image Pre-Training (ICCV).
Differs from the paper: nothing in the arithmetic. The matrix may be computed in blocks of rows that are computed again
in the backward pass; with gathered rows each process judges its own images against all texts.
Defaults: the bias begins at -10 and the scale at 10 (paper); the sum is divided by the rows, not by the pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import check_range
from ..registry import method
from .common import Scale, check_gathered, check_rows, own_columns, similarities


@method(card="contrastive-foundations", level="M")
def sigmoid(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: Scale,
    bias: Scale = -10.0,
    *,
    all_image: torch.Tensor | None = None,
    all_text: torch.Tensor | None = None,
    offset: int = 0,
    chunk: int | None = None,
) -> torch.Tensor:
    """Return the sum over texts, and the mean over images, of the cost of judging each pair.

    Parameters
    ----------
    image, text : unit rows of shape (n, dim); row i of one belongs to row i of the other
    scale : factor on the similarities (begins at 10: paper)
    bias : added to every similarity; learned (begins at -10: paper)
    all_image, all_text : rows of all processes, shape (N, dim), in the order of their ranks; default the local ones
    offset : position of the local rows among all
    chunk : images judged at a time, chunk x N instead of n x N in memory; same value and gradient

    Returns
    -------
    scalar tensor, float32 or better

    Raises
    ------
    ClipworksError
        If shapes do not fit, the batch is empty, chunk is below 1, or the local rows do not lie within all.

    Inputs
    ------
    normalised features of image-text pairs

    Relations
    ---------
    `sigmoid_ring` is the same across processes without gathering. `infonce` makes the pairs of a row compete.

    References
    ----------
    Zhai, Mustafa, Kolesnikov and Beyer 2023, Sigmoid Loss for Language Image Pre-Training

    Examples
    --------
    >>> round(sigmoid(torch.eye(4), torch.eye(4), 20.0).item(), 5)  # right pairs at 10, wrong ones at -10
    0.00018
    """
    check_rows(image=image, text=text)
    all_image, all_text = check_gathered(image, text, all_image, all_text, offset)
    if chunk is None:
        return judge(image, all_text, scale, bias, offset) / len(image)
    from torch.utils.checkpoint import checkpoint

    total = image.new_zeros(())
    for start in range(0, len(image), int(check_range("chunk", chunk, 1))):
        rows = image[start : start + chunk]
        total = total + checkpoint(
            judge, rows, all_text, scale, bias, offset + start, use_reentrant=False, preserve_rng_state=False
        )  # fmt: skip
    return total / len(image)


def judge(image: torch.Tensor, text: torch.Tensor, scale: Scale, bias: Scale, own: int | None = None) -> torch.Tensor:
    """Return the summed cost of all pairs of two blocks.

    Parameters
    ----------
    image, text : unit rows of shapes (n, dim) and (m, dim)
    scale, bias : factor on the similarities and what is added
    own : row i belongs to column i + own; None if all pairs are wrong ones
    """
    logits = similarities(image, text, scale) + bias
    if own is not None:
        rows, columns = own_columns(logits), own_columns(logits, own)
        # in place, on a matrix that nobody else holds: a matrix of labels would double the memory
        logits[rows, columns] = -logits[rows, columns]
    return -F.logsigmoid(-logits).sum()
