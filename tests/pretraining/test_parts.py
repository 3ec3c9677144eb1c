"""What the recipes share: features before the projection, heads, settings, views."""

import dataclasses

import pytest
import torch

from clipworks.encoders.encoder import Encoder
from clipworks.errors import ClipworksError
from clipworks.pretraining.parts import head, need_vit, unprojected, unprojected_text
from clipworks.pretraining.slip import SlipRecipe
from clipworks.training.augment import Augment
from training.toy import tiny

from .small import items, step_of


def built(side: str, **changes) -> Encoder:
    """The tiny encoder with one tower changed."""
    config = tiny().config
    config = dataclasses.replace(config, **{side: dataclasses.replace(getattr(config, side), **changes)})
    return Encoder(config, tiny().tokenizer, seed=1)


@pytest.mark.parametrize("pool", ["eot", "last", "first", "mean"])
@pytest.mark.parametrize("hidden", [True, False])
def test_projecting_the_text_feature_gives_the_text_vector(pool, hidden):
    encoder = built("text", pool=pool, causal=pool == "eot", mask_padding=hidden and pool == "mean")
    tokens = encoder.tokenize(["a red cross", "a photo of the blue square", "green"])
    feature = unprojected_text(encoder.text, tokens, encoder.text.run(tokens))
    assert torch.allclose(encoder.text.projection(feature), encoder.text(tokens), atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"pool": "mean", "class_token": False}])
def test_projecting_the_image_feature_gives_the_image_vector(changes):
    encoder = built("vision", **changes)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[0, 3, 5]] * 3)
    for seams in ({}, {"keep": keep}):
        output = encoder.visual.run(pixels, **seams)
        assert torch.allclose(encoder.visual.projection(unprojected(encoder.visual, output)), output.pooled, atol=1e-5)


def test_heads():
    made = head(6, 5, 4, 3)
    assert [type(m).__name__ for m in made] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert made(torch.randn(7, 6)).shape == (7, 4)
    assert [m.bias is None for m in made if isinstance(m, torch.nn.Linear)] == [True, True, False]


def test_settings_hold_what_the_recipe_was_made_with():
    found = SlipRecipe(weight=0.5, seed=3, strong=Augment(flip=1.0)).settings
    assert found["weight"] == 0.5
    assert found["seed"] == 3
    assert "flip=1.0" in found["strong"]
    assert found["loss"] == "infonce"


def test_views_are_decoded_in_threads_or_not():
    from concurrent.futures import ThreadPoolExecutor

    recipe = SlipRecipe(hidden=8, out=4)
    encoder, batch = step_of(recipe)
    with ThreadPoolExecutor(2) as pool:
        recipe.bind(encoder, pool)
        from clipworks.training.feed import step_generator

        again = recipe.batch(items(8), 0, step_generator(0, 0))
    for name, value in batch.items():
        assert torch.equal(value, again[name]), name


def test_towers_without_patches_or_class_token():
    need_vit(tiny(), "this")
    with pytest.raises(ClipworksError, match="this needs an image tower with a class token"):
        need_vit(built("vision", pool="mean", class_token=False), "this", class_token=True)
    need_vit(built("vision", pool="mean", class_token=False), "this")
    holder = type("Holder", (), {"config": type("C", (), {"vision": type("V", (), {"kind": "resnet"})()})()})()
    with pytest.raises(ClipworksError, match="kind 'vit'"):
        need_vit(holder, "this")
