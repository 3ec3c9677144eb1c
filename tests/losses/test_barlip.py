"""BarLIP: numpy, whitened rows as its zero, what it does not see, and what is refused."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.barlip import barlip

from .oracle import assert_gradient, unit

RNG = np.random.default_rng(0)
IMAGE, TEXT = (torch.tensor(RNG.normal(size=(9, 4)) * [1, 2, 3, 4] + 1) for _ in range(2))


def test_against_numpy():
    c = np.corrcoef(IMAGE.numpy(), TEXT.numpy(), rowvar=False)[:4, 4:]
    value = sum((1 - c[i, i]) ** 2 for i in range(4))
    value += 5e-3 * sum(c[i, j] ** 2 for i in range(4) for j in range(4) if i != j)
    assert barlip(IMAGE, TEXT).item() == pytest.approx(0.025 * value, rel=1e-4)  # the variance has 1e-5 added


def test_whitened_alike_rows_cost_nothing():
    rows = np.linalg.qr(RNG.normal(size=(12, 5)) - 0.3)[0]
    rows = np.linalg.qr(np.c_[np.ones(12), rows])[0][:, 1:] * np.sqrt(12)  # centred, of variance 1, uncorrelated
    assert barlip(torch.tensor(rows), torch.tensor(rows)).item() == pytest.approx(0.0, abs=1e-9)
    assert barlip(torch.tensor(rows), torch.tensor(-rows), weight=1.0).item() == pytest.approx(4 * 5, rel=1e-4)


def test_shift_and_size_of_a_column_do_not_matter():
    value = barlip(IMAGE, TEXT).item()
    assert barlip(3 * IMAGE + 7, TEXT).item() == pytest.approx(value, rel=1e-4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert barlip(IMAGE[order], TEXT[order]).item() == pytest.approx(value, abs=1e-14)


def test_gradient_against_differences():
    assert_gradient(barlip, IMAGE, TEXT)


def test_alike_rows_and_half_precision_stay_finite():
    flat = torch.ones(5, 3, requires_grad=True)
    value = barlip(flat, flat)
    value.backward()
    assert value.item() == pytest.approx(0.025 * 3)
    assert torch.isfinite(flat.grad).all()
    exact = barlip(IMAGE.bfloat16().double(), TEXT.bfloat16().double()).item()
    assert barlip(IMAGE.bfloat16(), TEXT.bfloat16()).item() == pytest.approx(exact, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert barlip(IMAGE.float(), TEXT.float()).item() == pytest.approx(barlip(IMAGE, TEXT).item(), rel=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="at least 2 rows"):
        barlip(unit(1, 4), unit(1, 4))
    with pytest.raises(ClipworksError, match="redundancy must lie in"):
        barlip(IMAGE, TEXT, redundancy=-1.0)
