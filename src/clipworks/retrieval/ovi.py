"""OVI: the vector of a text turned into an image's by learning patches, so that texts are found as by an image.

Claim: as OTI shows for images, comparing texts with texts is what CLIP was not trained for: ranking texts by the
inverted vector of the query text, which lies among the images, is better, while classifying images by inverted class
words must get worse.

Formula: w* = argmin over R visual tokens, repeated to all patches, of  1 - cos( f_I(w*), psi ),  psi the text's vector;
the tokens stand where the patch embeddings do, before positions are added;  OVI(psi) = f_I(w*) after S steps of AdamW.

Paper: Mistretta, Baldrati, Agnolucci et al. 2025, Cross the Gap: Exposing the Intra-modal Misalignment in
CLIP via Modality Inversion (ICLR).
Differs from the paper: all vectors begin with the same tokens. A tower with a convolutional stem learns what its stem
would give, which is where its patches begin.
Defaults: S = 1000, lr 0.02, weight decay 0.01, start N(0, 0.02^2), R = 1 for ViT-B/32 (4 for ViT-L/14 and SigLIP) from
the released code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np  # noqa: F401 - of the example
import torch
import torch.nn.functional as F

from ..errors import check_range
from ..prompts.parts import need_tokens
from ..registry import method
from .inversion import Inverted, invert

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


@method(card="cross-the-gap", level="M")
def visual_inversion(
    features: Any,
    encoder: Encoder,
    *,
    tokens: int = 1,
    steps: int = 1000,
    lr: float = 0.02,
    weight_decay: float = 0.01,
    batch_size: int = 64,
    seed: int = 0,
) -> Inverted:
    """Bring vectors of texts (or of anything) to the side of the images.

    Parameters
    ----------
    features : vectors of shape (n, dim), or `Features`
    encoder : whose image tower is used, a transformer; it is not changed
    tokens : number of visual tokens R, at most the number of patches
    steps : of the optimiser; choose it on validation data
    lr, weight_decay : of AdamW
    batch_size : vectors at a time; results do not depend on it
    seed : of the start

    Returns
    -------
    Inverted: `vectors` (n, dim), `tokens`, `losses`

    Raises
    ------
    ClipworksError
        If features do not fit the encoder or are not finite, or the image tower is no transformer.

    Inputs
    ------
    features of texts; the texts themselves are not needed

    Relations
    ---------
    `retrieval/oti` goes the other way and is several times as fast.

    References
    ----------
    Mistretta et al. 2025, Cross the Gap: Exposing the Intra-modal Misalignment in CLIP via Modality Inversion

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> visual_inversion(np.eye(2, 8), toy_encoder(), steps=3).vectors.shape
    (2, 8)
    """
    need_tokens("visual_inversion", encoder)
    rows, columns = encoder.config.vision.grid
    check_range("tokens", tokens, 1, rows * columns)

    def encode(learned: torch.Tensor) -> torch.Tensor:
        stem = repeated(learned, rows * columns).transpose(1, 2).unflatten(2, (rows, columns))
        found = encoder.visual(embeddings=stem.to(encoder.dtype))
        return F.normalize(found if found.dtype == torch.float64 else found.float(), dim=-1)

    shape = (tokens, encoder.config.vision.width)
    return invert(features, encoder, encode, shape, steps=steps, lr=lr, weight_decay=weight_decay,
                  batch_size=batch_size, seed=seed)  # fmt: skip


def repeated(tokens: torch.Tensor, patches: int) -> torch.Tensor:
    """Tokens (B, R, width) repeated to (B, patches, width), patch i taking token floor(i R / patches)."""
    return tokens[:, torch.arange(patches, device=tokens.device) * tokens.shape[1] // patches]
