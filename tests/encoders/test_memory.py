"""The memory of the image tower against a plain recomputation, alone and with the seams that choose patches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from clipworks.encoders.config import VisionConfig
from clipworks.encoders.vit import VisionTransformer
from clipworks.errors import ClipworksError

CONFIG = VisionConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_width=32, memory=5)


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return VisionTransformer(CONFIG, 6).double().eval()


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def without(tower):
    """The same tower with its table forgotten."""
    other = VisionTransformer(dataclasses.replace(CONFIG, memory=0), 6).double().eval()
    other.load_state_dict({k: v for k, v in tower.state_dict().items() if not k.startswith("memory")})
    return other


def recalled(tower, tokens):
    """softmax(tokens . keys + bias) . values, in numpy."""
    keys, bias, values = (p.detach().numpy() for p in tower.memory.parameters())
    scores = tokens.mean(1) @ keys.T + bias
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ values.T


@torch.no_grad()
@pytest.mark.parametrize("choice", ["all", "keep", "mask"])
def test_it_is_added_to_the_vector(tower, pixels, choice):
    tokens = tower.stem(pixels).flatten(2).transpose(1, 2).numpy()
    keep = torch.tensor([[0, 5, 9], [1, 2, 3], [15, 0, 7]])
    seams, chosen = {}, tokens
    if choice == "keep":
        seams, chosen = {"keep": keep}, np.take_along_axis(tokens, keep.numpy()[..., None], 1)
    if choice == "mask":
        seen = torch.zeros(3, 16, dtype=torch.bool).scatter(1, keep, True)
        seams, chosen = {"mask": seen}, np.stack([t[s.numpy()] for t, s in zip(tokens, seen, strict=True)])
    plain = without(tower)(pixels, **seams)
    np.testing.assert_allclose(tower(pixels, **seams), plain.numpy() + recalled(tower, chosen), atol=1e-12)


@torch.no_grad()
def test_a_sure_key_gives_its_value(tower, pixels):
    tower.memory.keys.weight.zero_()
    tower.memory.keys.bias.copy_(torch.tensor([0.0, 0, 1000, 0, 0]))
    added = tower(pixels) - without(tower)(pixels)
    np.testing.assert_allclose(added, tower.memory.values.weight[:, 2].expand(3, -1), atol=1e-12)


@torch.no_grad()
def test_every_patch_may_recall_for_itself(tower, pixels):
    embedded = tower.stem(pixels).flatten(2).transpose(1, 2)
    patches = tower.run(pixels).patches
    dense = tower.project(patches, embedded)
    assert torch.equal(without(tower).project(patches, embedded), tower.project(patches))
    for i in range(16):  # one patch alone is its own mean
        expected = tower.project(patches[:, i]).numpy() + recalled(tower, embedded[:, i : i + 1].numpy())
        np.testing.assert_allclose(dense[:, i], expected, atol=1e-12)


def test_gradients_reach_it_and_through_it(tower, pixels):
    pixels.requires_grad_()
    tower(pixels).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in tower.memory.parameters())
    assert pixels.grad.abs().sum() > 0


def test_a_size_below_zero_is_refused():
    with pytest.raises(ClipworksError, match=r"vision.memory"):
        VisionConfig(memory=-1)
