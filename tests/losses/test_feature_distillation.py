"""Feature distillation: the formula, the cosine identity, what it is blind to and what it is not."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.feature_distillation import feature_distillation

from .oracle import assert_gradient, assert_safe, unit


def test_against_numpy():
    u, v = np.random.default_rng(0).normal(size=(2, 7, 4))
    expected = sum((u[i, k] - v[i, k]) ** 2 for i in range(7) for k in range(4)) / 28
    assert feature_distillation(torch.tensor(u), torch.tensor(v)).item() == pytest.approx(expected, abs=1e-13)


def test_of_unit_rows_it_is_the_cosine():
    u, v = unit(9, 16), unit(9, 16, seed=1)
    cosine = (u * v).sum(1).mean().item()
    assert feature_distillation(u, v).item() == pytest.approx(2 * (1 - cosine) / 16, abs=1e-13)


def test_gradient_reaches_the_student_alone():
    u, v = unit(4, 3, grad=True), unit(4, 3, seed=1, grad=True)
    assert_gradient(lambda x: feature_distillation(x, v), u)
    feature_distillation(u, v).backward()
    assert v.grad is None
    assert torch.allclose(u.grad, 2 * (u - v).detach() / 12)
    assert feature_distillation(u, u.detach()).item() == 0.0


def test_a_common_rotation_changes_nothing_and_one_of_one_side_does():
    u, v = unit(6, 5), unit(6, 5, seed=1)
    turn = torch.linalg.qr(unit(5, 5, seed=2))[0]
    value = feature_distillation(u, v).item()
    assert feature_distillation(u @ turn, v @ turn).item() == pytest.approx(value, abs=1e-14)
    assert feature_distillation(u @ turn, v).item() != pytest.approx(value, rel=0.01)


def test_halves_average_to_the_whole():
    u, v = unit(8, 5), unit(8, 5, seed=1)
    halves = (feature_distillation(u[:4], v[:4]) + feature_distillation(u[4:], v[4:])) / 2
    assert halves.item() == pytest.approx(feature_distillation(u, v).item(), abs=1e-14)


def test_safe_numbers():
    assert_safe(lambda scale, u, v: feature_distillation(u, v), unit(1, 4), unit(1, 4, seed=1))


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="teacher must have the shape of student"):
        feature_distillation(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ClipworksError, match="not empty"):
        feature_distillation(torch.ones(0, 3), torch.ones(0, 3))
