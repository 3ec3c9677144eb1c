"""Gradients of a large contrastive batch on little memory, exactly.

Claim: memory for one small piece of the batch, gradient of the whole batch, for every parameter, at the price of a
second forward pass.

Formula: (1) F_j = f(x_j) for every piece j, without graph;  (2) L(F), giving dL/dF and the gradients of scalars such
as the scale, once;  (3) for every piece, encode again with graph and back-propagate sum(F_j * dL/dF_j).

Paper: Gao, Zhang, Han and Callan 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup
(GradCache).
Differs from the paper: nothing in the arithmetic. Random layers repeat their draws through `before(j)`, which seeds
the generators, instead of stored generator states. Plain accumulation of small-batch losses is not the same thing
(fewer negatives), and pasting one piece with graph among cached others gives the scale k times its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..errors import check_range
from ..registry import method


@method(card="contrastive-foundations", level="M")
def cached_backward(
    encode: Callable[[dict[str, Any]], dict[str, torch.Tensor]],
    losses: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    batch: dict[str, Any],
    *,
    micro_batch: int | None = None,
    before: Callable[[int], None] | None = None,
    unsynchronised: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, torch.Tensor]:
    """Add the gradient of the whole batch's loss to the parameters, encoding `micro_batch` rows at a time.

    Parameters
    ----------
    encode : from a batch to named features; tensors of shape (rows, ...), and scalars (a scale, a bias) of shape ()
    losses : from named features of the whole batch to named scalar losses, which are summed
    batch : named values; tensors have one row per sample in their first dimension and are cut there, anything else
        is passed on as it is
    micro_batch : rows encoded at a time; None encodes all at once, in a single pass
    before : called with the number of the piece before each forward pass, to seed dropout alike in both passes
    unsynchronised : context in which gradients are not yet averaged over processes; used for all pieces but the last

    Returns
    -------
    dict of detached scalar losses

    Raises
    ------
    ClipworksError
        If micro_batch is below 1.

    Inputs
    ------
    any encoders whose loss depends on the batch only through features; layers that mix samples of a piece (batch
    normalisation in training mode) see the piece, not the batch

    Relations
    ---------
    With micro_batch=None, or at least the batch, this is the ordinary backward pass.

    References
    ----------
    Gao, Zhang, Han and Callan 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup

    Examples
    --------
    >>> w, x = torch.ones((), requires_grad=True), torch.arange(4.0)
    >>> pair_loss = lambda f: {"loss": f["y"].sum() ** 2}
    >>> cached_backward(lambda b: {"y": w * b["x"]}, pair_loss, {"x": x}, micro_batch=1)["loss"].item()
    36.0
    >>> w.grad.item()
    72.0
    """
    rows = count_rows(batch)
    size = rows if micro_batch is None else min(rows, int(check_range("micro_batch", micro_batch, 1)))
    pieces = cut(batch, size)
    seed = before or (lambda piece: None)
    if len(pieces) == 1:
        seed(0)
        graph = encode(pieces[0])
        features = {name: value.detach() for name, value in graph.items()}
    else:
        parts = []
        with torch.no_grad():
            for number, piece in enumerate(pieces):
                seed(number)
                parts.append(encode(piece))
        features = {name: _whole([part[name] for part in parts]) for name in parts[0]}
    leaves = {name: value.requires_grad_(value.is_floating_point()) for name, value in features.items()}
    values = losses(leaves)
    total = torch.stack([value for value in values.values()]).sum()
    total.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    if len(pieces) == 1:
        _backward(graph, gradients)
    else:
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with nullcontext() if last else unsynchronised():
                seed(number)
                start = number * size
                here = {
                    name: gradient[start : start + size] if gradient.ndim else gradient
                    for name, gradient in gradients.items()
                    if gradient.ndim or last  # the scale's gradient is known once, and enters once
                }
                _backward(encode(piece), here)
    return {name: value.detach() for name, value in values.items()}


def count_rows(batch: dict[str, Any]) -> int:
    """Return the number of samples of a batch: the length of its first tensor that has rows."""
    return next((len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim), 0)


def cut(batch: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """Cut the tensors of a batch into pieces of `size` rows; other values go into every piece."""
    rows = count_rows(batch)
    if size >= rows:
        return [batch]
    return [
        {
            name: value[start : start + size] if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in batch.items()
        }
        for start in range(0, rows, size)
    ]


def _whole(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts[0].ndim else parts[0].clone()


def _backward(outputs: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
    """Back-propagate given gradients of the outputs; outputs without graph (frozen towers) are left out."""
    names = [name for name in gradients if outputs[name].requires_grad]
    if names:
        torch.autograd.backward([outputs[n] for n in names], [gradients[n] for n in names])
