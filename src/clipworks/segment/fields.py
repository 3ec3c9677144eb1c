"""Functions of space that are learned: hash grids, features on them, densities and colours on plain grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import check_range

Grids = Sequence[tuple[int, int, int]]  # levels, cells along a side of the coarsest, of the finest
GRIDS: Grids = ((6, 8, 64), (6, 64, 256))
PAPER_GRIDS: Grids = ((12, 16, 128), (12, 128, 512))  # with 2 ** 19 entries of 8 channels (release)
CORNERS = torch.tensor([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
PRIMES = (1, 2654435761, 805459861)
THIN, THICKEST = -2.0, 10.0  # logarithms of a density: at the start, at most


class HashGrid(nn.Module):
    """Features of points, interpolated between the corners of grids; large grids share the rows of a table by a hash.

    Parameters
    ----------
    levels, low, high : number of grids and cells along a side of the coarsest and the finest, in geometric steps
    channels : of each level
    entries : of a level's table; a grid that has no more corners has a row for each

    Müller et al. 2022, Instant Neural Graphics Primitives with a Multiresolution Hash Encoding (SIGGRAPH).
    """

    def __init__(self, levels: int, low: int, high: int, channels: int = 4, entries: int = 2**15):
        super().__init__()
        check_range("levels", levels, 1)
        check_range("high", high, low)
        growth = (high / low) ** (1 / max(levels - 1, 1))
        self.sizes = [round(low * growth**level) for level in range(levels)]
        self.entries, self.width = entries, levels * channels
        self.tables = nn.ParameterList(
            nn.Parameter(torch.empty(min((size + 1) ** 3, entries), channels).uniform_(-1e-2, 1e-2))
            for size in self.sizes
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3) in [0, 1] to (N, levels channels)."""
        found = []
        for size, table in zip(self.sizes, self.tables, strict=True):
            at = x.clamp(0, 1) * size
            low = at.floor().clamp(max=size - 1)
            share = (at - low)[:, None]
            weights = torch.where(CORNERS.bool(), share, 1 - share).prod(-1)
            rows = self._rows(low.long()[:, None] + CORNERS, size)
            found.append(F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum"))
        return torch.cat(found, dim=-1)

    def _rows(self, corners: torch.Tensor, size: int) -> torch.Tensor:
        """Row of the table for corners (N, 8, 3), whole numbers."""
        x, y, z = corners.unbind(-1)
        if (size + 1) ** 3 <= self.entries:
            return (x * (size + 1) + y) * (size + 1) + z
        return (x * PRIMES[0] ^ y * PRIMES[1] ^ z * PRIMES[2]) % self.entries


class Radiance(nn.Module):
    """Density and colour of points, the same from all sides: four numbers at the corners of several grids, summed.

    No network: what a ray says reaches the corners around its samples directly, coarse grids first, so that a small
    scene is there after some hundred steps (as in Sun et al. 2022, Direct Voxel Grid Optimization, CVPR, which has one
    grid at a time). It starts as a thin grey mist.

    Parameters
    ----------
    sizes : corners along a side of each grid
    """

    def __init__(self, sizes: Sequence[int] = (12, 24, 48, 96)):
        super().__init__()
        self.grids = nn.ParameterList(nn.Parameter(torch.zeros(1, 4, size, size, size)) for size in sizes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 3) in [0, 1] to densities (N,) and colours (N, 3) in [0, 1]."""
        at = (2 * x - 1).view(1, 1, 1, -1, 3)
        read = [F.grid_sample(grid, at, align_corners=True, padding_mode="border")[0, :, 0, 0] for grid in self.grids]
        y = torch.stack(read).sum(0)
        return (y[0] + THIN).clamp(max=THICKEST).exp(), y[1:].sigmoid().T


class FeatureField(nn.Module):
    """Vectors of points: hash grids and one hidden layer.

    Parameters
    ----------
    dim : of the vectors
    grids : one or more hash grids (release: `PAPER_GRIDS`; the default is for a processor)
    channels, entries : of each level (release: 8, 2 ** 19)
    hidden : channels of the hidden layer
    """

    def __init__(
        self, dim: int, grids: Grids = GRIDS, channels: int = 4, entries: int = 2**15, hidden: int = 256
    ):
        super().__init__()
        self.grids = nn.ModuleList(HashGrid(*grid, channels, entries) for grid in grids)
        width = sum(levels for levels, _, _ in grids) * channels
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3) in [0, 1] to (N, dim); no gradient reaches the points."""
        return self.head(torch.cat([grid(x.detach()) for grid in self.grids], dim=-1))
