"""Interactive distillation: the formula, its reduction to InfoNCE, the frozen teacher."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.infonce import infonce
from clipworks.losses.interactive_distillation import interactive_distillation

from .oracle import assert_gradient, assert_safe, cross, pair

U, W = pair(6, 5)
V, Y = pair(6, 5, seed=7)


def test_against_numpy():
    u, w, v, y = (np.asarray(x) for x in (U, W, V, Y))
    expected = (cross(9.0 * u @ y.T) + cross(9.0 * w @ v.T)) / 2
    assert interactive_distillation(U, W, V, Y, 9.0).item() == pytest.approx(expected, abs=1e-12)


def test_gradient_against_differences():
    assert_gradient(lambda u, w, s: interactive_distillation(u, w, V, Y, s), U, W, torch.tensor(4.0))


def test_of_the_teacher_itself_it_is_infonce():
    assert interactive_distillation(V, Y, V, Y, 9.0).item() == pytest.approx(infonce(V, Y, 9.0).item(), abs=1e-14)


def test_order_of_pairs_does_not_matter():
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    got = interactive_distillation(U[order], W[order], V[order], Y[order], 9.0)
    assert got.item() == pytest.approx(interactive_distillation(U, W, V, Y, 9.0).item(), abs=1e-13)


def test_no_gradient_reaches_the_teacher():
    u, v, y = (x.clone().requires_grad_() for x in (U, V, Y))
    interactive_distillation(u, W, v, y, 9.0).backward()
    assert v.grad is None
    assert y.grad is None
    assert u.grad.abs().sum() > 0


def test_safe_numbers():
    assert_safe(lambda scale, u, w, v, y: interactive_distillation(u, w, v, y, scale), U, W, V, Y)
    assert interactive_distillation(U[:1], W[:1], V[:1], Y[:1], 100.0).item() == 0.0


def test_widths_must_agree():
    with pytest.raises(ClipworksError, match="teacher_image must have the shape of image"):
        interactive_distillation(U, W, V[:, :3], Y[:, :3], 1.0)
