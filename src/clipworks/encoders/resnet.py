"""OpenAI's modified ResNet (RN50, RN101, RN50x4, RN50x16, RN50x64): three-convolution stem, average pooling in the
place of strides, attention pool."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ClipworksError
from .config import VisionConfig
from .layers import TowerOutput, layer_index, resize_positions


class Downsample(nn.Module):
    """Shortcut of a bottleneck whose shape changes: average pool, 1x1 convolution, norm."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv, self.bn = nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(F.avg_pool2d(x, self.stride) if self.stride > 1 else x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; the stride is an average pool after the second."""

    def __init__(self, inner: int, width: int, stride: int):
        super().__init__()
        outer = 4 * width
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outer, 1, bias=False), nn.BatchNorm2d(outer)
        self.downsample = Downsample(inner, outer, stride) if stride > 1 or inner != outer else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(F.avg_pool2d(y, self.stride) if self.stride > 1 else y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """The mean of the map, as a token before its cells, attends to all of them.

    Parameters
    ----------
    grid : rows and columns at the trained image size
    width, heads, dim : channels of the map, attention heads, dimensions of the result
    """

    def __init__(self, grid: tuple[int, int], width: int, heads: int, dim: int):
        super().__init__()
        self.grid, self.heads = grid, heads
        self.positions = nn.Parameter(torch.randn(1 + grid[0] * grid[1], width) * width**-0.5)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, dim)

    def forward(
        self, tokens: torch.Tensor, grid: tuple[int, int], mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, rows * columns, width) to (B, dim), and q, k as heads for the attention map; `mask` hides cells."""
        table = resize_positions(self.positions, self.grid, grid)
        x = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + table.to(tokens.dtype)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for f, y in ((self.q, x[:, :1]), (self.k, x), (self.v, x)))  # fmt: skip
        seen = None if mask is None else F.pad(mask, (1, 0), value=True)[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        logits = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = (logits if seen is None else logits.masked_fill(~seen, -torch.inf)).softmax(-1)
        return self.out(y.transpose(1, 2).flatten(2))[:, 0], weights


class ModifiedResNet(nn.Module):
    """Image tower.

    Parameters
    ----------
    config : `layers` are the blocks of the four stages, `width` the channels after the stem
    dim : dimensions of the joint space
    """

    def __init__(self, config: VisionConfig, dim: int):
        super().__init__()
        if isinstance(config.layers, int):
            raise ClipworksError(f"layers of a ResNet must be four numbers. Got {config.layers!r}.")
        width = config.width
        self.config = config
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        inner = [width, *(4 * width * 2**i for i in range(4))]
        self.layers = nn.ModuleList(
            nn.Sequential(
                Bottleneck(before, after // 4, 1 if stage == 0 else 2),
                *(Bottleneck(after, after // 4, 1) for _ in range(config.layers[stage] - 1)),
            )
            for stage, (before, after) in enumerate(pairwise(inner))
        )
        self.pool = AttentionPool2d(config.grid, inner[-1], config.heads, dim)

    def forward(self, pixels: torch.Tensor, **seams) -> torch.Tensor:
        """(B, 3, H, W) to (B, dim), not normalised; `seams` as in `run`."""
        return self.run(pixels, **seams).pooled

    def run(
        self,
        pixels: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        output_layers: Sequence[int] = (),
        output_attention: Sequence[int] = (),
        **other: object,
    ) -> TowerOutput:
        """Encode, with the seams that a convolutional tower has.

        Parameters
        ----------
        pixels : (B, 3, H, W); for sizes other than the trained one the pool's positions are interpolated
        mask : bool (B, rows * columns), False hides a cell of the last map from the pool
        output_layers : stages 0 to 3 whose maps (B, channels, h, w) are returned
        output_attention : (3,) returns the pool's weights (B, heads, 1, 1 + cells)

        Returns
        -------
        `TowerOutput`, `tokens` being the cells of the last map
        """
        for name, value in other.items():
            if value is not None:
                raise ClipworksError(f"a ResNet has no tokens inside, so {name} cannot be used with it. Got {value!r:.60}.")
        kept = {layer_index("output_layers", i, 4): i for i in output_layers}
        mapped = {layer_index("output_attention", i, 4): i for i in output_attention}
        x = F.relu(self.bn1(self.conv1(pixels)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        layers = {}
        for stage, layer in enumerate(self.layers):
            x = layer(x)
            if stage in kept:
                layers[kept[stage]] = x
        grid = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        pooled, weights = self.pool(tokens, grid, mask)
        return TowerOutput(pooled, tokens, layers, {name: weights for name in mapped.values()}, 0, grid)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Cells of the last map (..., width) into the joint space (..., dim): the pool's value and output maps."""
        return self.pool.out(self.pool.v(tokens))
