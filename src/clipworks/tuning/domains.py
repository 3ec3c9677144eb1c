"""Domains inside an image tower: experts beside a feed-forward part, a norm that knows where an image comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..encoders.layers import MLP, Attention
from ..errors import ClipworksError


class ExpertAdapter(nn.Module):
    """A feed-forward part with small ones beside it, whose answers are weighed by attention among them and added.

    Their last layer begins at zero, and so does what they add.

    Parameters
    ----------
    plain : feed-forward part of a block, which stays as it is
    count : experts
    hidden : width inside each
    """

    def __init__(self, plain: MLP, count: int, hidden: int):
        super().__init__()
        width = plain.up.in_features
        self.plain = plain
        experts = [MLP(width, hidden, "gelu") for _ in range(count)]
        self.experts = nn.ModuleList(experts)
        self.router = nn.ModuleDict({"q": nn.Linear(count * width, hidden), "k": nn.Linear(width, hidden)})
        for expert in experts:
            nn.init.zeros_(expert.down.weight)
            nn.init.zeros_(expert.down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answers = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return self.plain(x) + (self.weights(answers)[..., None] * answers).sum(-2)

    def weights(self, answers: torch.Tensor) -> torch.Tensor:
        """Weights (..., count) of answers (..., count, width): the query is made of all, a key of each."""
        query, keys = self.router["q"](answers.flatten(-2)), self.router["k"](answers)
        return ((keys * query[..., None, :]).sum(-1) * keys.shape[-1] ** -0.5).softmax(-1)


class DomainTable(nn.Module):
    """An embedding per domain, and what it adds to gain and shift of a norm; nothing at the beginning."""

    def __init__(self, count: int, size: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(count, size).normal_(0, size**-0.5))
        self.gain, self.shift = nn.Linear(size, width, bias=False), nn.Linear(size, width, bias=False)
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.shift.weight)


class DomainNorm(nn.Module):
    """LayerNorm with gain and shift of the domain: (x - mu) / sigma * (g + W_g e) + b + W_b e.

    Parameters
    ----------
    plain : the norm, which stays as it is
    count : domains
    size : of their embeddings e
    """

    def __init__(self, plain: nn.LayerNorm, count: int, size: int):
        super().__init__()
        self.plain, self.domain = plain, DomainTable(count, size, plain.normalized_shape[0])
        self.current: torch.Tensor | None = None  # see `in_domains`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = self.domain.table.mean(0) if self.current is None else self.domain.table[self.current]
        gain, shift = self.domain.gain(e), self.domain.shift(e)
        if self.current is not None and x.ndim == 3:
            gain, shift = gain[:, None], shift[:, None]
        scaled = F.layer_norm(x, self.plain.normalized_shape, eps=self.plain.eps)
        return scaled * (self.plain.weight + gain) + self.plain.bias + shift


@contextmanager
def in_domains(encoder: Any, domains: torch.Tensor) -> Iterator[None]:
    """Inside the block image i of a batch is from domain i; outside images are from none: the mean of all."""
    norm = encoder.visual.norm_post
    norm.current = domains
    try:
        yield
    finally:
        norm.current = None


class PatchDecoder(nn.Module):
    """Pixels of every patch from the tokens of those that were seen: learned places attend to them.

    Parameters
    ----------
    width, heads : of the tokens
    patches, pixels : patches of an image, numbers in each
    """

    def __init__(self, width: int, heads: int, patches: int, pixels: int):
        super().__init__()
        self.places = nn.Parameter(torch.empty(patches, width).normal_(0, width**-0.5))
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp = MLP(width, 2 * width, "gelu")
        self.norm_out, self.out = nn.LayerNorm(width), nn.Linear(width, pixels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, n, width) to (B, patches, pixels)."""
        places = self.places.expand(len(tokens), -1, -1)
        x = places + self.attention(places, self.norm(tokens))[0]
        return self.out(self.norm_out(x + self.mlp(x)))


def patch_pixels(pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The pixels (B, 3, H, W) of every patch of a grid, (B, rows * columns, 3 * height * width)."""
    rows, columns = grid
    if pixels.shape[2] % rows or pixels.shape[3] % columns:
        raise ClipworksError(f"images must divide into {rows} x {columns} patches. Got {tuple(pixels.shape[2:])}.")
    cells = pixels.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # B, 3, rows, height, columns, width
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def hidden_error(found: torch.Tensor, truth: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Mean squared error (B, N, P) over the patches that were not seen; `seen` holds the numbers of the others, (B, n).

    >>> hidden_error(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), torch.tensor([[0]]))
    tensor(1.)
    """
    hidden = torch.ones(found.shape[:2], dtype=torch.bool, device=found.device).scatter(1, seen, False)
    return (found - truth)[hidden].square().mean()
