"""A small decoder that proposes masks: learned queries look at an image's patches and each draws one mask.

    maps, coarse to fine  ->  pixels (B, width, h, w): lateral 1x1, upsampled and added, 3x3
    queries               ->  cross-attention (where the query's last mask is), self-attention, feed-forward; L times
    mask_q = <mlp(query_q), pixels>          proposals of every layer, the last ones are the answer

What a mask shows is a class head's business: `WordHead` brings a query into the joint space and compares it with class
words and a learned "no object". Methods build on four functions: `mask_pool` (features under masks), `semantic_map`
(from proposals to a score for every pixel and class), `sine_positions`, `tower_maps` (a tower's maps for the decoder).

Cheng et al. 2022, Masked-attention Mask Transformer for Universal Image Segmentation (CVPR): its masked attention; one
scale of memory in the place of three, no deformable attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..encoders.layers import MLP, Attention
from ..errors import ClipworksError, check_range
from .common import Hidden, enter

VOID_STD = 0.02  # of the "no object" vector's start

# from the number of a layer, the queries (B, Q, width) behind it and the masks before it to the queries that go on
Change = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Proposals:
    """What a decoder's layer says of a batch.

    Attributes
    ----------
    masks : (B, Q, h, w), logits that cover the images
    queries : (B, Q, width)
    earlier : the proposals of the layers before, for losses at every layer
    """

    masks: torch.Tensor
    queries: torch.Tensor
    earlier: list[Proposals] = field(default_factory=list)


class MaskDecoder(nn.Module):
    """Queries, and the pixels that they draw on.

    Parameters
    ----------
    channels : of the maps that it will be given, coarse to fine, as `map_channels` says
    width : channels inside
    queries : masks that are proposed
    layers : decoder layers
    heads : of the attention
    """

    def __init__(
        self, channels: Sequence[int], *, width: int = 128, queries: int = 20, layers: int = 3, heads: int = 4
    ):
        super().__init__()
        check_range("queries", queries, 1)
        if width % heads or width % 4:
            raise ClipworksError(f"width must be a multiple of heads ({heads}) and of 4. Got {width}.")
        self.pixels = PixelDecoder(channels, width)
        self.queries = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.places = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.memory_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.draw = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, maps: Sequence[torch.Tensor], change: Change | None = None) -> Proposals:
        """Proposals from maps (B, channels, h, w), coarse to fine; masks have the finest grid.

        `change` may put something into the queries behind every layer, before they propose.
        """
        coarse, x = self.pixels(maps)
        grid = (coarse.shape[2], coarse.shape[3])
        memory = self.memory_norm(coarse.flatten(2).transpose(1, 2))
        memory = memory + sine_positions(*grid, coarse.shape[1]).to(memory)
        queries, places = (q.expand(len(x), -1, -1) for q in (self.queries, self.places))
        found = [self._propose(queries, x)]
        for number, layer in enumerate(self.layers):
            queries = layer(queries, places, memory, _seen(found[-1].masks, grid))
            if change is not None:
                queries = change(number, queries, found[-1].masks)
            found.append(self._propose(queries, x))
        found[-1].earlier = found[:-1]
        return found[-1]

    def _propose(self, queries: torch.Tensor, pixels: torch.Tensor) -> Proposals:
        queries = self.norm(queries)
        return Proposals(torch.einsum("bqc,bchw->bqhw", self.draw(queries), pixels), queries)


class PixelDecoder(nn.Module):
    """Maps of several grids as one on the finest: a feature pyramid's way down.

    Parameters
    ----------
    channels : of the maps, coarse to fine
    width : channels of the result
    """

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(1, width)) for _ in channels[1:]
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The coarsest map and the finest grid's, (B, width, h, w) each; the same one if there is one map."""
        coarse = x = self.lateral[0](maps[0])
        for lateral, smooth, finer in zip(self.lateral[1:], self.smooth, maps[1:], strict=True):
            x = F.interpolate(x, finer.shape[-2:], mode="bilinear", align_corners=False) + lateral(finer)
            x = F.relu(smooth(x))
        return coarse, x


class DecoderLayer(nn.Module):
    """Cross-attention, self-attention, feed-forward, a norm behind each sum."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.cross, self.own = Attention(width, heads), Attention(width, heads)
        self.mlp = MLP(width, 4 * width, "relu")
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self, x: torch.Tensor, places: torch.Tensor, memory: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Queries (B, Q, width) with their places and a memory (B, N, width); `seen` (B, Q, N) hides what is False."""
        x = self.norms[0](x + self.cross(x + places, memory, mask=None if seen is None else seen[:, None])[0])
        x = self.norms[1](x + self.own(x + places)[0])
        return self.norms[2](x + self.mlp(x))


def _seen(masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Where masks (B, Q, h, w) are on the memory's grid, (B, Q, N); everywhere for a mask that is nowhere."""
    coarse = F.interpolate(masks.detach(), grid, mode="bilinear", align_corners=False, antialias=True).flatten(2) > 0
    return coarse | ~coarse.any(-1, keepdim=True)


class WordHead(nn.Module):
    """From queries to logits of class words, and of "no object" behind them: scale * cos(mlp(query), [words; none]).

    Parameters
    ----------
    width : channels of a query
    dim : of the joint space
    scale : factor of the cosines (published: 100)
    """

    def __init__(self, width: int, dim: int, scale: float = 100.0):
        super().__init__()
        self.scale = scale
        self.embed = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
        self.none = nn.Parameter(torch.randn(dim) * VOID_STD)

    def forward(self, queries: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """(B, Q, width) and unit rows (K, dim) to (B, Q, K + 1)."""
        return self.scale * F.normalize(self.embed(queries), dim=-1) @ self.rows(words).T

    def painted(self, proposals: Proposals) -> torch.Tensor:
        """The queries' unit vectors, each weighted by its mask: a map (B, h, w, dim), not normalised."""
        unit = F.normalize(self.embed(proposals.queries), dim=-1)
        return torch.einsum("bqd,bqhw->bhwd", unit, proposals.masks.sigmoid())

    def rows(self, words: torch.Tensor) -> torch.Tensor:
        """The unit rows (K + 1, dim): class words (K, dim), then "no object"."""
        return torch.cat([words.to(self.none), F.normalize(self.none, dim=0)[None]])


def mask_pool(features: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Means of features (B, C, h, w) where masks (B, Q, h', w') are above 0: (B, Q, C); 0 for a mask that is nowhere.

    >>> mask_pool(torch.tensor([[[[1.0, 2.0, 6.0]]]]), torch.tensor([[[[-1.0, 3.0, 0.1]]]]))
    tensor([[[4.]]])
    """
    if masks.shape[-2:] != features.shape[-2:]:
        masks = F.interpolate(masks, features.shape[-2:], mode="bilinear", align_corners=False)
    chosen = (masks > 0).to(features)
    total = torch.einsum("bchw,bqhw->bqc", features, chosen)
    return total / (chosen.sum((2, 3))[..., None] + 1e-8)


def semantic_map(probabilities: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """sum_q p_q(class) sigmoid(mask_q): (B, Q, K) and logits (B, Q, h, w) to (B, K, h, w)."""
    return torch.einsum("bqk,bqhw->bkhw", probabilities, masks.sigmoid())


def share(scores: torch.Tensor) -> torch.Tensor:
    """Scores (K, h, w) that are not negative, as shares of their sum: how sure a semantic map is of a class."""
    return scores / scores.sum(0, keepdim=True).clamp(min=1e-6)


def sine_positions(rows: int, columns: int, width: int, base: float = 10000.0) -> torch.Tensor:
    """Sines and cosines of the place of every cell, (rows * columns, width): half of them of the row.

    >>> sine_positions(2, 3, 8).shape
    torch.Size([6, 8])
    """
    speeds = base ** (-torch.arange(width // 4) / (width // 4))

    def line(count: int) -> torch.Tensor:
        angles = (torch.arange(count) + 1)[:, None] / (count + 1e-6) * 2 * torch.pi * speeds
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    y, x = line(rows)[:, None].expand(-1, columns, -1), line(columns)[None].expand(rows, -1, -1)
    return torch.cat([y, x], dim=-1).flatten(0, 1)


def last_tokens(hidden: Hidden) -> torch.Tensor:
    """(B, N, width), what the tower's last block gives; of a ResNet the cells of its last map."""
    return hidden.block(hidden.inputs[-1])[0] if hasattr(hidden.visual, "blocks") else hidden.inputs[-1]


def tower_maps(hidden: Hidden, tokens: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The maps of a tower for a decoder, coarse to fine: `last_tokens`, then the stem's finer maps."""
    tokens = last_tokens(hidden) if tokens is None else tokens
    last = tokens[:, hidden.prefix :].transpose(1, 2).unflatten(2, hidden.grid)
    return [last, *(hidden.maps[side] for side in sorted(hidden.maps, reverse=True))]


@torch.no_grad()
def map_channels(encoder: Any, sides: Sequence[int]) -> list[int]:
    """Channels of what `tower_maps` gives for an encoder."""
    size = encoder.image_size
    hidden = enter(encoder, torch.zeros(1, 3, size, size), sides=sides, memory=False)
    return [maps.shape[1] for maps in tower_maps(hidden)]
