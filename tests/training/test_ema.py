"""The moving average against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipworks.errors import ClipworksError
from clipworks.training.ema import EMA


def _module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()


def test_closed_form():
    module, decay = _module(), 0.9
    start = module[0].weight.detach().clone()
    average, seen = EMA(module, decay), []
    for _ in range(5):
        with torch.no_grad():
            module[0].weight += torch.randn(2, 3, dtype=torch.float64)
        seen.append(module[0].weight.detach().clone())
        average.update(module)
    n = len(seen)
    expected = decay**n * start + (1 - decay) * sum(decay ** (n - 1 - k) * s for k, s in enumerate(seen))
    assert torch.allclose(average.state["0.weight"], expected, rtol=0, atol=1e-14)


def test_constant_student_approaches_by_powers():
    module = _module()
    average = EMA(module, 0.8)
    with torch.no_grad():
        module[0].weight += 1
    for _ in range(7):
        average.update(module)
    assert torch.allclose(module[0].weight - average.state["0.weight"], torch.full((2, 3), 0.8**7).double())


@pytest.mark.parametrize(("decay", "moves"), [(1.0, False), (0.0, True)])
def test_ends_are_exact_and_integers_copied(decay, moves):
    module = _module()
    before = module[0].weight.detach().clone()
    average = EMA(module, decay)
    module(torch.randn(4, 3, dtype=torch.float64))
    with torch.no_grad():
        module[0].weight.mul_(1.7)
    average.update(module)
    assert torch.equal(average.state["0.weight"], module[0].weight if moves else before)
    assert average.state["1.num_batches_tracked"].item() == 1


def test_frozen_parameters_stay_bit_equal():
    module = _module().float()
    module[0].requires_grad_(False)
    average = EMA(module, 0.97)
    for _ in range(50):
        average.update(module)
    assert torch.equal(average.state["0.weight"], module[0].weight)


def test_applied_swaps_and_restores():
    module = _module()
    average = EMA(module, 0.5)
    with torch.no_grad():
        module[0].weight += 2
    fast, slow = module[0].weight.detach().clone(), average.state["0.weight"].clone()
    with average.applied(module):
        assert torch.equal(module[0].weight, slow)
    assert torch.equal(module[0].weight, fast)


def test_half_precision_is_averaged_in_float32_and_decay_is_checked():
    assert EMA(_module().half(), 0.9999).state["0.weight"].dtype == torch.float32
    with pytest.raises(ClipworksError, match="decay must lie in"):
        EMA(_module(), 1.5)
