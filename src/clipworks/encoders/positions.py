"""Positional tables for other grids and lengths: interpolated, stretched, rotary."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_range


def resize_positions(
    table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool = False
) -> torch.Tensor:
    """Interpolate the table of an image tower to another grid; rows before the grid (class token) stay.

    Parameters
    ----------
    table : (prefix + old rows * old columns, width); token index = row * columns + column
    old_grid, new_grid : rows and columns
    antialias : use the wider kernel for smaller grids (open_clip); off as in transformers and the dense methods

    Returns
    -------
    (prefix + new rows * new columns, width); the very table when the grids are equal

    Examples
    --------
    >>> resize_positions(torch.zeros(1 + 49, 8), (7, 7), (14, 10)).shape
    torch.Size([141, 8])
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    prefix = table.shape[0] - old_grid[0] * old_grid[1]
    if prefix < 0:
        raise ClipworksError(f"old_grid {tuple(old_grid)} has more cells than the table has rows ({table.shape[0]}).")
    cells = table[prefix:].T.reshape(1, -1, *old_grid).to(torch.promote_types(table.dtype, torch.float32))
    cells = F.interpolate(cells, tuple(new_grid), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([table[:prefix], cells.flatten(2)[0].T.to(table.dtype)])


def stretch_positions(table: torch.Tensor, new_length: int, keep: int = 20) -> torch.Tensor:
    """Stretch the table of a text tower, the first and best trained rows untouched (Long-CLIP, ECCV 2024).

    Parameters
    ----------
    table : (length, width)
    new_length : rows of the result; 248 for a table of 77 is Long-CLIP's factor of four
    keep : rows that stay as they are (default 20, paper)

    Returns
    -------
    (new_length, width): linear between rows, and linearly continued behind the last one
    """
    length = table.shape[0]
    check_range("new_length", new_length, length)
    check_range("keep", keep, 0, length - 2)
    if new_length == length:
        return table
    step = (length - keep) / (new_length - keep)
    at = keep + torch.arange(new_length - keep, device=table.device, dtype=torch.float64) * step
    low = at.floor().long()
    share = (at - low).to(table.dtype)[:, None]
    pair = low.clamp(max=length - 2)  # behind the last row the step that led to it goes on
    return torch.cat([table[:keep], table[low] + share * (table[pair + 1] - table[pair])])


def rotary(grid: tuple[int, int] | int, prefix: int = 0, theta: float = 100.0) -> Callable:
    """Rotary positions as an attention rule: `attention={layer: rotary((7, 7), prefix=1)}`.

    Queries and keys are turned by angles that grow with the position, so their product depends on the offset
    alone. On a grid the first half of each head's channels turns with the row, the second with the column.

    Parameters
    ----------
    grid : rows and columns of patches, or a number of tokens in a line
    prefix : tokens before them that are not turned (class token, prompts)
    theta : base of the frequencies (default 100, as vision towers with rotary positions use; 10000 for text)

    Returns
    -------
    a rule for the `attention` seam
    """
    lines = [torch.arange(n) for n in ((grid,) if isinstance(grid, int) else grid)]
    spans = torch.meshgrid(*lines, indexing="ij")

    def angles(channels: int, device: torch.device) -> torch.Tensor:
        if channels % (2 * len(spans)):
            raise ClipworksError(
                f"rotary positions need heads of a multiple of {2 * len(spans)} channels. Got {channels}."
            )
        pairs = channels // (2 * len(spans))
        speed = theta ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
        turned = torch.cat([s.flatten().to(device)[:, None] * speed for s in spans], dim=1)
        return F.pad(turned, (0, 0, prefix, 0))

    def turn(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        a, b = x.to(angle.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    def rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        angle = angles(q.shape[-1], q.device)
        logits = turn(q, angle) @ turn(k, angle).transpose(-2, -1) * q.shape[-1] ** -0.5
        return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1)

    return rule
