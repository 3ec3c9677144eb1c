"""FLIP: how many patches stay, which, with which positions, and what the loss is then."""

import numpy as np
import pytest
import torch

from clipworks.encoders.config import EncoderConfig, VisionConfig
from clipworks.errors import ClipworksError
from clipworks.pretraining.flip import FlipRecipe, patch_count, random_patches
from clipworks.training.augment import Augment
from clipworks.training.recipe import ContrastiveRecipe
from training.toy import tiny

from .small import same, step_of, trained


def draws(count, seed=0):
    return np.random.default_rng(seed).spawn(count)


@pytest.mark.parametrize(("drop", "kept"), [(0.5, 98), (0.75, 49), (0.9, 19), (0.0, 196)])
def test_196_patches(drop, kept):
    keep = random_patches(draws(5), 196, drop)
    assert keep.shape == (5, kept)
    assert all(len(set(row.tolist())) == kept for row in keep)
    assert keep.min() >= 0
    assert keep.max() < 196
    assert torch.equal(keep, keep.sort(1).values)


def test_rounding_does_not_lose_a_patch():
    assert random_patches(draws(1), 10, 0.9).shape == (1, 1)  # 10 * (1 - 0.9) is 0.9999999999999998


def test_every_patch_is_as_likely_and_samples_differ():
    keep = random_patches(draws(4000), 16, 0.5)
    often = np.bincount(keep.flatten().numpy(), minlength=16) / 4000
    assert np.abs(often - 0.5).max() < 3.5 * np.sqrt(0.25 / 4000)
    assert len({tuple(row.tolist()) for row in keep[:100]}) > 90


def test_kept_patches_carry_their_own_positions():
    """The features are those of a numpy pass over the chosen rows of the sum of patches and positions."""
    encoder = tiny()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[1, 4, 7], [0, 2, 15]])
    visual = encoder.visual
    x = visual.stem(pixels).flatten(2).transpose(1, 2) + visual.positions[1:]
    rows = torch.stack([x[i, keep[i]] for i in range(2)])
    rows = torch.cat([(visual.class_token + visual.positions[0]).expand(2, 1, -1), rows], 1)
    rows = visual.norm_pre(rows)
    for block in visual.blocks:
        rows = block(rows)[0]
    expected = visual.projection(visual.norm_post(rows[:, 0]))
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert torch.allclose(encoder.encode_image(pixels, keep=keep), expected, atol=1e-5)


def test_no_dropping_is_the_plain_step_bit_for_bit(tmp_path):
    crop = Augment(scale=(0.5, 1.0))
    plain = trained(tmp_path / "a", ContrastiveRecipe("infonce", crop))
    flip = trained(tmp_path / "b", FlipRecipe(0.0, augment=crop))
    assert same(plain.encoder, flip.encoder)
    assert plain.losses == flip.losses


def test_the_step_encodes_only_the_kept_patches(tmp_path):
    recipe = FlipRecipe(0.5)
    encoder, batch = step_of(recipe)
    assert batch["keep"].shape == (8, 8)
    features = recipe.features(encoder, batch)
    expected = encoder.encode_image(batch["pixels"], keep=batch["keep"])
    assert torch.equal(features["image"], expected)
    assert not torch.allclose(features["image"], encoder.encode_image(batch["pixels"]), atol=1e-3)
    # evaluation and use see all patches: the encoder itself is unchanged
    report = trained(tmp_path, recipe)
    assert report.encoder.encode_image(batch["pixels"]).shape == (8, 32)
    assert sum(p.numel() for p in report.encoder.parameters()) == sum(p.numel() for p in tiny().parameters())


def test_pieces_give_the_gradient_of_the_whole(tmp_path):
    whole = trained(tmp_path / "a", FlipRecipe(0.5))
    pieces = trained(tmp_path / "b", FlipRecipe(0.5), micro_batch=3)
    pairs = zip(whole.encoder.parameters(), pieces.encoder.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) < 1e-4


def test_a_step_draws_the_same_again_and_another_step_others():
    recipe = FlipRecipe(0.5)
    one, again = step_of(recipe)[1], step_of(recipe)[1]
    assert torch.equal(one["keep"], again["keep"])
    assert not torch.equal(one["keep"], step_of(recipe, step=1)[1]["keep"])


def test_faults():
    with pytest.raises(ClipworksError, match=r"drop must lie in"):
        FlipRecipe(-0.1)
    with pytest.raises(ClipworksError, match=r"leaves none of the 16 patches"):
        random_patches(draws(1), 16, 0.99)
    resnet = EncoderConfig(vision=VisionConfig(kind="resnet", layers=(1, 1, 1, 1), width=8, heads=4))
    holder = type("Holder", (), {"config": resnet})()
    with pytest.raises(ClipworksError, match="kind 'vit'"):
        patch_count(holder)
    assert patch_count(tiny()) == 16
