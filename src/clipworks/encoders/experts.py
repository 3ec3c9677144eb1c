"""A mixture of feed-forward parts with a router, in the place of one: a module swap in the blocks of either tower."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .layers import MLP, swap, wide

if TYPE_CHECKING:
    from .encoder import Encoder

Route = tuple[torch.Tensor, torch.Tensor]  # probabilities (tokens, experts), choices (tokens, k)


class Experts(nn.Module):
    """Several feed-forward parts; every token goes through those that its router weighs most.

    Parameters
    ----------
    mlp : feed-forward part of a block; it becomes the first expert, the others are copies
    count, top_k : experts, and how many of them a token goes through
    dropout : inside the experts, in training

    Examples
    --------
    >>> plain, x = MLP(4, 8, "gelu"), torch.randn(2, 3, 4)
    >>> torch.allclose(Experts(plain, 4, 2)(x), plain(x), atol=1e-6)  # identical experts
    True
    """

    def __init__(self, mlp: MLP, count: int, top_k: int, dropout: float = 0.0):
        super().__init__()
        weight = mlp.up.weight
        self.top_k, self.dropout = top_k, dropout
        self.experts = nn.ModuleList([mlp, *(copy.deepcopy(mlp) for _ in range(count - 1))])
        self.router = nn.Linear(weight.shape[1], count, bias=False, device=weight.device, dtype=weight.dtype)
        self.routes: list[Route] | None = None  # see `recorded`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        probability = wide(self.router(tokens)).softmax(-1)
        weight, chosen = probability.topk(self.top_k, dim=-1)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
        if self.routes is not None:
            self.routes.append((probability, chosen))
        found = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                found = found.index_add(0, rows, weight[rows, place, None] * self._run(expert, tokens[rows]))
        return found.reshape(x.shape)

    def _run(self, expert: Any, x: torch.Tensor) -> torch.Tensor:
        return expert.down(F.dropout(expert.act(expert.up(x)), self.dropout, self.training))


@contextmanager
def recorded(tower: nn.Module) -> Iterator[list[Route]]:
    """Collect what the routers of a tower decide inside the block."""
    routes: list[Route] = []
    own = [part for _, part in parts(tower)]
    for part in own:
        part.routes = routes
    try:
        yield routes
    finally:
        for part in own:
            part.routes = None  # what is kept would tie a copy of the module to this step's graph


def balance(routes: Sequence[Route]) -> torch.Tensor:
    """Return E * sum over choices and experts of share * mean probability, over all tokens of all layers.

    >>> even = torch.full((6, 4), 0.25)
    >>> balance([(even, even.topk(2).indices)])  # k for routers that know nothing
    tensor(2.)
    """
    probability, chosen = (torch.cat(side) for side in zip(*routes, strict=True))
    count = probability.shape[1]
    share = F.one_hot(chosen, count).to(probability.dtype).mean(0)
    return count * (share * probability.mean(0)).sum()


def parts(module: nn.Module) -> list[tuple[str, Experts]]:
    """Return the mixtures of a module by path."""
    return [(path, part) for path, part in module.named_modules() if isinstance(part, Experts)]


def one_expert(encoder: Encoder, number: int) -> Encoder:
    """Return the dense encoder that has one of the experts in every block."""
    made = copy.deepcopy(encoder)
    for path, part in parts(made):
        swap(made, path, part.experts[number])
    return made


def parameter_counts(encoder: Encoder) -> dict[str, int]:
    """Return how many parameters an encoder has ("total"), and how many of them a token can use ("active")."""
    total = sum(p.numel() for p in encoder.parameters())
    idle = sum(
        (len(part.experts) - part.top_k) * sum(p.numel() for p in part.experts[0].parameters())
        for _, part in parts(encoder)
    )
    return {"total": total, "active": total - idle}
