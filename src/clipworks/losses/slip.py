"""SLIP's loss: the contrast of images with words, and beside it that of two strong views of each image.

Claim: a SimCLR term on the image tower improves zero-shot accuracy (YFCC15M, ViT-B/16, 25 epochs, ImageNet: CLIP 37.6,
SLIP 42.8).

Formula: L = InfoNCE(image, text) + w NT-Xent(view 1, view 2).

Paper: Mu, Kirillov, Wagner and Xie 2022, SLIP: Self-supervision meets Language-Image Pre-training (ECCV).
Differs from the paper: nothing in the loss; the released code gathers rows of the contrast with words without gradient.
Defaults: w = 1 and temperature 0.1 from the released code.
"""

from __future__ import annotations

import torch

from ..errors import check_range
from ..registry import method
from .common import Scale
from .infonce import infonce
from .simclr import simclr


@method(card="contrastive-foundations", level="M")
def slip(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: Scale,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    weight: float = 1.0,
    temperature: float = 0.1,
    all_image: torch.Tensor | None = None,
    all_text: torch.Tensor | None = None,
    all_first: torch.Tensor | None = None,
    all_second: torch.Tensor | None = None,
    offset: int = 0,
) -> dict[str, torch.Tensor]:
    """Return the contrastive loss and the weighted self-supervised one.

    Parameters
    ----------
    image, text : unit rows of a weak view and its caption, shape (n, dim)
    scale : factor on their similarities
    first, second : rows of the head for two strong views, shape (n, width)
    weight : of the self-supervised term (1: paper)
    temperature : of the self-supervised term (0.1: released code)
    all_image, all_text, all_first, all_second : rows of all processes, in the order of their ranks
    offset : position of the local rows among all

    Returns
    -------
    dict with `infonce` and `simclr`, whose sum is the loss

    Raises
    ------
    ClipworksError
        If shapes do not fit, a batch is empty, or weight is negative.

    Inputs
    ------
    features of image-text pairs, and of two further views of the images

    Relations
    ---------
    With weight=0 it is `infonce`. The recipe `pretraining/slip` makes the views and holds the head.

    References
    ----------
    Mu, Kirillov, Wagner and Xie 2022, SLIP: Self-supervision meets Language-Image Pre-training

    Examples
    --------
    >>> rows = torch.eye(4)
    >>> sorted(slip(rows, rows, 10.0, rows, rows))
    ['infonce', 'simclr']
    """
    check_range("weight", weight, 0.0)
    words = infonce(image, text, scale, all_image=all_image, all_text=all_text, offset=offset)
    views = simclr(first, second, temperature, all_first=all_first, all_second=all_second, offset=offset)
    return {"infonce": words, "simclr": weight * views}
