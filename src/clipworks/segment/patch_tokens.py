"""Plain patch tokens: CLIP's own last tokens in the place of its pooled one, the baseline of all dense methods.

Claim: none; CLIP trains only the pooled vector, and its patch tokens, used as they are, locate little (11.7 mIoU on
average of eight sets, ViT-B/16, in the comparison of Trident's repository). Everything in this room is measured
against it.

Formula: x_L = block_L(x_{L-1}) with the trained attention, residual sums and feed-forward part;
f = W_proj ln_post(x_L) of every patch; score = cos(f, t_k).

Paper: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision (the model); Zhou et
al. 2022, Extract Free Dense Labels from CLIP (the comparison).
Differs from the papers: a tower that has a memory recalls every patch, unless `segment(memory=False)`.
"""

from __future__ import annotations

import torch

from ..registry import method
from .common import Dense, Hidden


@method(card="dense-foundations", level="M")
class PatchTokens(Dense):
    """CLIP's patch tokens as they are.

    Parameters
    ----------
    None

    Inputs
    ------
    images and class names, no training

    Relations
    ---------
    `maskclip` lets no patch attend to another; `clearclip` and `naclip` attend by likeness and drop the residual sum.

    References
    ----------
    Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> from clipworks.segment.common import enter
    >>> PatchTokens().features(enter(toy_encoder(), torch.zeros(1, 3, 16, 24))).shape
    torch.Size([1, 4, 6, 8])
    """

    def __init__(self) -> None:
        """There is nothing to set."""

    def features(self, hidden: Hidden) -> torch.Tensor:
        """A map (B, h, w, dim), not normalised."""
        return hidden.project(hidden.finish(hidden.attend(None)))
