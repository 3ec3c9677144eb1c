"""AnoVL: patches that stay where they are, compared with domain-aware sentences, adapted to each image by itself.

Claim: value-value attention gives patch features that match words without training, sentences of the domain help, and
five steps of a linear adapter on the image's own pseudo labels sharpen its map.

Formula: second path x_vv <- x_vv + out(softmax(v v^T / sqrt(d)) v);  p_j = softmax(<z_j, (t_good, t_bad)>)_bad, cosines
without scale;  map = 3 x 3 mean of p, enlarged;  score = p of the image vector, averaged over 22 views.
Adaptation: z' = (1 - mix) z + mix tanh(W z) E with E all sentences;  loss = CE(p(z'), p(z)) - 0.5 log p(noisy z').

Paper: Deng et al. 2023, AnoVL: Adapting Vision-Language Models for Unified Zero-shot Anomaly Localization.
Differs from the paper: the sentences are a shorter list of the same kinds; angles and shifts of the views, and the
exact weights of the loss, are not confirmed; views are off by default, as they cost 22 passes.
Defaults: 5 steps of AdamW at 1e-3, mix 0.5, noise variance 0.055 (release).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import check_range
from ..registry import method
from ..zeroshot.sentences import encode
from .detector import AnomalyDetector
from .states import bad_share, sentences, state_vectors
from .value_path import value_patches

NOISE = 0.05 * 1.1  # variance


@method(card="anovl", level="M")
class AnoVL(AnomalyDetector):
    """Find what the words "damaged", "with flaw" describe, patch by patch.

    Parameters
    ----------
    encoder : an `Encoder` with an image transformer, a model's name or path; None for the bundled one
    name : what the images show, in words
    text : two vectors (2, dim) of good and defective things in the place of sentences about `name`
    domain : "industrial" (objects) or "textural" (surfaces): the sentences' kind
    blocks : how many of the last blocks have the second path (default: all)
    steps : of adaptation per image; 0 for none
    mix : share of the adapter
    lr : of the adapter
    views : whether the image score averages 22 views
    image_size : side in pixels to which images are squeezed (default: the encoder's)
    rate : share of good images that may be called defective, where good ones are given

    Attributes
    ----------
    text_ : the two vectors
    sentences_ : vectors of all sentences (S, dim)

    Inputs
    ------
    none (`fit(None)`); good images, where given, set the thresholds and teach nothing

    Relations
    ---------
    With `steps=0` it is training-free. WinCLIP has windows in the place of the second path.

    References
    ----------
    Deng et al. 2023, AnoVL: Adapting Vision-Language Models for Unified Zero-shot Anomaly Localization

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> images = torch.arange(16.0).expand(4, 3, 16, 16) * torch.linspace(0.9, 1.1, 4)[:, None, None, None]
    >>> AnoVL(toy_encoder(), text=np.eye(2, 8), steps=1).fit(images).score_map(images[0]).heat.shape
    (16, 16)
    """

    needs_images = False
    sigma = 0.0
    text_: np.ndarray
    sentences_: np.ndarray

    def __init__(
        self,
        encoder: Any = None,
        *,
        name: str = "object",
        text: Any = None,
        domain: str = "industrial",
        blocks: int | None = None,
        steps: int = 5,
        mix: float = 0.5,
        lr: float = 1e-3,
        views: bool = False,
        image_size: int | None = None,
        rate: float = 0.05,
    ):
        self.encoder = encoder
        self.name = name
        self.text = text
        self.domain = domain
        self.blocks = blocks
        self.steps = steps
        self.mix = mix
        self.lr = lr
        self.views = views
        self.image_size = image_size
        self.rate = rate

    def _begin(self) -> None:
        check_range("steps", self.steps, 0)
        check_range("mix", self.mix, 0, 1)
        self.text_ = state_vectors(self.text, self.name, self._model, self.domain)
        groups = sentences(self.name, self.domain)
        self.sentences_ = self.text_ if self.text is not None else encode([*groups[0], *groups[1]], self._model)

    def _describe(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        patches, image = value_patches(self._model, pixels, self.blocks)
        if self.views:
            config = self._model.config.preprocess
            seen = torch.stack([self._model.encode_image(v) for v in turned(pixels, config.mean, config.std)])
            image = F.normalize(seen.float().mean(0), dim=-1)
        return {"patches": patches, "image": image}

    def _judge(self, described: dict[str, torch.Tensor], without: int | None) -> tuple[torch.Tensor, Any]:
        text = torch.from_numpy(self.text_)
        patches = described["patches"]
        if self.steps and self.mix:
            spread = torch.from_numpy(self.sentences_)
            patches = torch.stack([adapted(z, text, spread, self.steps, self.mix, self.lr) for z in patches])
        heat = bad_share(patches, text)
        heat = F.avg_pool2d(F.pad(heat[:, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[:, 0]
        return heat, bad_share(described["image"], text).numpy()


def adapted(
    patches: torch.Tensor, text: torch.Tensor, spread: torch.Tensor, steps: int, mix: float, lr: float, seed: int = 0
) -> torch.Tensor:
    """Unit patches (h, w, dim) of one image after an adapter was trained on them; the adapter is dropped.

    Parameters
    ----------
    patches : unit features
    text : of good and of defective things (2, dim)
    spread : vectors of all sentences (S, dim), which the adapter adds
    steps, mix, lr : as for `AnoVL`
    seed : of the adapter's start and of the noise
    """
    draw = torch.Generator().manual_seed(seed)
    dim, bound = patches.shape[-1], patches.shape[-1] ** -0.5
    spread, target = spread.to(patches), bad_share(patches, text).detach()
    weight = ((2 * torch.rand(len(spread), dim, generator=draw) - 1) * bound).to(patches)
    bias = ((2 * torch.rand(len(spread), generator=draw) - 1) * bound).to(patches)

    def adapt(x: torch.Tensor) -> torch.Tensor:
        return F.normalize((1 - mix) * x + mix * torch.tanh(F.linear(x, weight, bias)) @ spread, dim=-1)

    with torch.enable_grad():
        weight.requires_grad_()
        bias.requires_grad_()
        optimizer = torch.optim.AdamW([weight, bias], lr=lr)
        for _ in range(steps):
            noise = math.sqrt(NOISE) * torch.randn(patches.shape, generator=draw).to(patches)
            clean = bad_share(adapt(patches), text).clamp(1e-6, 1 - 1e-6)
            dirty = bad_share(adapt(patches + noise), text).clamp(min=1e-6)
            loss = F.binary_cross_entropy(clean, target) - 0.5 * dirty.log().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return adapt(patches)


def turned(pixels: torch.Tensor, mean: Any, std: Any) -> list[torch.Tensor]:
    """22 views of images (n, 3, H, W): itself, 8 small rotations, 8 shifts, mirrored, grey, 3 quarter turns."""
    made = [pixels]
    for degrees in (-20, -15, -10, -5, 5, 10, 15, 20):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        made.append(_moved(pixels, [[c, -s, 0], [s, c, 0]]))
    for y, x in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
        made.append(_moved(pixels, [[1, 0, 0.15 * x], [0, 1, 0.15 * y]]))
    m, s3 = (pixels.new_tensor(v)[:, None, None] for v in (mean, std))
    light = ((pixels * s3 + m) * pixels.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    return [*made, pixels.flip(-1), (light - m) / s3, *(pixels.rot90(k, (2, 3)) for k in (1, 2, 3))]


def _moved(pixels: torch.Tensor, matrix: list[list[float]]) -> torch.Tensor:
    grid = F.affine_grid(pixels.new_tensor(matrix).expand(len(pixels), 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
