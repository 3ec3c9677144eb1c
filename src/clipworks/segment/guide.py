"""Whole-image attention for Trident: of a SAM-like model, or of the tower's own stem.

A guide is a function from an image (3, H, W), RGB in [0, 1], to attention (heads, N, N), values (heads, N, channels)
and the grid (rows, columns) of its N cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ClipworksError, need
from .affinity import pretrained

Guide = Callable[[torch.Tensor], "tuple[torch.Tensor, torch.Tensor, tuple[int, int]]"]
CAP = 0.9  # greatest threshold, so that a cell always keeps itself (release)


def guided_affinity(
    attention: torch.Tensor, values: torch.Tensor, factor: float = 1.2, negative: float | None = None
) -> torch.Tensor:
    """Attention without the cells whose values are unlike, mean over heads, rows to sum 1: (N, N).

    Entry (i, j) of a head is kept where cos(v_i, v_j) > th_i = min(factor * mean over heads and cells of row i, 0.9).

    Parameters
    ----------
    attention : (heads, N, N), after the softmax
    values : (heads, N, channels)
    factor : release: 1.2 (3.0 for street scenes, 0 where there is no background)
    negative : threshold in the place of a negative one (release, optional: 0.6)
    """
    if attention.ndim != 3 or values.shape[:2] != attention.shape[:2]:
        raise ClipworksError(
            f"guide must give attention (heads, N, N) and values (heads, N, channels). Got {tuple(attention.shape)}, "
            f"{tuple(values.shape)}."
        )
    unit = F.normalize(values.float(), dim=-1)
    near = unit @ unit.transpose(1, 2)
    threshold = factor * near.mean((0, 2))
    if negative is not None:
        threshold = torch.where(threshold < 0, negative, threshold)
    kept = attention.float() * (near > threshold.clamp(max=CAP)[None, :, None])
    mean = kept.mean(0)
    return mean / mean.sum(-1, keepdim=True).clamp(min=1e-12)


class SamGuide:
    """The last global block of a SAM image tower, through transformers.

    Parameters
    ----------
    name : on the hub ("facebook/sam-vit-base") or a folder; weights are read from safetensors only
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, name: str):
        transformers = need("transformers", "teachers")
        model = pretrained(transformers.SamModel, name, "guide", attn_implementation="eager")
        self.name, self.tower = name, model.vision_encoder.eval().requires_grad_(False)
        self.size, self.patch = self.tower.config.image_size, self.tower.config.patch_size

    def __call__(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """The longer side is brought to SAM's size, the rest padded; rows and columns of the padding are cut out."""
        height, width = image.shape[-2:]
        factor = self.size / max(height, width)
        tall, wide = min(self.size, round(height * factor)), min(self.size, round(width * factor))
        resized = F.interpolate(image[None], (tall, wide), mode="bilinear", align_corners=False, antialias=True)
        mean, std = (resized.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        pixels = F.pad((resized - mean) / std, (0, self.size - wide, 0, self.size - tall)).float()
        tower: Any = self.tower
        x = tower.patch_embed(pixels)
        x = x if tower.pos_embed is None else x + tower.pos_embed
        for layer in tower.layers[:-1]:
            x = layer(x)
        last = tower.layers[-1]
        x = last.layer_norm1(x)
        weights = last.attn(x)[1]
        heads, side = last.attn.num_attention_heads, self.size // self.patch
        values = last.attn.qkv(x).reshape(side * side, 3, heads, -1)[:, 2].transpose(0, 1)
        grid = (max(1, round(tall / self.patch)), max(1, round(wide / self.patch)))
        kept = (torch.arange(grid[0])[:, None] * side + torch.arange(grid[1])).flatten()
        weights = weights.reshape(heads, side * side, side * side)[:, kept][:, :, kept]
        return weights, values[:, kept], grid
