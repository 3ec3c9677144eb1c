"""Random start weights, the same for the same seed: the scheme of OpenAI's release."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .layers import Block
from .stems import PatchStem

if TYPE_CHECKING:
    from .encoder import Encoder


def initialise(encoder: Encoder, seed: int) -> Encoder:
    """Fill all weights from `seed`: linears by width and depth of their tower, embeddings small, norms at one.

    Weights on the meta device are left alone.
    """
    if encoder.log_scale.is_meta:
        return encoder
    draw = torch.Generator(device=encoder.device).manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float) -> None:
        nn.init.normal_(tensor, std=std, generator=draw)

    patches = [m.projection for m in encoder.modules() if isinstance(m, PatchStem)]
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                # convolutions stand before rectifiers, which halve the variance; linears and patches do not
                gain = 2 if isinstance(module, nn.Conv2d) and module not in patches else 1
                normal(module.weight, (gain / module.weight[0].numel()) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for tower in (encoder.visual, encoder.text):
            for block in (b for b in tower.modules() if isinstance(b, Block)):
                width, depth = block.norm1.normalized_shape[0], len(tower.blocks)  # type: ignore[arg-type]
                for linear in (block.attention.q, block.attention.k, block.attention.v):
                    normal(linear.weight, width**-0.5)
                normal(block.attention.out.weight, width**-0.5 * (2 * depth) ** -0.5)
                normal(block.mlp.up.weight, (2 * width) ** -0.5)
                normal(block.mlp.down.weight, width**-0.5 * (2 * depth) ** -0.5)
        normal(encoder.text.tokens.weight, 0.02)
        normal(encoder.text.positions, 0.01)
        for name, tensor in encoder.visual.named_parameters():
            if name.rpartition(".")[2] in ("positions", "class_token", "probe"):
                normal(tensor, tensor.shape[-1] ** -0.5)
    return encoder
