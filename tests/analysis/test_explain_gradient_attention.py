"""Gradient-weighted attention against differences of the similarity when single weights of attention change."""

import numpy as np
import pytest
import torch
from seen import pair, toy

from clipworks.analysis.explain_gradient_attention import gradient_attention

POOLS = [{}, {"class_token": False, "pool": "mean"}, {"class_token": False, "pool": "attention"}]


def similarity(encoder, pixels, words, layer, weights):
    """With other weights in one layer; later layers attend as they then will."""
    with torch.no_grad():
        x = encoder.visual.run(pixels, attention={layer: weights}).pooled
    return (torch.nn.functional.normalize(x, dim=1) * torch.nn.functional.normalize(words.double(), dim=1)).sum(1)


@pytest.mark.parametrize("vision", POOLS, ids=["class", "mean", "attention"])
def test_relevance_by_differences(vision):
    """One image of four patches, so that every weight of both layers can be moved by itself."""
    encoder, (pixels, words) = toy(image_size=8, **vision), pair(1, 8)
    pixels = pixels.double()
    asked = [0, 1, *(["pool"] if encoder.visual.pool is not None else [])]
    output = encoder.visual.run(pixels, output_attention=asked)
    maps = [output.attentions[layer].detach() for layer in (0, 1)]
    n = output.tokens.shape[1]
    flow = np.eye(n)
    for layer in (0, 1):
        gain = np.zeros((2, n, n))
        for h, i, j in np.ndindex(2, n, n):
            moved = []
            for step in (1e-5, -1e-5):
                changed = maps[layer].clone()
                changed[0, h, i, j] += step
                moved.append(float(similarity(encoder, pixels, words, layer, changed)))
            gain[h, i, j] = (moved[0] - moved[1]) / 2e-5 * maps[layer][0, h, i, j]
        flow = flow + np.maximum(gain, 0).mean(0) @ flow
    flow = flow - np.eye(n)
    if "pool" in asked:
        row = output.attentions["pool"][0].detach().numpy().mean(0)[0] @ flow
    else:
        row = flow[0, 1:] if encoder.visual.head else flow.mean(0)
    found = gradient_attention(encoder, pixels.float(), words)[0].flatten()
    assert found.max() > 0
    np.testing.assert_allclose(found, row, atol=2e-6 * max(1, row.max()))


def test_every_text_has_its_own_map_and_images_do_not_mix():
    encoder, (pixels, words) = toy(), pair(3)
    found = gradient_attention(encoder, pixels, words)
    other = gradient_attention(encoder, pixels, words.flip(0))
    assert (found[0] - other[0]).abs().max() > 1e-6
    for i in range(3):
        torch.testing.assert_close(gradient_attention(encoder, pixels[i : i + 1], words[i : i + 1])[0], found[i])


def test_no_gradient_stays_behind():
    encoder, (pixels, words) = toy(), pair()
    with torch.no_grad():  # the method needs gradients itself
        assert not gradient_attention(encoder, pixels, words).requires_grad
    assert all(p.grad is None for p in encoder.parameters())
