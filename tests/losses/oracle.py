"""What the tests of the losses share: unit rows, the textbook formulas in numpy, gradients against differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch


def unit(*shape: int, seed: int = 0, grad: bool = False) -> torch.Tensor:
    """Random unit rows in float64."""
    rows = np.random.default_rng(seed).normal(size=shape)
    return torch.tensor(rows / np.linalg.norm(rows, axis=-1, keepdims=True), requires_grad=grad)


def pair(n: int = 6, dim: int = 5, seed: int = 0, near: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows of images and of texts that lie somewhat near them."""
    image = unit(n, dim, seed=seed)
    text = near * image + unit(n, dim, seed=seed + 1)
    return image, text / text.norm(dim=1, keepdim=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(x))


def softplus(x: Any) -> np.ndarray:
    return np.logaddexp(0.0, x)


def cross(logits: np.ndarray, target: np.ndarray | None = None) -> float:
    """Mean over rows of the cross-entropy with `target`, by default the identity."""
    target = np.eye(len(logits)) if target is None else target
    return float(-(target * log_softmax(logits)).sum(1).mean())


def clip(image: Any, text: Any, scale: float) -> float:
    """The loss of CLIP."""
    logits = scale * np.asarray(image) @ np.asarray(text).T
    return (cross(logits) + cross(logits.T)) / 2


def total(value: Any) -> torch.Tensor:
    """The sum of a loss that may have named parts."""
    return torch.stack(list(value.values())).sum() if isinstance(value, dict) else value


def assert_gradient(loss: Callable[..., Any], *inputs: torch.Tensor) -> None:
    """Autograd against central differences in float64, for every input; raises where they differ."""
    leaves = [x.detach().clone().double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: total(loss(*x)), leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


def assert_safe(loss: Callable[..., Any], *inputs: torch.Tensor, scales: tuple[float, ...] = (0.0, 1.0, 100.0, 1e4)):
    """`loss(scale, *rows)` is finite, with its gradients, at any scale, and computed in float32 from bfloat16."""
    for scale in scales:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
            value = total(loss(scale, *leaves))
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.isfinite(value)
            if value.requires_grad:
                found = torch.autograd.grad(value, leaves, allow_unused=True)
                assert all(torch.isfinite(g).all() for g in found if g is not None)
    rough = [x.detach().bfloat16() for x in inputs]
    exact = total(loss(10.0, *(x.double() for x in rough))).item()
    assert total(loss(10.0, *rough)).item() == pytest.approx(exact, rel=1e-5, abs=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        under = total(loss(10.0, *(x.float() for x in rough))).item()
    assert under == pytest.approx(exact, rel=1e-5, abs=1e-5), "autocast must not reach the similarities"
