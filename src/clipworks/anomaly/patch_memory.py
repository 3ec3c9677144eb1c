"""Patch memory: a place is unusual if no place of any good image looks like it; a core set bounds what is kept.

Claim: features of medium depth of a frozen network, averaged over neighbours and remembered from good images, find
defects better than anything trained on them (PatchCore: MVTec AD, image AUROC 99.1 %), and a core set of a tenth to a
hundredth of them is as good as all.

Formula: z_j = unit(maps of medium depth, averaged over 3 x 3 cells);  memory M = core set of the z of all good images;
heat_j = min_{m in M} (1 - <z_j, m>), smoothed;  score of the image = max_j heat_j.

Paper: Roth et al. 2022, Towards Total Recall in Industrial Anomaly Detection (PatchCore); the core set of a stream:
Charikar et al. 1997, Incremental Clustering and Dynamic Information Retrieval.
Differs from the paper: features are of CLIP's own tower; every map has unit length, so that distances are bounded;
the core set is built as images stream by, in fixed memory (PatchCore keeps all, then chooses greedily); the score is
the plain maximum, not weighted by the neighbours' distances; thresholds come from the good images themselves.
Defaults: 3 x 3 neighbourhood and smoothing by 4 pixels of 224 as PatchCore; 4,096 places as a balance of time (about
30 ms per image at 28 x 28 cells) and detail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ClipworksError
from ..registry import method
from .common import Memory, grids, stacked
from .detector import FOLDS, AnomalyDetector


@method(card="anovl", level="MR")
class PatchMemory(AnomalyDetector):
    """Find what no good image shows.

    Parameters
    ----------
    encoder : an `Encoder`, a model's name or path; None for the bundled one
    image_size : side in pixels to which images are squeezed (default: the encoder's); twice the side finds defects of
        half the size for four times the time
    layers : which feature maps: blocks by number, stem maps such as "stem8"; None for the middle of the tower
    limit : most places that are remembered
    neighbourhood : side of the square of cells that is averaged, odd
    rate : share of good images that may be called defective

    Attributes
    ----------
    memory_ : what is remembered of good images

    Inputs
    ------
    images of good parts; no defect, no label and no word is seen

    Relations
    ---------
    WinCLIP's few-shot part is this with windows in the place of stem maps, and words added.

    References
    ----------
    Roth et al. 2022, Towards Total Recall in Industrial Anomaly Detection

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> good = torch.arange(16.0).expand(6, 3, 16, 16) * torch.linspace(0.9, 1.1, 6)[:, None, None, None]
    >>> detector = PatchMemory(toy_encoder(), limit=50, rate=0.2).fit(good)
    >>> detector.predict(torch.cat([good[:1], good[:1].mT]))  # the second has its stripes turned
    array([ 1, -1])
    """

    memory_: Memory

    def __init__(
        self,
        encoder: Any = None,
        *,
        image_size: int | None = None,
        layers: Sequence[int | str] | None = None,
        limit: int = 4096,
        neighbourhood: int = 3,
        rate: float = 0.05,
    ):
        self.encoder = encoder
        self.image_size = image_size
        self.layers = layers
        self.limit = limit
        self.neighbourhood = neighbourhood
        self.rate = rate

    def _begin(self) -> None:
        if self.neighbourhood < 1 or self.neighbourhood % 2 == 0:
            raise ClipworksError(f"neighbourhood must be odd and at least 1. Got {self.neighbourhood!r}.")
        self.memory_ = Memory(self.limit, FOLDS)

    def _describe(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"places": stacked(grids(self._model, pixels, self.layers), self.neighbourhood)}

    def _learn(self, described: dict[str, torch.Tensor], fold: int) -> None:
        self.memory_.add(described["places"].flatten(0, 2), fold)

    def _judge(self, described: dict[str, torch.Tensor], without: int | None) -> tuple[torch.Tensor, Any]:
        return self.memory_.distances(described["places"], without), None
