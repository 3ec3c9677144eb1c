"""Occlusion: what the similarity loses when a part of the image is covered.

Claim: a model that looks at an object loses confidence when the object is covered and not when the background is; it
needs nothing from the inside of the model, so it explains any tower.

Formula: S_k = <image with square k blurred, text>;  the relevance of a cell is the mean over the squares that cover it
of S - S_k.

Paper: Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks.
Differs from the paper: squares are covered by the blurred image, where the paper has grey, which is an edge to see;
cells take the mean of the squares over them; the similarity with a text stands for the class probability.
Defaults: squares of a quarter of the side, moved by an eighth (64 passes at most).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_range
from ..registry import method
from .explain import blur
from .relevance import check_pairs


@method(card="analysis-foundations", level="MR")
def occlusion(
    encoder: Any, pixels: torch.Tensor, words: torch.Tensor, *, cells: int = 8, square: int = 2, batch_size: int = 32
) -> torch.Tensor:
    """Return how much of the similarity is lost where the image is covered.

    Parameters
    ----------
    encoder : an `Encoder` with any image tower
    pixels : (n, 3, H, W), preprocessed
    words : one text vector per image (n, dim)
    cells : cells per side of the map
    square : side of the covering square in cells
    batch_size : covered images per pass

    Returns
    -------
    float32 (n, cells, cells); above 0 speaks for the text, below 0 against it

    Inputs
    ------
    image-text pairs; (cells + square - 1)^2 passes per image, as squares reach over the edges

    Relations
    ---------
    The slowest and the most direct of the three: deletion with one square at a time.

    References
    ----------
    Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> occlusion(toy_encoder(), torch.ones(1, 3, 16, 16), torch.ones(1, 8), cells=2, square=1)  # nothing to cover
    tensor([[[0., 0.],
             [0., 0.]]])
    """
    words, pixels = check_pairs(pixels, words, encoder), pixels.to(encoder.device)
    check_range("cells", cells, 1, min(pixels.shape[2:]))
    check_range("batch_size", batch_size, 1)
    if not 1 <= square <= cells:
        raise ClipworksError(f"square must be from 1 to {cells} cells. Got {square!r}.")
    covers = squares(cells, square)
    large = F.interpolate(covers[:, None], pixels.shape[2:], mode="nearest").bool().to(pixels.device)
    with torch.no_grad():
        found = []
        for image, blurred, word in zip(pixels, blur(pixels), words, strict=True):
            # the whole image goes through the same kernels as the covered ones, so that equal images differ by 0
            parts = torch.cat([torch.zeros_like(large[:1]), large]).split(batch_size)
            scores = torch.cat([encoder.encode_image(torch.where(p, blurred, image)).float() @ word for p in parts])
            loss = (scores[0] - scores[1:]).cpu()
            found.append(torch.einsum("k,khw->hw", loss, covers) / covers.sum(0))
    return torch.stack(found)


def squares(cells: int, square: int) -> torch.Tensor:
    """All squares of a grid (k, cells, cells), 1 inside; those at the edges reach over it, so that all cells are
    covered equally often.

    >>> squares(3, 2).sum(0).unique()
    tensor([4.])
    """
    starts = range(1 - square, cells)
    made = torch.zeros(len(starts) ** 2, cells, cells)
    for k, (y, x) in enumerate((y, x) for y in starts for x in starts):
        made[k, max(y, 0) : y + square, max(x, 0) : x + square] = 1
    return made
