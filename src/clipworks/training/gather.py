"""Rows of all processes in one tensor, with the gradient that a single process would give.

Each process computes the loss of its own rows against the gathered rows of all, `S = exp(s) * a_local @ b_all.T`.
Averaged over the processes, as data-parallel training does, value and gradient are those of one process holding the
whole batch, for the encoders and for the scale. Gathering without gradient would lose the key side of every term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def processes() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums what every process says about these rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes in the order of their ranks, differentiably.

    Parameters
    ----------
    rows : tensor of shape (n, ...), with the same shape on every process

    Returns
    -------
    tensor of shape (n * processes, ...); the argument itself with one process
    """
    return rows if processes() == 1 else _Gather.apply(rows)


def local_rows(
    loss: Callable[..., Any],
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    **extra: Any,
) -> Any:
    """Call a loss that takes `all_image`, `all_text` and `offset` on local rows against gathered ones.

    With one process the gathered rows are the local ones and the loss is called plainly.
    """
    if processes() == 1:
        return loss(image, text, scale, **extra)
    gathered = {"all_image": gather(image), "all_text": gather(text), "offset": rank() * len(image)}
    return loss(image, text, scale, **gathered, **extra)


def full_matrix(
    loss: Callable[..., Any],
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    **extra: Any,
) -> Any:
    """Call any loss on the gathered rows of both sides; exact as well, at the memory of the whole matrix."""
    return loss(gather(image), gather(text), scale, **extra)


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over the processes, without gradient."""
    values = values.detach().clone()
    if processes() > 1:
        dist.all_reduce(values)
        values /= processes()
    return values


def agree(value: int, device: torch.device) -> int:
    """Return the first process's integer on every process."""
    if processes() == 1:
        return value
    box = torch.tensor([value], dtype=torch.int64, device=device)
    dist.broadcast(box, 0)
    return int(box.item())
