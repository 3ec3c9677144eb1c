"""A second path through an image transformer, on which patches attend by their values and stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..encoders.layers import layer_index
from ..errors import ClipworksError, check_range


def value_layers(
    encoder: Any, pixels: torch.Tensor, blocks: int | None = None, layers: Sequence[int] = (-1,)
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Patches by value-value attention beside the usual path, after several blocks, and the usual image vector.

    In each of the last `blocks` blocks, y = out(softmax(v v^T / sqrt(d)) v) with v the values of the usual path's
    tokens; the second path adds up the y, without feed-forward parts, from what the first of these blocks is given.
    Before that the two paths are one.

    Parameters
    ----------
    encoder : an `Encoder` with an image transformer
    pixels : (n, 3, H, W), preprocessed
    blocks : how many of the last blocks have the second path (default: all)
    layers : blocks after which patches are read (negative from the end)

    Returns
    -------
    unit patches (n, h, w, dim) of every layer and unit image vectors (n, dim), all in the joint space
    """
    tower = encoder.visual
    if not hasattr(tower, "blocks"):
        raise ClipworksError("encoder must have an image transformer: a ResNet has no value attention. Got a ResNet.")
    depth = len(tower.blocks)
    first = depth - (depth if blocks is None else int(check_range("blocks", blocks, 1, depth)))
    asked = [layer_index("layers", layer, depth) for layer in layers]
    embedded = tower.stem(pixels.to(encoder.device, encoder.dtype))
    usual = tower.run(embeddings=embedded)
    start = tower.run(embeddings=embedded, stop=0)
    tokens = second = start.tokens
    cells = embedded.flatten(2).transpose(1, 2)
    found = {}
    for number, block in enumerate(tower.blocks):
        if number >= first:
            second = second + block.attention(block.norm1(tokens), rule="vv")[0]
        tokens = block(tokens)[0]
        second = tokens if number < first else second
        if number in asked:
            patches = tower.project(second[:, start.prefix :], cells)
            found[number] = F.normalize(patches.float(), dim=-1).unflatten(1, usual.grid)
    return [found[layer] for layer in asked], F.normalize(usual.pooled.float(), dim=-1)


def value_patches(encoder: Any, pixels: torch.Tensor, blocks: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the last block alone: unit patches (n, h, w, dim) and unit image vectors (n, dim)."""
    (patches,), image = value_layers(encoder, pixels, blocks)
    return patches, image
