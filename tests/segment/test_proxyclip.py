"""Attention by given features: against numpy, its zeros, its limits, and the providers of features."""

import numpy as np
import plain_dense as plain
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.segment.affinity import VisionModel, features_of
from clipworks.segment.common import enter, interpolation
from clipworks.segment.maskclip import MaskCLIP
from clipworks.segment.proxyclip import ProxyCLIP, proxy_attention


def weights(features, shift=1.2, gain=3.0):
    """By loops over rows, for one image (N, C)."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    near = unit @ unit.T
    made = np.zeros_like(near)
    for i, row in enumerate(gain * (near - shift * near.mean())):
        kept = row >= 0
        made[i, kept] = np.exp(row[kept]) / np.exp(row[kept]).sum() if kept.any() else 0
        made[i] = made[i] if kept.any() else 1 / len(row)
    return made


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape)


def test_the_weights_against_loops():
    features = draw(2, 3, 4, 5) + 0.3
    got = proxy_attention(torch.tensor(features), 1.2, 3.0)
    for one, expected in zip(got, features.reshape(2, 12, 5), strict=True):
        np.testing.assert_allclose(one, weights(expected), atol=1e-6)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)


def test_a_factor_and_the_rest_of_the_batch_change_nothing():
    features = torch.tensor(draw(2, 3, 4, 5) + 0.3)
    got = proxy_attention(features, 1.2, 3.0)
    np.testing.assert_allclose(proxy_attention(7.5 * features, 1.2, 3.0), got, atol=1e-6)
    assert torch.equal(proxy_attention(features[:1], 1.2, 3.0), got[:1])


def test_entries_at_or_below_the_shifted_mean_are_zero():
    features = draw(1, 4, 4, 6)
    unit = features.reshape(16, 6) / np.linalg.norm(features.reshape(16, 6), axis=1, keepdims=True)
    near = unit @ unit.T
    got = proxy_attention(torch.tensor(features), 1.2, 3.0)[0].numpy()
    low = near < 1.2 * near.mean() - 1e-6
    assert low.any()
    assert (got[low] == 0).all()


def test_one_feature_everywhere_gives_uniform_weights_not_nan():
    got = proxy_attention(torch.ones(1, 2, 3, 4), 1.2, 3.0)
    np.testing.assert_allclose(got, 1 / 6, atol=1e-7)


@torch.no_grad()
def test_regions_of_one_feature_give_the_mean_value_of_the_region():
    found = plain.hidden()
    regions = np.arange(24).reshape(4, 6) % 6 // 3  # the left and the right half
    maps = torch.eye(2, dtype=torch.float64)[torch.tensor(regions)].permute(2, 0, 1).expand(2, -1, -1, -1)
    got = ProxyCLIP(lambda images: maps).features(found)
    same = np.zeros((25, 25))
    same[1:, 1:] = (regions.reshape(-1, 1) == regions.reshape(1, -1)) / 12
    expected = plain.projected(found, plain.attended(found, same[None, None]))
    np.testing.assert_allclose(got, expected, atol=1e-6)


@torch.no_grad()
def test_the_gain_follows_whose_features_they_are():
    found = plain.hidden()
    assert torch.equal(ProxyCLIP().features(found), ProxyCLIP(gain=10.0).features(found))
    maps = features_of("own", found).permute(0, 3, 1, 2)
    given = ProxyCLIP(lambda images: maps)
    assert torch.equal(given.features(found), ProxyCLIP(gain=3.0).features(found))


@torch.no_grad()
def test_with_residual_sum_each_patch_alone_is_maskclip():
    found = plain.hidden()
    apart = torch.eye(24).reshape(24, 4, 6).expand(2, -1, -1, -1)
    got = ProxyCLIP(lambda images: apart, residual=True).features(found)
    np.testing.assert_allclose(got, MaskCLIP().features(found), atol=1e-6)


@torch.no_grad()
def test_a_finer_grid_against_resized_values():
    found, maps = plain.hidden(), draw(2, 3, 8, 12) + 0.3
    got = ProxyCLIP(lambda images: torch.tensor(maps)).features(found)
    v = plain.projections(found)[2][:, :, 1:]  # (B, heads, 24, channels)
    v = torch.tensor(v.transpose(0, 1, 3, 2).reshape(2, -1, 4, 6))
    v = torch.nn.functional.interpolate(v, (8, 12), mode="bilinear").numpy().reshape(2, 2, -1, 96).swapaxes(2, 3)
    for i in range(2):
        mixed = weights(maps[i].reshape(3, 96).T) @ v[i]
        tokens = plain.linear(np.concatenate(list(mixed), axis=1), found.block.attention.out)
        expected = plain.linear(plain.norm(tokens, found.visual.norm_post), found.visual.projection)
        np.testing.assert_allclose(got[i].flatten(0, 1), expected, atol=1e-5)


@torch.no_grad()
def test_what_a_memory_recalls_is_averaged_alike():
    encoder = plain.toy(memory=3)
    found, maps = plain.hidden(encoder), torch.tensor(draw(2, 3, 4, 6) + 0.3)
    on = ProxyCLIP(lambda images: maps).features(found)
    memory = encoder.visual.memory(found.embedded).numpy()
    found.embedded = None
    off = ProxyCLIP(lambda images: maps).features(found)
    for i in range(2):
        expected = weights(maps[i].numpy().reshape(3, 24).T) @ memory[i]
        np.testing.assert_allclose((on - off)[i].flatten(0, 1), expected, atol=1e-5)


@torch.no_grad()
def test_the_own_stem_is_finer_than_the_tokens():
    encoder = plain.toy(stem="efficientnet-lite0", patch_size=32, image_size=64)
    found = enter(encoder, plain.images(1, 64, 96), sides=ProxyCLIP.sides)
    assert features_of("own", found).shape[1:3] == (4, 6)
    assert ProxyCLIP().features(found).shape[1:3] == (4, 6)
    bare = plain.hidden()
    assert torch.equal(features_of("own", bare).flatten(1, 2), bare.inputs[-1][:, 1:])


def test_a_grid_that_does_not_fit_is_resized_to_one_that_does():
    found = plain.hidden()
    ramp = torch.arange(10.0).expand(2, 1, 7, 10)
    got = features_of(lambda images: ramp, found)
    assert got.shape == (2, 8, 12, 1)
    expected = interpolation(12, 10) @ torch.arange(10.0)
    np.testing.assert_allclose(got[0, 3, :, 0], expected, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_a_vision_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    image_size=16, patch_size=4)  # fmt: skip
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    made = VisionModel(str(tmp_path))
    images = plain.images(2, 16, 24).float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (made.mean, made.std))
    expected = model((images - mean) / std, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    np.testing.assert_allclose(made(images).flatten(2).transpose(1, 2), expected, atol=1e-5)
    assert made(plain.images(1, 18, 25).float()).shape == (1, 12, 4, 6)
    assert ProxyCLIP(f"hf:{tmp_path}").features(plain.hidden()).shape == (2, 4, 6, 8)


@pytest.mark.parametrize(
    ("affinity", "message"),
    [("dino", "affinity must be 'own'"), (lambda images: images[0], "affinity must give features"),
     (lambda images: None, "affinity must give")],
)  # fmt: skip
def test_messages(affinity, message):
    with pytest.raises(ClipworksError, match=message):
        ProxyCLIP(affinity).features(plain.hidden())
