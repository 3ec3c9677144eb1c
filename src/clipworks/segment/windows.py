"""Sliding windows: any size of image through a tower in batches, averaged on one grid of patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import check_range


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one axis; the last is shifted inward, so none reaches out.

    >>> starts(10, 4, 3), starts(10, 4, 4), starts(3, 4, 2)
    ([0, 3, 6], [0, 4, 6], [0])
    """
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def padded(image: torch.Tensor, patch: int) -> torch.Tensor:
    """An image (3, H, W) whose last row and column are repeated until both sides are multiples of a patch."""
    below, right = (-image.shape[-2]) % patch, (-image.shape[-1]) % patch
    return F.pad(image[None], (0, right, 0, below), mode="replicate")[0]


def slide(
    image: torch.Tensor,
    work: Callable[[torch.Tensor], torch.Tensor],
    *,
    patch: int,
    window: int,
    stride: int,
    batch_size: int = 8,
) -> torch.Tensor:
    """Average what `work` says of overlapping windows.

    Parameters
    ----------
    image : (3, H, W), both sides multiples of the patch
    work : from windows (B, 3, h, w) to maps (B, channels, rows, columns), one cell per patch or a whole number of cells
        along each side of a patch
    patch, window, stride : in pixels; window and stride are multiples of the patch, so that all windows share one grid
    batch_size : windows per call; memory grows with it and with the grid, not with the number of windows

    Returns
    -------
    (channels, rows, columns) over the whole image
    """
    check_range("batch_size", batch_size, 1)
    height, width = image.shape[-2:]
    tall, wide = min(window, height), min(window, width)
    corners = [(top, left) for top in starts(height, tall, stride) for left in starts(width, wide, stride)]
    total = count = torch.empty(0)
    for first in range(0, len(corners), batch_size):
        part = corners[first : first + batch_size]
        maps = work(torch.stack([image[:, top : top + tall, left : left + wide] for top, left in part])).float()
        fine = maps.shape[-2] * patch // tall  # cells along a side of a patch
        if not total.numel():
            total = maps.new_zeros(maps.shape[1], height // patch * fine, width // patch * fine)
            count = maps.new_zeros(total.shape[1:])
        for (top, left), values in zip(part, maps, strict=True):
            rows = slice(top // patch * fine, (top + tall) // patch * fine)
            columns = slice(left // patch * fine, (left + wide) // patch * fine)
            total[:, rows, columns] += values
            count[rows, columns] += 1
    return total / count
