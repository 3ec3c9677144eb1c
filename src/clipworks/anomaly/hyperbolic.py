"""The Poincaré ball of curvature -c: addition, maps from and to the tangent space, distance, logistic logits.

Ganea et al. 2018, Hyperbolic Neural Networks. Points have length below 1 / sqrt(c).
"""

from __future__ import annotations

import torch

EDGE = 1e-3  # points stay this share of the radius away from the rim
TINY = 1e-15


def into_ball(x: torch.Tensor, c: float) -> torch.Tensor:
    """Points brought to at most (1 - EDGE) / sqrt(c) from the origin."""
    most = (1 - EDGE) / c**0.5
    length = _length(x)
    return torch.where(length > most, x / length * most, x)


def add(x: torch.Tensor, y: torch.Tensor, c: float) -> torch.Tensor:
    """Möbius addition of points (..., dim).

    >>> add(torch.tensor([0.3, 0.0]), torch.tensor([-0.3, 0.0]), 1.0)
    tensor([0., 0.])
    """
    xy, xx, yy = ((a * b).sum(-1, keepdim=True) for a, b in ((x, y), (x, x), (y, y)))
    return ((1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y) / (1 + 2 * c * xy + c**2 * xx * yy).clamp(min=TINY)


def exp_map(v: torch.Tensor, c: float, base: torch.Tensor | None = None) -> torch.Tensor:
    """From tangent vectors (..., dim) at a base point (the origin) to points inside the ball."""
    length = _length(v)
    half = 1.0 if base is None else 1 / (1 - c * (base * base).sum(-1, keepdim=True)).clamp(min=TINY)
    point = torch.tanh(c**0.5 * length * half) * v / (c**0.5 * length)
    return into_ball(point if base is None else add(base, point, c), c)


def log_map(x: torch.Tensor, c: float) -> torch.Tensor:
    """From points to tangent vectors at the origin; undoes `exp_map`."""
    length = _length(x)
    return torch.atanh((c**0.5 * length).clamp(max=1 - 1e-7)) * x / (c**0.5 * length)


def distance(x: torch.Tensor, y: torch.Tensor, c: float) -> torch.Tensor:
    """Geodesic distance (...) of points (..., dim); 2 |x - y| for c to 0."""
    return 2 / c**0.5 * torch.atanh((c**0.5 * _length(add(-x, y, c))[..., 0]).clamp(max=1 - 1e-5))


def plane_logits(x: torch.Tensor, points: torch.Tensor, normals: torch.Tensor, c: float) -> torch.Tensor:
    """Signed, scaled distances (n, K) of points (n, dim) from hyperplanes through `points` with `normals` (K, dim)."""
    moved = add(-points, x[:, None], c)
    size, scale = _length(normals)[:, 0], 2 / (1 - c * (points * points).sum(-1))
    inner = (moved * normals).sum(-1)
    rest = (1 - c * (moved * moved).sum(-1)).clamp(min=TINY)
    return scale * size / c**0.5 * torch.asinh(2 * c**0.5 * inner / (size * rest))


def _length(x: torch.Tensor) -> torch.Tensor:
    return x.norm(dim=-1, keepdim=True).clamp(min=TINY)
