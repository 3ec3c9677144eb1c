"""ClearCLIP: the last block's query-query attention alone, without residual sum and feed-forward part.

Claim: the residual stream carries the noise of CLIP's dense features; dropping it, the feed-forward part and the
trained attention of the last block clears the map: 12.6 to 37.5 mIoU on average of five sets, ViT-B (its repository).

Formula: f = W_proj ln_post(W_o softmax(q q^T / sqrt(d)) v);  score = cos(f, t_k).

Paper: Lan et al. 2024, ClearCLIP: Decomposing CLIP Representations for Dense Vision-Language Inference (ECCV).
Differs from the paper: nothing in the arithmetic; the other rules that the paper compares are one keyword away.
"""

from __future__ import annotations

import torch

from ..encoders.layers import Rule
from ..registry import method
from .common import Dense, Hidden


@method(card="trident", level="M")
class ClearCLIP(Dense):
    """Attention output of the last block alone.

    Parameters
    ----------
    rule : attention rule, see `encoders.layers.attention_weights` (paper: "qq"; it also compares "kk", "vv", "qk")
    residual : keep residual sum and feed-forward part of the last block (paper: False, which is its claim)

    Inputs
    ------
    images and class names, no training

    Relations
    ---------
    `naclip` attends by keys and adds a bonus for neighbours; `proxyclip` takes the attention from another model.

    References
    ----------
    Lan et al. 2024, ClearCLIP: Decomposing CLIP Representations for Dense Vision-Language Inference (ECCV)

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> from clipworks.segment.common import enter
    >>> ClearCLIP().features(enter(toy_encoder(), torch.zeros(1, 3, 16, 24))).shape
    torch.Size([1, 4, 6, 8])
    """

    def __init__(self, rule: Rule = "qq", residual: bool = False):
        self.rule, self.residual = rule, residual

    def features(self, hidden: Hidden) -> torch.Tensor:
        """A map (B, h, w, dim), not normalised."""
        attended = hidden.attend(self.rule)
        return hidden.project(hidden.finish(attended) if self.residual else attended)
