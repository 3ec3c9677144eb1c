"""Gradient-weighted attention: the attention that raises the similarity with the text, layer upon layer.

Claim: attention weighed by the gradient of the output, negative parts left out, and added up along the layers, explains
transformers, those of images and text among them, better than roll-out or raw attention.

Formula: E_l = mean over heads of max(0, dS/dA_l * A_l);  R <- R + E_l R, from R = I;  S = <image, text>;
the relevance of a patch is its entry in the row of the token that is read.

Paper: Chefer, Gur and Wolf 2021, Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
Transformers.
Differs from the paper: nothing for a class token; towers without one are read in the mean of the rows, or in those that
an attention pool looks at. A memory beside the blocks (`vit.Memory`) passes no attention and is not explained.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..encoders.layers import attention_weights
from ..registry import method
from .relevance import check_pairs, readout, transformer


@method(card="analysis-foundations", level="MR")
def gradient_attention(encoder: Any, pixels: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return what the similarity with the text gained from every patch, by attention and its gradient.

    Parameters
    ----------
    encoder : an `Encoder` with an image transformer
    pixels : (n, 3, H, W), preprocessed
    words : one text vector per image (n, dim)

    Returns
    -------
    float32 (n, h, w), not negative

    Inputs
    ------
    image-text pairs; one pass forward and one back

    Relations
    ---------
    Without the gradient, and with rows that sum to 1, it is `explain_attention_rollout`.

    References
    ----------
    Chefer, Gur and Wolf 2021, Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
    Transformers

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> found = gradient_attention(toy_encoder(), torch.ones(1, 3, 16, 16), torch.ones(1, 8))
    >>> found.shape, bool((found >= 0).all())
    (torch.Size([1, 4, 4]), True)
    """
    words = check_pairs(pixels, words, encoder)
    tower = transformer(encoder)
    kept: list[torch.Tensor] = []

    def keep(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        weights = attention_weights("qk", q, k, v, mask)
        kept.append(weights if weights.requires_grad else weights.requires_grad_())
        return weights

    asked = ["pool"] if tower.pool is not None else []
    with torch.enable_grad():
        rules = dict.fromkeys(range(tower.config.depth), keep)
        output = tower.run(pixels.detach().to(encoder.device, encoder.dtype), attention=rules, output_attention=asked)
        similarity = (F.normalize(output.pooled.float(), dim=-1) * words).sum()
        slopes = torch.autograd.grad(similarity, kept, allow_unused=True)
    flow = torch.eye(output.tokens.shape[1], device=encoder.device).expand(len(pixels), -1, -1)
    for weights, slope in zip(kept, slopes, strict=True):
        if slope is not None:
            flow = flow + (slope * weights.detach()).clamp(min=0).float().mean(1) @ flow
    flow = flow - torch.eye(flow.shape[-1], device=flow.device)  # what a token has from itself by doing nothing
    pool = output.attentions["pool"].detach().float().mean(1)[:, 0] if tower.pool is not None else None
    return readout(flow, output, pool).cpu()
