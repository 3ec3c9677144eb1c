"""Several texts per image, each a positive in a contrast of its own, as DreamLIP and LaCLIP have it.

Claim: drawing sentences of a long caption as several positives teaches more than the caption as a whole (DreamLIP, COCO
zero-shot R@1: long captions whole 30.2 / 21.4, sentences 35.7 / 25.6).

Formula: L = mean over slots k of InfoNCE(image, T_k): texts of other slots are no negatives of each other.

Papers: Zheng et al. 2024, DreamLIP: Language-Image Pre-training with Long Captions (ECCV); Fan et al. 2023, Improving
CLIP Training with Language Rewrites (NeurIPS).
Differs from the papers: nothing in the arithmetic.
Defaults: none here; DreamLIP takes six sentences beside the image's own caption.
"""

from __future__ import annotations

import torch

from ..errors import ClipworksError
from ..registry import method
from .common import Scale, check_rows
from .infonce import infonce


@method(card="dreamlip", level="M")
def multi_positive(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: Scale,
    *,
    all_image: torch.Tensor | None = None,
    all_text: torch.Tensor | None = None,
    offset: int = 0,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the mean over slots of the contrast between images and the texts of that slot.

    Parameters
    ----------
    image : unit rows of shape (n, dim)
    text : unit rows of shape (n, K, dim), K texts of each image
    scale : factor on the similarities
    all_image, all_text : rows of all processes, shapes (N, dim) and (N, K, dim), in the order of their ranks; default
        the local ones
    offset : position of the local rows among all
    smoothing : share of the target spread evenly over all columns

    Returns
    -------
    scalar tensor, float32 or better

    Raises
    ------
    ClipworksError
        If shapes do not fit, or there are no texts.

    Inputs
    ------
    normalised features of images with several texts each

    Relations
    ---------
    With one text, or K times the same, it is `infonce`. The recipe `caption_pools` draws the texts; `dreamlip` adds the
    patches that each text names.

    References
    ----------
    Zheng et al. 2024, DreamLIP: Language-Image Pre-training with Long Captions; Fan et al. 2023, LaCLIP

    Examples
    --------
    >>> image = torch.eye(4)
    >>> texts = torch.stack([image, image.roll(1, 0)], 1)  # a right and a wrong text each
    >>> round(multi_positive(image, texts, 20.0).item(), 3)
    10.0
    """
    check_rows(ndim=3, text=text)
    if text.shape[::2] != image.shape:
        raise ClipworksError(f"text must hold several rows per image, shape ({len(image)}, K, {image.shape[-1]}). "
                             f"Got {tuple(text.shape)}.")  # fmt: skip
    if (all_image is None) != (all_text is None):
        raise ClipworksError("all_image and all_text must be given together, or neither.")
    slots = [
        infonce(image, one, scale, all_image=all_image, all_text=None if all_text is None else all_text[:, k],
                offset=offset, smoothing=smoothing)
        for k, one in enumerate(text.unbind(1))
    ]  # fmt: skip
    return torch.stack(slots).mean()
