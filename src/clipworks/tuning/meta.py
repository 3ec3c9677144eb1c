"""What learning over several domains needs: an inner step that can be differentiated, distances of distributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..encoders.layers import wide

RIDGE = 1e-5  # added to covariances, whose roots have no derivative at 0


def inner_step(
    loss: torch.Tensor, parameters: Mapping[str, torch.Tensor], rate: float, second_order: bool = True
) -> dict[str, torch.Tensor]:
    """Return parameters after one step of gradient descent, as functions of those before.

    Parameters
    ----------
    loss : of the step
    parameters : by name; those that the loss does not reach stay
    rate : of the step
    second_order : whether the gradient itself is differentiated; False takes it for a constant
    """
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=second_order, retain_graph=True,
                                allow_unused=True)  # fmt: skip
    return {name: value if slope is None else value - rate * slope
            for (name, value), slope in zip(parameters.items(), found, strict=True)}  # fmt: skip


class _Held(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(self.module, *arguments)


def with_parameters(
    module: nn.Module, parameters: Mapping[str, torch.Tensor], work: Callable[..., Any], *arguments: Any
) -> Any:
    """Return `work(module, *arguments)` as if the module had these parameters; it keeps its own."""
    named = {f"module.{name}": value for name, value in parameters.items()}
    return torch.func.functional_call(_Held(module), named, (work, *arguments))


def gaussian_distance(one: torch.Tensor, two: torch.Tensor, *, diagonal: bool = True) -> torch.Tensor:
    """Return the squared 2-Wasserstein distance of Gaussians with the means and covariances of two sets of rows.

    |m - n|^2 + Tr( C + D - 2 (C D)^(1/2) ).  Tr (C D)^(1/2) is the sum of the roots of the eigenvalues of L^T D L with
    C = L L^T, which is symmetric and has a stable derivative.

    Parameters
    ----------
    one, two : rows (n, dim) and (m, dim), two or more each
    diagonal : variances alone, which needs no more rows than dimensions

    >>> gaussian_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [7.0]]))  # the means are 5 apart
    tensor(25.)
    """
    one, two = wide(one), wide(two)
    means = (one.mean(0) - two.mean(0)).square().sum()
    if diagonal:
        spread = [(rows.var(0, unbiased=False) + RIDGE).sqrt() for rows in (one, two)]
        return means + (spread[0] - spread[1]).square().sum()
    return means + bures(*(covariance(rows) for rows in (one, two)))


def covariance(rows: torch.Tensor) -> torch.Tensor:
    """Covariance of rows (n, dim) with a small ridge, (dim, dim)."""
    centred = rows - rows.mean(0)
    return centred.T @ centred / len(rows) + RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)


def bures(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Tr( C + D - 2 (C D)^(1/2) ) of positive definite matrices (dim, dim)."""
    lower = torch.linalg.cholesky(one)
    roots = torch.linalg.eigvalsh(lower.T @ two @ lower).clamp(min=0).sqrt()
    return one.trace() + two.trace() - 2 * roots.sum()
