"""Geodesic mixup as an estimator: its reduction to contrastive fine-tuning, and that the weight falls by epochs."""

from __future__ import annotations

import torch

from clipworks.pretraining import m2_mix as recipe_module
from clipworks.tuning import m2_mix as own_module
from clipworks.tuning.flyp import FLYP
from clipworks.tuning.m2_mix import M2Mix

from .toys import changed, clip_shaped, coloured, quick

CAPTIONS = ["a grey cat", "two dogs at play", "an oak"] * 4


def test_with_weight_zero_it_is_contrastive_fine_tuning():
    x, _ = coloured()
    settings = {"encoder": clip_shaped(), "lr": 1e-2, "epochs": 2, "batch_size": 6}
    plain = quick(FLYP, **settings).fit(x, CAPTIONS)
    assert not changed(plain.encoder_, quick(M2Mix, weight=0.0, **settings).fit(x, CAPTIONS).encoder_)
    mixed = quick(M2Mix, weight=1.0, **settings).fit(x, CAPTIONS)
    assert changed(plain.encoder_, mixed.encoder_)
    assert set(mixed.losses_) == {"loss", "infonce", "m2"}


def test_what_the_recipe_gets(monkeypatch):
    """c / (1 + epoch), with an epoch of 12 // 5 steps; the m3 weights and both Beta parameters."""
    seen = {}

    class Spy(recipe_module.M2MixRecipe):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen["recipe"] = self

    monkeypatch.setattr(own_module, "M2MixRecipe", Spy)
    x, _ = coloured()
    settings = {"encoder": clip_shaped(), "batch_size": 5, "images": 0.05, "texts": 0.06, "both": 0.1, "beta": 0.2}
    method = quick(M2Mix, **settings).fit(x, CAPTIONS)
    assert [seen["recipe"].fading(step) for step in range(5)] == [1, 1, 1 / 2, 1 / 2, 1 / 3]
    assert seen["recipe"].weights == {"weight": 0.05, "images": 0.05, "texts": 0.06, "both": 0.1}
    assert (seen["recipe"].beta, seen["recipe"].partner_beta) == (0.2, 0.2)
    assert set(method.losses_) == {"loss", "infonce", "m2", "images", "texts", "both"}
    quick(M2Mix, fading=False, **settings).fit(x, CAPTIONS)
    assert seen["recipe"].fading(99) == 1


def test_labels_speak_through_templates_drawn_once():
    x, y = coloured()
    settings = {"encoder": clip_shaped(), "lr": 1e-2, "templates": ["a {}", "the {} here"]}
    one, two = (quick(M2Mix, **settings).fit(x, y) for _ in range(2))
    assert not changed(one.encoder_, two.encoder_)
    shots = one._open(x, y)
    words = [item.caption for item in shots.captioned(settings["templates"], seed=0)]
    assert {w for w in words if "cat" in w} == {"a cat", "the cat here"}
    assert torch.equal(one.classifier_, one._words(one.encoder_))
