"""Both ways of computing attention and activations give the same numbers."""

import pytest
import torch
import torch.nn.functional as F

from clipworks.encoders import layers


@pytest.mark.parametrize("keys", [1, 7, 128, 129])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_and_without_gradients(keys, causal, masked):
    draw = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(2, 3, keys, 8, generator=draw, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 1, keys, generator=draw) > 0.3 if masked and not causal else None
    if mask is not None:
        mask[..., 0] = True
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / 8**0.5
    if mask is not None:
        logits = logits + torch.where(mask, 0.0, -torch.inf)
    if causal:
        logits = logits + torch.full((keys, keys), -torch.inf, dtype=torch.float64).triu(1)
    want = logits.softmax(-1) @ v
    torch.testing.assert_close(layers.dot_product(q, k, v, mask, causal), want)
    with torch.no_grad():
        torch.testing.assert_close(layers.dot_product(q, k, v, mask, causal), want)


def test_the_short_way_is_taken_without_gradients_only(monkeypatch):
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    short, long = torch.randn(1, 1, 128, 4), torch.randn(1, 1, 129, 4)
    with torch.no_grad():
        layers.dot_product(short, short, short)
        assert not calls
        layers.dot_product(long, long, long)
    layers.dot_product(short, short, short)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["quick_gelu", "gelu", "gelu_tanh", "relu"])
def test_activations(name):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    kept = x.clone()
    want = {
        "quick_gelu": x / (1 + torch.exp(-1.702 * x)),
        "gelu": x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "gelu_tanh": 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "relu": x.clamp(min=0),
    }[name]
    act = layers.activation(name)
    torch.testing.assert_close(act(x), want)
    with torch.no_grad():
        torch.testing.assert_close(act(x), want)
    assert torch.equal(x, kept)
    torch.autograd.gradcheck(act, (x[::7].clone().requires_grad_(),))
