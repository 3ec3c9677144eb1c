"""What the merging of two vision models needs: a second head, a teacher that reads the student's pixels, points."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..encoders.encoder import Encoder
from ..encoders.layers import wide
from ..errors import ClipworksError, check_range


class MergeHead(nn.Module):
    """A second head on the patches of an image tower: blocks, maximum over the patches, norm, feed-forward part.

    Parameters
    ----------
    visual : transformer whose last blocks are copied to begin with
    layers : how many (at most all)
    hidden : width of the two hidden layers of the feed-forward part
    out : dimensions of the result
    """

    def __init__(self, visual: Any, layers: int, hidden: int, out: int):
        super().__init__()
        blocks = list(visual.blocks)
        self.blocks = nn.ModuleList(copy.deepcopy(blocks[max(0, len(blocks) - layers) :]))
        self.norm = nn.LayerNorm(visual.config.width)
        self.mlp = nn.Sequential(nn.Linear(visual.config.width, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, out))  # fmt: skip

    def tokens(self, patches: torch.Tensor) -> torch.Tensor:
        """The patches behind the blocks, (B, N, width)."""
        for block in self.blocks:
            patches = block(patches)[0]
        return patches

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """Norm and feed-forward part, (..., width) to (..., out)."""
        return self.mlp(self.norm(tokens))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches (B, N, width) to one vector per image, (B, out)."""
        return self.finish(self.tokens(patches).amax(1))

    def dense(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches (B, N, width) to a vector each, (B, N, out): the same without the maximum."""
        return self.finish(self.tokens(patches))


class Teacher:
    """A frozen copy of a model, which is shown what the student sees.

    An `Encoder` gets the pixels in its own size and normalisation and answers with vectors. Any other module gets RGB
    in [0, 1], (B, 3, H, W), and answers with a map (B, D, h, w) or with vectors (B, D).

    Parameters
    ----------
    model : encoder or module
    config : preprocessing of the student
    """

    def __init__(self, model: nn.Module, config: Any):
        self.model, self.config = copy.deepcopy(model).requires_grad_(False).eval(), config

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Answer (B, D) or (B, D, h, w) for the student's pixels."""
        self.model.to(pixels.device)
        model: Any = self.model
        if not isinstance(model, Encoder):
            found = model(self._scaled(pixels, self.config.mean, self.config.std, True).clamp(0, 1))
            if not isinstance(found, torch.Tensor) or found.ndim not in (2, 4):
                got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
                raise ClipworksError(f"teacher must answer with a map (B, D, h, w) or vectors (B, D). Got {got}.")
            return found
        own = model.config.preprocess
        if (own.mean, own.std) != (self.config.mean, self.config.std):
            rgb = self._scaled(pixels, self.config.mean, self.config.std, True)
            pixels = self._scaled(rgb, own.mean, own.std, False)
        size = model.image_size
        if pixels.shape[2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return model.encode_image(pixels)

    def width(self, size: int) -> int:
        """Dimensions of its answers."""
        if isinstance(self.model, Encoder):
            return self.model.dim
        like = next(self.model.parameters(), torch.zeros(()))
        return self(torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device)).shape[1]

    @staticmethod
    def _scaled(pixels: torch.Tensor, mean: Any, std: Any, back: bool) -> torch.Tensor:
        centre, spread = (torch.as_tensor(v, dtype=pixels.dtype, device=pixels.device)[:, None, None]
                          for v in (mean, std))  # fmt: skip
        return pixels * spread + centre if back else (pixels - centre) / spread


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean of 1 - cosine over rows (..., D), from 0 to 2; lengths do not matter.

    >>> cosine_distance(torch.eye(2), -3 * torch.eye(2))
    tensor(2.)
    """
    return 1 - F.cosine_similarity(wide(student), wide(teacher.detach()), dim=-1).mean()


def match(student: torch.Tensor, grid: tuple[int, int], teacher: torch.Tensor) -> torch.Tensor:
    """Return the cosine distance of patches (B, N, D) of a grid from a map (B, D, h, w), which is resized to it."""
    if teacher.shape[2:] != grid:
        teacher = F.interpolate(teacher, grid, mode="bilinear", antialias=True, align_corners=False)
    return cosine_distance(student, teacher.flatten(2).transpose(1, 2))


def prompt_points(mask: np.ndarray, count: int = 3, seed: int = 0) -> np.ndarray:
    """Return points inside a coarse mask (h, w) to prompt a mask decoder with: (n, 2) rows and columns, n <= count.

    An empty mask gives none: the coarse result then stands.

    >>> prompt_points(np.zeros((4, 4), bool)).shape
    (0, 2)
    """
    check_range("count", count, 1)
    inside = np.argwhere(np.asarray(mask, bool))
    chosen = np.random.default_rng(seed).choice(len(inside), min(count, len(inside)), replace=False)
    return inside[chosen]
