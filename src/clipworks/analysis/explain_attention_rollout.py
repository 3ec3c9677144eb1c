"""Attention roll-out: through which tokens the image's vector was gathered, all layers multiplied.

Claim: attention of one layer says little, as tokens are mixed by then; the product over layers, with the residual
connection as half the identity, follows what reaches the output and agrees better with ablation.

Formula: A_l = mean over heads;  R = prod_l norm((A_l + I) / 2);  the relevance of a patch is its entry in the row of
the token that is read (class token; rows under an attention pool; mean).

Paper: Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers.
Differs from the paper: made for images (as in later work); the text does not enter: every text gets the same map.
"""

from __future__ import annotations

from typing import Any

import torch

from ..registry import method
from .relevance import check_pairs, readout, transformer


@method(card="analysis-foundations", level="M")
def attention_rollout(encoder: Any, pixels: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return the share that every patch has in the image's vector, by attention alone.

    Parameters
    ----------
    encoder : an `Encoder` with an image transformer
    pixels : (n, 3, H, W), preprocessed
    words : one text vector per image (n, dim); checked, but without effect

    Returns
    -------
    float32 (n, h, w), not negative

    Inputs
    ------
    an image; the text plays no part

    Relations
    ---------
    `explain_gradient_attention` weighs the same maps by the gradient of the similarity.

    References
    ----------
    Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> found = attention_rollout(toy_encoder(), torch.ones(1, 3, 16, 16), torch.ones(1, 8))
    >>> found.shape, bool((found >= 0).all())
    (torch.Size([1, 4, 4]), True)
    """
    check_pairs(pixels, words, encoder)
    tower = transformer(encoder)
    asked: list[Any] = list(range(tower.config.depth)) + (["pool"] if tower.pool is not None else [])
    with torch.no_grad():
        output = tower.run(pixels.to(encoder.device, encoder.dtype), output_attention=asked)
        flow = torch.eye(output.tokens.shape[1], device=encoder.device).expand(len(pixels), -1, -1)
        for layer in range(tower.config.depth):
            mixed = output.attentions[layer].float().mean(1)
            mixed = (mixed + torch.eye(mixed.shape[1], device=mixed.device)) / 2
            flow = mixed / mixed.sum(-1, keepdim=True) @ flow
        pool = output.attentions["pool"].float().mean(1)[:, 0] if tower.pool is not None else None
        return readout(flow, output, pool).cpu()
