"""A second path through an image transformer, on which patches attend by their values and stay where they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_range


def value_patches(encoder: Any, pixels: torch.Tensor, blocks: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches by value-value attention beside the usual path, and the usual image vector.

    In each of the last `blocks` blocks, y = out(softmax(v v^T / sqrt(d)) v) with v the values of the usual path's
    tokens; the second path adds up the y, without feed-forward parts, from what the first of these blocks is given.

    Parameters
    ----------
    encoder : an `Encoder` with an image transformer
    pixels : (n, 3, H, W), preprocessed
    blocks : how many of the last blocks have the second path (default: all)

    Returns
    -------
    unit patches (n, h, w, dim) and unit image vectors (n, dim), both in the joint space
    """
    tower = encoder.visual
    if not hasattr(tower, "blocks"):
        raise ClipworksError("encoder must have an image transformer: a ResNet has no value attention. Got a ResNet.")
    depth = len(tower.blocks)
    count = depth if blocks is None else int(check_range("blocks", blocks, 1, depth))
    embedded = tower.stem(pixels.to(encoder.dtype))
    usual = tower.run(embeddings=embedded)
    start = tower.run(embeddings=embedded, stop=depth - count)
    tokens = second = start.tokens
    for block in tower.blocks[depth - count :]:
        second = second + block.attention(block.norm1(tokens), rule="vv")[0]
        tokens = block(tokens)[0]
    recalled = [embedded.flatten(2).transpose(1, 2)] if tower.memory is not None else []
    patches = tower.project(second[:, start.prefix :], *recalled)
    return F.normalize(patches.float(), dim=-1).unflatten(1, usual.grid), F.normalize(usual.pooled.float(), dim=-1)
