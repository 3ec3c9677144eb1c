"""Sigmoid loss across processes without gathering: texts travel around a ring, one block of pairs at a time.

Claim: the memory of n x n pairs and one block of texts per process, whatever the number of processes; the value and the
gradient of the whole batch.

Formula: L_r = (1/n) (own block of process r, with right pairs + sum over the other processes q of block (r, q), with
wrong pairs alone); the mean of L_r over processes is the sigmoid loss of the whole batch.

Paper: Zhai, Mustafa, Kolesnikov and Beyer 2023, Sigmoid Loss for Language Image Pre-Training (ICCV), its efficient
"chunked" form.
Differs from the paper: nothing in the arithmetic; blocks travel one way.
Defaults: those of `sigmoid`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..registry import method
from .common import Scale, check_rows
from .sigmoid import judge


@method(card="contrastive-foundations", level="M")
def sigmoid_ring(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: Scale,
    bias: Scale = -10.0,
    *,
    group: Any = None,
) -> torch.Tensor:
    """Return this process's share of the sigmoid loss; every process must call, with as many rows.

    Parameters
    ----------
    image, text : this process's unit rows, shape (n, dim)
    scale, bias : factor on the similarities and what is added (begin at 10 and -10: paper)
    group : processes that share the batch; default all, or this one alone where none are started

    Returns
    -------
    scalar tensor, float32 or better; its mean over processes is the loss of the whole batch, and gradients averaged
    over processes are those of the whole batch

    Raises
    ------
    ClipworksError
        If shapes differ or the batch is empty.

    Inputs
    ------
    normalised features of image-text pairs

    Relations
    ---------
    With one process it is `sigmoid`; with several, `sigmoid` on gathered rows has the same value and gradient.

    References
    ----------
    Zhai, Mustafa, Kolesnikov and Beyer 2023, Sigmoid Loss for Language Image Pre-Training

    Examples
    --------
    >>> round(sigmoid_ring(torch.eye(4), torch.eye(4), 20.0).item(), 5)
    0.00018
    """
    check_rows(image=image, text=text)
    total = judge(image, text, scale, bias, own=0)
    started = dist.is_available() and dist.is_initialized()
    for _ in range(dist.get_world_size(group) - 1 if started else 0):
        text = _PassOn.apply(text, group)
        total = total + judge(image, text, scale, bias)
    return total / len(image)


class _PassOn(torch.autograd.Function):
    """Rows go to the next process; their gradient comes back the other way."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _exchange(rows, 1, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _exchange(gradient, -1, ctx.group), None


def _exchange(rows: torch.Tensor, step: int, group: Any) -> torch.Tensor:
    """Send rows `step` places on and return those that come from as far behind."""
    size, place = dist.get_world_size(group), dist.get_rank(group)
    world: Any = group if group is not None else dist.group.WORLD
    there, behind = (dist.get_global_rank(world, (place + k) % size) for k in (step, -step))
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    moves = [
        dist.P2POp(dist.isend, rows.contiguous(), there, group),
        dist.P2POp(dist.irecv, received, behind, group),
    ]
    for move in dist.batch_isend_irecv(moves):
        move.wait()
    return received
