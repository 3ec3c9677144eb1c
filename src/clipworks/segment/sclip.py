"""SCLIP: in the last block patches attend to patches of like query and of like key.

Claim: correlative self-attention turns CLIP into a dense predictor without training; 38.2 mIoU on average of eight sets
against 11.7 of plain tokens, ViT-B/16 (comparison of Trident's repository).

Formula: A = softmax(q q^T / sqrt(d)) + softmax(k k^T / sqrt(d)), the two added, so rows sum to 2;
x_L = x + W_o A v, then the feed-forward part with its residual sum; score = cos(W_proj ln_post(x_L), t_k).

Paper: Wang, Mei and Yuille 2024, SCLIP: Rethinking Self-Attention for Dense Vision-Language Inference (ECCV).
Differs from the paper: nothing in the arithmetic; scale and threshold are `segment`'s and not tuned per data set.
"""

from __future__ import annotations

import torch

from ..registry import method
from .common import Dense, Hidden


@method(card="trident", level="MR")
class SCLIP(Dense):
    """Correlative self-attention in the last block.

    Parameters
    ----------
    residual : keep residual sum and feed-forward part of the last block (paper: True)

    Inputs
    ------
    images and class names, no training

    Relations
    ---------
    `clearclip` takes the first of the two terms and drops residual sum and feed-forward part; `naclip` the second, with
    a bonus for neighbours.

    References
    ----------
    Wang, Mei and Yuille 2024, SCLIP: Rethinking Self-Attention for Dense Vision-Language Inference (ECCV)

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> from clipworks.segment.common import enter
    >>> SCLIP().features(enter(toy_encoder(), torch.zeros(1, 3, 16, 24))).shape
    torch.Size([1, 4, 6, 8])
    """

    def __init__(self, residual: bool = True):
        self.residual = residual

    def features(self, hidden: Hidden) -> torch.Tensor:
        """A map (B, h, w, dim), not normalised."""
        attended = hidden.attend("qq+kk")
        return hidden.project(hidden.finish(attended) if self.residual else attended)
