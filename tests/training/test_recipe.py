"""Recipes by name: what the text may say, what of the run they take over, what is refused."""

from __future__ import annotations

import pytest

from clipworks.errors import ClipworksError
from clipworks.pretraining.dreamlip import DreamlipRecipe
from clipworks.pretraining.flip import FlipRecipe
from clipworks.training.augment import AUGMENTS, Augment
from clipworks.training.recipe import ContrastiveRecipe, plain_losses, resolve_recipe

CROP = Augment(scale=(0.3, 1.0))


def test_without_a_name_it_is_plain_and_an_object_stays_itself():
    plain = resolve_recipe(None, "sigmoid", CROP)
    assert type(plain) is ContrastiveRecipe
    assert (plain.loss_name, plain.augment) == ("sigmoid", CROP)
    assert resolve_recipe(plain, "infonce", None) is plain


def test_a_name_takes_over_loss_and_views_of_the_run():
    flip = resolve_recipe("flip", "sigmoid", CROP)
    assert isinstance(flip, FlipRecipe)
    assert flip.augment == CROP
    own = resolve_recipe("flip(drop=0.75, augment='strong')", augment=CROP)
    assert own.settings != flip.settings
    assert own.augment == AUGMENTS["strong"]
    assert "0.75" in repr(own.settings)


def test_arguments_are_python_literals():
    found = resolve_recipe("dreamlip(columns=['title', 'about'], sentences_per_image=2, grouping=0.5)")
    assert isinstance(found, DreamlipRecipe)
    assert (found.columns, found.texts_per_image, found.grouping) == (("title", "about"), 3, 0.5)


def test_a_loss_by_name_needs_no_more_than_a_plain_step_has():
    assert {"infonce", "sigmoid", "sigmoid_ring", "cloob", "soft_label"} <= set(plain_losses())
    assert not {"barlip", "simclr", "clip_refine", "m2_mix", "relation_distillation"} & set(plain_losses())
    with pytest.raises(ClipworksError, match=r"loss must be one of .*'infonce'.* Got 'simclr'"):
        resolve_recipe(None, "simclr")
    with pytest.raises(ClipworksError, match="Did you mean 'infonce'"):
        resolve_recipe(None, "infonec")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("flp", "recipe must be one of .* Did you mean 'flip'"),
        ("flip(dorp=0.5)", "flip has no argument 'dorp'. It takes drop.* Did you mean 'drop'"),
        ("flip(0.5)", "recipe must look like"),
        ("flip(drop=__import__('os'))", "recipe must look like"),
        ("flip(", "recipe must look like"),
        ("flip(drop=2)", "drop must lie in"),
        ("metaclip", "recipe must train. 'metaclip' prepares the data"),
        ("slip(strong='strng')", "augment must be one of .* Did you mean 'strong'"),
    ],
)
def test_mistakes_are_named(text, says):
    with pytest.raises(ClipworksError, match=says):
        resolve_recipe(text)
