"""CLIP-DINOiser: MaskCLIP's features, averaged over patches that belong together, in one pass of CLIP.

Claim: two small convolutions on CLIP's own early features imitate DINO's affinity and an objectness map; with them one
pass of CLIP gives 62.1 mIoU on VOC21 where MaskCLIP gives 43.4, ViT-B/16 (comparison of Trident's repository).

Formula: c = Conv3x3(m), m the second norm's output in the third block from the end; A = cosines of c, below g = 0.2 set
to 0;  F'_p = sum_q A_pq F_q / (sum_q A_pq + 1e-6) on MaskCLIP's projected features, not normalised;
score = cos(F', t_k).
Objects: o = sigmoid(Conv1x1(m / |m|)); a pixel is background iff its best probability is below 0.99 and o <= 0.5.

Paper: Wysoczańska et al. 2024, CLIP-DINOiser: Teaching CLIP a few DINO tricks for open-vocabulary semantic segmentation
(ECCV).
Differs from the paper: without trained heads the affinity is that of a second model, or of the tower's own stem: the
paper's teacher variant; the stem's threshold was chosen on photos that no benchmark judges. Towers of fewer than three
blocks read the first. Heads learn in `segment.dinoiser_heads`.
"""

from __future__ import annotations

from typing import cast

import torch

from ..errors import check_range
from ..registry import method
from .affinity import SIDE, Provider, features_of, provider
from .common import Hidden, cosines, interpolation, pool, similarities
from .dinoiser_heads import Heads, early
from .maskclip import MaskCLIP

RELEASED, OWN = 0.2, 0.5  # thresholds: for DINO's cosines, for those of the tower's own stem


@method(card="clip-dinoiser", level="M")
class CLIPDINOiser(MaskCLIP):
    """Guided pooling of MaskCLIP's features.

    Parameters
    ----------
    heads : trained heads, see `segment.dinoiser_heads.learn`; None takes the affinity of a model instead
    affinity : without heads: "own", "hf:organisation/name", or a function, see `segment.affinity`
    threshold : g, cosines below it do not count; None is the release's 0.2 for trained heads and for another model's
        features, and 0.5 for those of the tower's own stem, where many pairs that do not belong together are above 0.2
    residual : as for `MaskCLIP`

    Inputs
    ------
    images and class names; the heads were trained on images alone

    Relations
    ---------
    With a threshold that leaves each patch itself alone it is `maskclip`; `proxyclip` averages values before the last
    norm, this averages features behind the projection.

    References
    ----------
    Wysoczańska et al. 2024, CLIP-DINOiser: Teaching CLIP a few DINO tricks for open-vocabulary semantic segmentation

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> from clipworks.segment.common import enter
    >>> CLIPDINOiser().features(enter(toy_encoder(), torch.zeros(1, 3, 16, 24), blocks=2)).shape
    torch.Size([1, 4, 6, 8])
    """

    blocks = 3
    sides = (SIDE,)

    def __init__(
        self,
        heads: Heads | None = None,
        affinity: str | Provider = "own",
        threshold: float | None = None,
        residual: bool = True,
    ):
        super().__init__(residual)
        self.heads, self.affinity = heads, provider(affinity)
        usual = OWN if heads is None and self.affinity == "own" else RELEASED
        self.threshold = check_range("threshold", usual if threshold is None else threshold, -1)

    def features(self, hidden: Hidden) -> torch.Tensor:
        """A map (B, rows, columns, dim) on the affinity's grid, not normalised."""
        plain = super().features(hidden)
        maps = features_of(self.affinity, hidden) if self.heads is None else self._heads(hidden).patches(early(hidden))
        near = similarities(maps)
        near = near.masked_fill(near < self.threshold, 0.0).clamp(min=0).to(plain)
        size, grid = maps.shape[1:3], hidden.grid
        if size != grid:  # the features are wanted on the finer grid: bilinear resizing is linear
            resize = torch.kron(interpolation(size[0], grid[0]), interpolation(size[1], grid[1])).to(plain)
            return pool(near, resize @ plain.flatten(1, 2)).unflatten(1, size)
        return pool(near, plain.flatten(1, 2)).unflatten(1, size)

    def local(self, hidden: Hidden, words: torch.Tensor) -> torch.Tensor:
        """Cosines (B, K, rows, columns)."""
        return cosines(self.features(hidden), words)

    def objects(self, hidden: Hidden) -> torch.Tensor:
        """(B, 1, h, w), how likely a patch belongs to an object: the trained head, or FOUND's rule without one."""
        if self.heads is None:
            return super().objects(hidden)
        return self._heads(hidden).objects(early(hidden)).sigmoid()[:, None]

    def _heads(self, hidden: Hidden) -> Heads:
        """The trained heads, where the tower is."""
        return cast(Heads, self.heads).to(hidden.inputs[0].device)
