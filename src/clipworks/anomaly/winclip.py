"""WinCLIP: windows of an image compared with sentences about good and damaged things, and with good images.

Claim: without any training image, windows encoded one by one and compared with an ensemble of sentences find and locate
defects (MVTec AD: image AUROC 91.8, pixel AUROC 85.1 %); a few good images, remembered at several scales, add to it.

Formula: window i sees only its patches: w_i = class feature;  p_i = softmax(scale <w_i, (t_good, t_bad)>)_bad;
text map at patch j over the windows W_j that cover it: |W_j| / sum 1 / p_i ("normal"), or
1 - |W_j| / sum 1 / (1 - p_i) ("abnormal"), averaged over the scales and with p of the whole image;
memory map: mean over the scales of min_m (1 - <f_j, m>) / 2;  map = text map + memory map;
score = p of the whole image, with good images (p + max of the memory map) / 2.

Paper: Jeong et al. 2023, WinCLIP: Zero-/Few-Shot Anomaly Classification and Segmentation.
Differs from the paper: no official code is known; which of the two harmonic means is meant is from memory ("normal",
re-implementations have "abnormal"), so both are here. The memory of a tower's windows spreads to their patches by the
plain mean. Two lists of sentences as published, with the readable name of the object.
Defaults: windows of 2 and 3 patches and the whole image (paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_choice
from ..registry import method
from .common import Memory
from .detector import FOLDS, AnomalyDetector
from .states import bad_share, state_vectors

TOWARDS = ("normal", "abnormal")


@method(card="anovl", level="M")
class WinCLIP(AnomalyDetector):
    """Find what the words "damaged", "with flaw" describe, and what few good images do not show.

    Parameters
    ----------
    encoder : an `Encoder` with an image transformer, a model's name or path; None for the bundled one
    name : what the images show, in words ("metal nut"); "object" where nothing better is known
    text : two vectors (2, dim) of good and defective things in the place of sentences about `name`
    windows : sides of the windows, in patches
    towards : which harmonic mean of the windows over a patch: "normal" (one good window speaks for it) or "abnormal"
    image_size : side in pixels to which images are squeezed (default: the encoder's)
    scale : factor of the cosines (default: the encoder's, 100 for CLIP)
    limit : most features remembered per scale
    rate : share of good images that may be called defective

    Attributes
    ----------
    text_ : the two vectors
    memories_ : what is remembered of good images at every scale; empty after `fit(None)`

    Inputs
    ------
    none (`fit(None)`, thresholds of 0.5), or a few images of good parts

    Relations
    ---------
    A window as large as the image gives the plain class feature: zero-shot classification. `PatchMemory` is the memory
    alone, on finer maps.

    References
    ----------
    Jeong et al. 2023, WinCLIP: Zero-/Few-Shot Anomaly Classification and Segmentation

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> images = torch.arange(16.0).expand(4, 3, 16, 16) * torch.linspace(0.9, 1.1, 4)[:, None, None, None]
    >>> detector = WinCLIP(toy_encoder(), text=np.eye(2, 8)).fit(images)
    >>> detector.score_map(images[0]).heat.shape
    (16, 16)
    """

    needs_images = False
    text_: np.ndarray
    memories_: dict[int, Memory]

    def __init__(
        self,
        encoder: Any = None,
        *,
        name: str = "object",
        text: Any = None,
        windows: Sequence[int] = (2, 3),
        towards: str = "normal",
        image_size: int | None = None,
        scale: float | None = None,
        limit: int = 4096,
        rate: float = 0.05,
    ):
        self.encoder = encoder
        self.name = name
        self.text = text
        self.windows = windows
        self.towards = towards
        self.image_size = image_size
        self.scale = scale
        self.limit = limit
        self.rate = rate

    def _begin(self) -> None:
        check_choice("towards", self.towards, TOWARDS)
        if not hasattr(self._model.visual, "blocks"):
            raise ClipworksError("encoder must have an image transformer: the windows of a ResNet overlap inside it.")
        self.text_ = state_vectors(self.text, self.name, self._model)
        self.memories_ = {}

    def _describe(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        visual = self._model.visual
        embedded = visual.stem(pixels)
        output = visual.run(embeddings=embedded)
        rows, columns = output.grid
        patches = visual.project(output.patches, embedded.flatten(2).transpose(1, 2))
        found = {"1": patches, "image": output.pooled}
        for side in self.windows:
            places = window_places(rows, columns, side).to(pixels.device)
            n = len(places)
            copies = embedded.repeat_interleave(n, 0)
            vectors = visual.run(embeddings=copies, keep=places.repeat(len(pixels), 1), whole=False).pooled
            found[str(side)] = vectors.view(len(pixels), n, -1)
        grid = torch.tensor([output.grid]).expand(len(pixels), 2)
        return {k: F.normalize(v.float(), dim=-1) for k, v in found.items()} | {"grid": grid}

    def _learn(self, described: dict[str, torch.Tensor], fold: int) -> None:
        for side in (1, *self.windows):
            memory = self.memories_.setdefault(side, Memory(self.limit, FOLDS))
            memory.add(described[str(side)][0], fold)

    def _judge(self, described: dict[str, torch.Tensor], without: int | None) -> tuple[torch.Tensor, Any]:
        rows, columns = described["grid"][0].tolist()
        scale = self._model.logit_scale if self.scale is None else self.scale
        text = torch.from_numpy(self.text_)
        whole = bad_share(described["image"], text, scale)
        maps = [whole[:, None].expand(-1, rows * columns)]
        for side in self.windows:
            cover = window_cover(rows, columns, side)
            maps.append(harmonic(bad_share(described[str(side)], text, scale), cover, self.towards))
        heat, score = torch.stack(maps).mean(0), whole
        if self.memories_:
            remembered = []
            for side, memory in self.memories_.items():
                cover = window_cover(rows, columns, side)
                far = memory.distances(described[str(side)], without) / 2
                remembered.append(far @ cover / cover.sum(0))
            unlike = torch.stack(remembered).mean(0)
            heat, score = heat + unlike, (whole + unlike.amax(1)) / 2
        return heat.view(-1, rows, columns), score.numpy()


def window_places(rows: int, columns: int, side: int) -> torch.Tensor:
    """Numbers (windows, side * side) of the patches of every window, from left to right and top to bottom."""
    if not 1 <= side <= min(rows, columns):
        raise ClipworksError(f"windows must be from 1 to {min(rows, columns)} patches wide on this grid. Got {side!r}.")
    numbers = torch.arange(rows * columns).view(rows, columns)
    return numbers.unfold(0, side, 1).unfold(1, side, 1).reshape(-1, side * side)


def window_cover(rows: int, columns: int, side: int) -> torch.Tensor:
    """Matrix (windows, patches), 1 where the window covers the patch."""
    places = window_places(rows, columns, side)
    return torch.zeros(len(places), rows * columns).scatter_(1, places, 1.0)


def harmonic(shares: torch.Tensor, cover: torch.Tensor, towards: str = "normal") -> torch.Tensor:
    """Harmonic mean (n, patches) of the windows' probabilities (n, windows) over those that cover a patch.

    Parameters
    ----------
    shares : probabilities of "defective"
    cover : (windows, patches), 1 where the window covers the patch
    towards : "normal" takes the mean of the probabilities, "abnormal" that of their complements

    >>> p, cover = torch.tensor([[0.2, 0.6]]), torch.ones(2, 1)
    >>> harmonic(p, cover), harmonic(p, cover, "abnormal")
    (tensor([[0.3000]]), tensor([[0.4667]]))
    """
    if towards == "abnormal":
        return 1 - harmonic(1 - shares, cover)
    return cover.sum(0) / ((1 / shares.clamp(min=1e-12)) @ cover)
