"""Interpolation of weights: ends, the linear case, Fisher weights, faults."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from clipworks.errors import ClipworksError
from clipworks.training.wise_ft import interpolate


def _states(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    start = {n: v.clone() for n, v in module.state_dict().items()}
    tuned = {n: v + torch.randn_like(v) if v.is_floating_point() else v + 7 for n, v in start.items()}
    return start, tuned


def test_ends_are_bit_equal_and_middle_is_the_mean():
    start, tuned = _states()
    for alpha, end in ((0.0, start), (1.0, tuned)):
        assert all(torch.equal(v, end[n]) for n, v in interpolate(start, tuned, alpha).items())
    for name, value in interpolate(start, tuned, 0.3).items():
        if value.is_floating_point():
            oracle = 0.7 * start[name].double().numpy() + 0.3 * tuned[name].double().numpy()
            assert np.allclose(value.numpy(), oracle, rtol=0, atol=1e-6), name
    assert interpolate(start, tuned, 0.3)["1.num_batches_tracked"] == 0
    assert interpolate(start, tuned, 0.7)["1.num_batches_tracked"] == 7


def test_one_linear_layer_apart_the_outputs_mix_too():
    start, tuned = _states()
    tuned = {n: tuned[n] if n.startswith("0.") else start[n] for n in start}
    x = torch.randn(5, 3)

    def out(state):
        return x @ state["0.weight"].T + state["0.bias"]

    assert torch.allclose(out(interpolate(start, tuned, 0.4)), 0.6 * out(start) + 0.4 * out(tuned), atol=1e-6)


def test_fisher_weights():
    start, tuned = _states()
    even = {n: torch.full_like(v, 3.0) for n, v in start.items() if v.is_floating_point()}
    plain = interpolate(start, tuned, 0.5)
    weighted = interpolate(start, tuned, 0.5, fisher=(even, even))
    assert all(torch.allclose(weighted[n].float(), plain[n].float(), atol=1e-6) for n in plain)
    f0, f1 = torch.rand(4, 3), torch.rand(4, 3)
    got = interpolate(start, tuned, 0.3, fisher=({"0.weight": f0}, {"0.weight": f1}))["0.weight"]
    up = 0.7 * f0 * start["0.weight"] + 0.3 * f1 * tuned["0.weight"]
    assert torch.allclose(got, up / (0.7 * f0 + 0.3 * f1), atol=1e-6)
    zero = {"0.weight": torch.zeros(4, 3)}
    assert torch.isfinite(interpolate(start, tuned, 0.3, fisher=(zero, zero))["0.weight"]).all()


def test_half_precision_is_mixed_in_float32():
    start, tuned = {"w": torch.tensor([1.0]).half()}, {"w": torch.tensor([1.0 + 2**-10]).half()}
    assert interpolate(start, tuned, 0.5)["w"].dtype == torch.float16


def test_faults():
    start, tuned = _states()
    with pytest.raises(ClipworksError, match=r"alpha must lie in \[0, 1\]"):
        interpolate(start, tuned, 1.1)
    with pytest.raises(ClipworksError, match=r"'0\.bias' is in one of"):
        interpolate(start, {n: v for n, v in tuned.items() if n != "0.bias"})
    with pytest.raises(ClipworksError, match=r"'0.weight' has \(4, 3\) in number 1 and \(2, 3\)"):
        interpolate(start, tuned | {"0.weight": torch.zeros(2, 3)})
