"""OpenAI's modified ResNet (RN50, RN101, RN50x4, RN50x16, RN50x64): three-convolution stem, average pooling in the
place of strides, attention pool."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ClipworksError, check_choice
from .config import VisionConfig
from .layers import TowerOutput, attention_weights, layer_index, resize_positions


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
        self.positions = nn.Parameter(torch.empty(1 + grid[0] * grid[1], width).normal_(0, width**-0.5))
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, dim)

    def forward(
        self, tokens: torch.Tensor, grid: tuple[int, int], mask: torch.Tensor | None = None, need_map: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, cells, width) to (B, dim), and the weights (B, heads, 1, 1 + cells) if asked for; `mask` (B, cells)
        hides cells."""
        table = resize_positions(self.positions, self.grid, grid)
        x = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + table.to(tokens.dtype)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for f, y in ((self.q, x[:, :1]), (self.k, x), (self.v, x)))  # fmt: skip
        seen = None if mask is None else F.pad(mask, (1, 0), value=True)[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        weights = attention_weights("qk", q, k, v, seen) if need_map else None
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
        output_attention: Sequence[str] = (),
        **other: object,
    ) -> TowerOutput:
        """Encode, with the seams that a convolutional tower has.

        Parameters
        ----------
        pixels : (B, 3, H, W); for sizes other than the trained one the pool's positions are interpolated
        mask : bool (B, rows * columns), False hides a cell of the last map from the pool
        output_layers : stages 0 to 3 whose maps (B, channels, h, w) are returned
        output_attention : ("pool",) returns the pool's weights (B, heads, 1, 1 + cells)

        Returns
        -------
        `TowerOutput`, `tokens` being the cells of the last map
        """
        for name, value in other.items():
            if value is not None:
                raise ClipworksError(f"a ResNet has no tokens inside, so it has no {name}. Got {name}={value!r:.60}.")
        kept = {layer_index("output_layers", i, 4): i for i in output_layers}
        for name in output_attention:
            check_choice("output_attention", name, ("pool",))
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
        pooled, weights = self.pool(tokens, grid, mask, need_map=bool(output_attention))
        return TowerOutput(pooled, tokens, layers, {} if weights is None else {"pool": weights}, 0, grid)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Cells of the last map (..., width) into the joint space (..., dim): the pool's value and output maps."""
        return self.pool.out(self.pool.v(tokens))
