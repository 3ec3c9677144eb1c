"""Splicing, the guide's affinity against loops, SAM's last block against transformers' own output."""

import numpy as np
import plain_dense as plain
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.segment.common import enter
from clipworks.segment.guide import SamGuide, guided_affinity
from clipworks.segment.proxyclip import ProxyCLIP
from clipworks.segment.segmenter import segment
from clipworks.segment.trident import Trident


def drawn(heads=2, n=6, channels=3, seed=0):
    draw = np.random.default_rng(seed)
    attention = draw.random((heads, n, n))
    return attention / attention.sum(-1, keepdims=True), draw.normal(size=(heads, n, channels))


def plain_affinity(attention, values, factor, negative=None):
    heads, n, _ = values.shape
    unit = values / np.linalg.norm(values, axis=-1, keepdims=True)
    near = np.stack([u @ u.T for u in unit])
    made = np.zeros((n, n))
    for i in range(n):
        threshold = factor * near[:, i].mean()
        if negative is not None and threshold < 0:
            threshold = negative
        for h in range(heads):
            for j in range(n):
                if near[h, i, j] > min(threshold, 0.9):
                    made[i, j] += attention[h, i, j] / heads
    return made / made.sum(1, keepdims=True)


@pytest.mark.parametrize(("factor", "negative"), [(1.2, None), (0.0, None), (3.0, 0.6), (100.0, None)])
def test_the_affinity_against_loops(factor, negative):
    attention, values = drawn()
    got = guided_affinity(torch.tensor(attention), torch.tensor(values), factor, negative)
    np.testing.assert_allclose(got, plain_affinity(attention, values, factor, negative), atol=1e-6)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)
    assert (got.diagonal() > 0).all()


def test_factor_zero_keeps_what_is_alike_at_all():
    attention, values = drawn(heads=1)
    unit = values[0] / np.linalg.norm(values[0], axis=-1, keepdims=True)
    got = guided_affinity(torch.tensor(attention), torch.tensor(values), 0.0)
    assert np.array_equal(got.numpy() > 0, unit @ unit.T > 0)


@torch.no_grad()
def test_with_a_guide_that_keeps_every_cell_it_is_proxyclip():
    encoder, words, image = plain.toy(), torch.eye(8)[:3], plain.images(1)[0]
    found = enter(encoder, image[None])
    eye = torch.eye(24)[None]
    trident = Trident(guide=lambda image: (eye, eye, (4, 6)))
    spliced = trident.local(found, words)[0].float()
    got = trident.whole(spliced, image, encoder, words)
    np.testing.assert_allclose(got, ProxyCLIP().local(found, words)[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("memory", [0, 3])
def test_the_guide_averages_before_the_last_norm(memory):
    encoder, words, image = plain.toy(memory=memory), torch.eye(8)[:3], plain.images(1)[0]
    found = enter(encoder, image[None])
    attention, values = drawn(heads=2, n=24, seed=2)
    trident = Trident(guide=lambda image: (torch.tensor(attention), torch.tensor(values), (4, 6)))
    got = trident.whole(trident.local(found, words)[0], image, encoder, words)
    tokens, recalled = trident.averaged(found)
    affinity = plain_affinity(attention, values, 1.2)
    mixed = affinity @ tokens[0].flatten(0, 1).numpy()
    features = plain.linear(plain.norm(mixed, encoder.visual.norm_post), encoder.visual.projection)
    if memory:
        features = features + affinity @ recalled[0].flatten(0, 1).numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(got.flatten(1), features[:, :3].T, atol=1e-5)


def test_from_end_to_end_with_its_own_guide():
    encoder = plain.toy().float()
    image = np.random.default_rng(0).integers(0, 255, (40, 70, 3)).astype(np.uint8)
    mask = segment(image, ["red", "green"], method=Trident(), encoder=encoder, side=32, window=16)
    assert mask.labels.shape == (40, 70)
    assert np.isfinite(mask.scores).all()


@pytest.mark.slow
@torch.no_grad()
def test_sam_gives_the_attention_that_makes_its_own_output(tmp_path):
    transformers = pytest.importorskip("transformers")
    vision = dict(hidden_size=12, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                  patch_size=4, window_size=3, global_attn_indexes=[1], mlp_dim=16)  # fmt: skip
    model = transformers.SamModel(transformers.SamConfig(vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    guide = SamGuide(str(tmp_path))
    image = plain.images(1, 32, 32)[0].float()
    weights, values, grid = guide(image)
    assert grid == (8, 8)
    tower = model.vision_encoder
    mean, std = (torch.tensor(v)[:, None, None] for v in (guide.mean, guide.std))
    x = tower.patch_embed((image[None] - mean) / std) + tower.pos_embed
    x = tower.layers[1].layer_norm1(tower.layers[0](x))
    mixed = (weights @ values).transpose(0, 1).reshape(1, 8, 8, 12)
    expected = tower.layers[1].attn(x)[0]
    np.testing.assert_allclose(tower.layers[1].attn.proj(mixed), expected, atol=1e-5)
    weights, values, grid = guide(plain.images(1, 16, 32)[0].float())
    assert (grid, weights.shape, values.shape) == ((4, 8), (2, 32, 32), (2, 32, 6))


def test_messages():
    with pytest.raises(ClipworksError, match="guide must be 'own'"):
        Trident(guide="sam")
    with pytest.raises(ClipworksError, match="guide must give"):
        guided_affinity(torch.zeros(2, 4, 4), torch.zeros(2, 5, 3))
