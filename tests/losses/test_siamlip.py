"""SiamLIP: numpy, its bounds, and targets without gradient."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.siamlip import siamlip

from .oracle import assert_safe, unit

ROWS = [unit(6, 5, seed=s) * (s + 1) for s in range(4)]


def test_against_numpy():
    a, b, h, k = (x.numpy() for x in ROWS)

    def far(x, y):
        return np.mean([2 - 2 * (p @ q) / np.linalg.norm(p) / np.linalg.norm(q) for p, q in zip(x, y, strict=True)])

    assert siamlip(*ROWS).item() == pytest.approx((far(a, k) + far(b, h)) / 2, abs=1e-12)


def test_it_lies_between_0_and_4():
    a, b = ROWS[:2]
    assert siamlip(a, b, b, 3 * a).item() == pytest.approx(0.0, abs=1e-12)
    assert siamlip(a, b, -b, -a).item() == pytest.approx(4.0, abs=1e-12)
    assert 0 < siamlip(*ROWS).item() < 4


def test_guesses_learn_and_targets_do_not():
    leaves = [x.clone().requires_grad_() for x in ROWS]
    slopes = torch.autograd.grad(siamlip(*leaves), leaves, allow_unused=True)
    assert slopes[2] is None
    assert slopes[3] is None
    # along unit rows: -2 (target - cos guess) / |guess|, of one direction of two, one row of six
    guess, target = (x / x.norm(dim=1, keepdim=True) for x in (ROWS[0], ROWS[3]))
    along = target - (guess * target).sum(1, keepdim=True) * guess
    assert torch.allclose(slopes[0], -2 * along / ROWS[0].norm(dim=1, keepdim=True) / 12, atol=1e-12)


def test_safe_numbers():
    assert_safe(lambda scale, a, b, h, k: scale * siamlip(a, b, h, k), *ROWS)


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="text_target must have the shape of image_guess"):
        siamlip(*ROWS[:3], ROWS[3][:5])
