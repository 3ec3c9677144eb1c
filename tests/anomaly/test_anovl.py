"""AnoVL: the second path by matrices, maps and adaptation by hand, and the facts of the card."""

import numpy as np
import pytest
import torch
from parts import flawed, good, toy
from torch import nn

from clipworks.anomaly.anovl import AnoVL, adapted, turned
from clipworks.anomaly.states import bad_share
from clipworks.anomaly.value_path import value_patches
from clipworks.errors import ClipworksError

TEXT = np.eye(2, 8)


@pytest.mark.parametrize("blocks", [None, 2])
def test_the_second_path_by_matrices(blocks):
    encoder = toy(layers=3)
    x = good(2)
    with torch.no_grad():
        patches, image = value_patches(encoder, x, blocks)
        tower = encoder.visual
        tokens = tower.run(x, stop=0).tokens
        second = tokens
        for number, block in enumerate(tower.blocks):
            if blocks and number == 3 - blocks:
                second = tokens
            v = block.attention.v(block.norm1(tokens)).view(2, 37, 2, 8)
            mixed = torch.zeros_like(v)
            for b in range(2):
                for h in range(2):
                    weights = (v[b, :, h] @ v[b, :, h].T / 8**0.5).softmax(1)
                    mixed[b, :, h] = weights @ v[b, :, h]
            second = second + block.attention.out(mixed.reshape(2, 37, 16))
            tokens = block(tokens)[0]
        expected = nn.functional.normalize(tower.project(second[:, 1:]), dim=-1).view(2, 6, 6, 8)
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(image, encoder.images(x))


def test_equal_values_return_the_value():
    """Card, fact 1."""
    encoder = toy(layers=1)
    block = encoder.visual.blocks[0]
    with torch.no_grad():
        block.attention.v.weight.zero_()
        block.attention.v.bias.copy_(torch.arange(16.0))
        y = block.attention(block.norm1(torch.randn(1, 5, 16)), rule="vv")[0]
        torch.testing.assert_close(y[0, 2], block.attention.out(torch.arange(16.0)))


def test_training_free_map_by_hand():
    encoder, x = toy(), good(2)
    found = list(AnoVL(encoder, text=TEXT, steps=0).fit(None).score_maps(x))
    with torch.no_grad():
        z = value_patches(encoder, x)[0].numpy()
    p = np.exp(z[..., 1]) / (np.exp(z[..., 0]) + np.exp(z[..., 1]))
    padded = np.pad(p, ((0, 0), (1, 1), (1, 1)), mode="edge")
    mean = sum(padded[:, i : i + 6, j : j + 6] for i in range(3) for j in range(3)) / 9
    large = nn.functional.interpolate(torch.tensor(mean)[:, None], (24, 24), mode="bilinear")[:, 0]
    np.testing.assert_allclose([m.heat for m in found], large, atol=1e-6)
    v = encoder.images(x).numpy()
    expected = np.exp(v[:, 1]) / (np.exp(v[:, 0]) + np.exp(v[:, 1]))
    np.testing.assert_allclose([m.score for m in found], expected, atol=1e-6)


def test_no_mix_is_training_free_and_images_are_adapted_alone():
    """Card, fact 6."""
    images = flawed(3)[0]

    def maps(x, **settings):
        return np.stack([m.heat for m in AnoVL(toy(), text=TEXT, **settings).fit(None).score_maps(x)])

    np.testing.assert_array_equal(maps(images, mix=0.0), maps(images, steps=0))
    both = maps(images)
    assert np.abs(both - maps(images, steps=0)).max() > 1e-4
    np.testing.assert_allclose(maps(images.flip(0))[::-1], both, atol=1e-6)
    np.testing.assert_allclose(maps(images[1:2])[0], both[1], atol=1e-6)


def test_adaptation_is_the_published_rule():
    """The same steps with a torch layer and the loss written out."""
    patches = nn.functional.normalize(torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    text, words = torch.eye(2, 8), nn.functional.normalize(torch.randn(5, 8), dim=-1)
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(8, 5)
    with torch.no_grad():
        layer.weight.copy_((2 * torch.rand(5, 8, generator=draw) - 1) / 8**0.5)
        layer.bias.copy_((2 * torch.rand(5, generator=draw) - 1) / 8**0.5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)

    def logits(x):
        x = 0.7 * x + 0.3 * layer(x).tanh() @ words
        return x / x.norm(dim=-1, keepdim=True) @ text.T

    target = (patches @ text.T).softmax(-1)
    for _ in range(4):
        noise = 0.055**0.5 * torch.randn(patches.shape, generator=draw)
        clean, dirty = logits(patches).log_softmax(-1), logits(patches + noise).log_softmax(-1)
        loss = -(target * clean).sum(-1).mean() - 0.5 * dirty[..., 1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = adapted(patches, text, words, 4, 0.3, 0.05)
    expected = logits(patches).softmax(-1)[..., 1].detach()
    torch.testing.assert_close(bad_share(found, text), expected, atol=1e-5, rtol=1e-4)


def test_equal_and_swapped_texts():
    """Card, fact 7, of the training-free part."""
    images = flawed(2)[0]

    def maps(text):
        return np.stack([m.heat for m in AnoVL(toy(), text=text, steps=0).fit(None).score_maps(images)])

    np.testing.assert_allclose(maps(np.ones((2, 8))), 0.5, atol=1e-6)
    np.testing.assert_allclose(maps(TEXT) + maps(TEXT[::-1]), 1, atol=1e-6)


def test_views():
    x = good(2)
    made = turned(x, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    assert len(made) == 22
    assert all(v.shape == x.shape for v in made)
    flat = torch.full_like(x, 0.3)
    for view in turned(flat, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)):
        torch.testing.assert_close(view, flat)
    detector = AnoVL(toy(), text=TEXT, steps=0, views=True).fit(None)
    described = detector._described(x)
    config = detector._model.config.preprocess
    seen = torch.stack([detector._model.images(v) for v in turned(x, config.mean, config.std)])
    torch.testing.assert_close(described["image"], nn.functional.normalize(seen.mean(0), dim=1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 5}, "blocks must lie in"),
        ({"steps": -1}, "steps must lie in"),
        ({"mix": 2}, "mix must lie in"),
        ({"text": None, "domain": "industry"}, "Did you mean 'industrial'"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ClipworksError, match=message):
        AnoVL(toy(), **{"text": TEXT, **settings}).fit(good(2))
