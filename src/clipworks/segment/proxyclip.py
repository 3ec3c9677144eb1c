"""ProxyCLIP: the last block's values are averaged over patches that a vision model finds alike.

Claim: features of a self-supervised vision model say better than CLIP's own which patches belong together; 42.3 mIoU on
average of eight sets against 11.7 of plain tokens, ViT-B/16 with DINO ViT-B/16 (comparison of Trident's repository).

Formula: S = cosines of the model's patch features;  S' = g (S - b mean(S)), entries below 0 set to -infinity;
A = softmax(S'), the same for all heads;  f = W_proj ln_post(W_o A v), v resized to the model's grid, without class
token, residual sum and feed-forward part.

Paper: Lan et al. 2024, ProxyCLIP: Proxy Attention Improves CLIP for Open-Vocabulary Segmentation (ECCV).
Differs from the paper: the mean of S is each window's own (the release takes the batch's, so results depend on it); a
row without an entry falls back to uniform weights (the release gives NaN); any affinity will do, by default that of the
tower's own convolutional stem, which needs no second model and a gain of 10 (chosen on photos that no benchmark judges:
at 3 a cell's weights lie on much of the image); what a memory recalls is averaged by the same weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import check_range
from ..registry import method
from .affinity import SIDE, Provider, features_of, provider
from .common import Dense, Hidden, interpolation, similarities

RELEASED, OWN = 3.0, 10.0  # gains: for DINO's features, for those of the tower's own stem


@method(card="trident", level="M")
class ProxyCLIP(Dense):
    """Attention by another model's features.

    Parameters
    ----------
    affinity : "own", "hf:organisation/name", or a function, see `segment.affinity` (paper: DINO ViT-B/16)
    shift : b (release: 1.2)
    gain : g; None is the release's 3 for features of another model and 10 for the tower's own
    residual : keep residual sum and feed-forward part of the last block (paper: False)

    Inputs
    ------
    images and class names, no training; features of another model, or the tower's own

    Relations
    ---------
    `clearclip` takes the attention from CLIP's own queries; `trident` does this in windows, then over the image.

    References
    ----------
    Lan et al. 2024, ProxyCLIP: Proxy Attention Improves CLIP for Open-Vocabulary Segmentation (ECCV)

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> from clipworks.segment.common import enter
    >>> proxy = ProxyCLIP(lambda images: F.avg_pool2d(images, 2))
    >>> proxy.features(enter(toy_encoder(), torch.zeros(1, 3, 16, 24))).shape
    torch.Size([1, 8, 12, 8])
    """

    sides = (SIDE,)

    def __init__(
        self,
        affinity: str | Provider = "own",
        shift: float = 1.2,
        gain: float | None = None,
        residual: bool = False,
    ):
        self.residual = residual
        self.affinity = provider(affinity)
        usual = OWN if self.affinity == "own" else RELEASED
        self.shift, self.gain = check_range("shift", shift, 0), check_range("gain", usual if gain is None else gain, 0)

    def features(self, hidden: Hidden) -> torch.Tensor:
        """A map (B, rows, columns, dim) on the affinity's grid, not normalised."""
        tokens, recalled = self.averaged(hidden)
        features = hidden.visual.project(tokens)
        return features if recalled is None else features + recalled

    def averaged(self, hidden: Hidden) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The last block's output (B, rows, columns, width) before the last norm, and what a memory recalls there."""
        maps = features_of(self.affinity, hidden)
        weights = proxy_attention(maps, self.shift, self.gain).to(hidden.inputs[-1])
        size, grid = maps.shape[1:3], hidden.grid
        resize = torch.kron(interpolation(size[0], grid[0]), interpolation(size[1], grid[1])).to(weights)
        weights = weights @ resize  # bilinear resizing is linear: of the values, or of the weights' other side

        def rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return F.pad(weights, (hidden.prefix, 0))[:, None].expand(-1, q.shape[1], -1, -1)

        memory = getattr(hidden.visual, "memory", None)
        recalled = None if memory is None or hidden.embedded is None else weights @ memory(hidden.embedded)
        tokens = hidden.attend(rule)
        if self.residual:
            tokens = hidden.finish(tokens, resize.to(tokens) @ hidden.inputs[-1][:, hidden.prefix :])
        tokens = tokens.unflatten(1, size)
        return tokens, None if recalled is None else recalled.unflatten(1, size)


def proxy_attention(features: torch.Tensor, shift: float, gain: float) -> torch.Tensor:
    """softmax(gain (S - shift mean(S))) over the entries that are not negative, (B, N, N); without any: uniform."""
    near = similarities(features)
    logits = gain * (near - shift * near.mean((1, 2), keepdim=True))
    logits = logits.masked_fill(logits < 0, -torch.inf)
    empty = torch.isinf(logits).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1)
