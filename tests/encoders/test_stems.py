"""Stems are found by name, and the tower honours the grid that a stem returns."""

import pytest
import tiny_towers as tiny
import torch
from torch import nn

from clipworks.encoders import stems
from clipworks.encoders.config import VisionConfig
from clipworks.encoders.layers import resize_positions
from clipworks.encoders.vit import VisionTransformer
from clipworks.errors import ClipworksError


def test_patches_are_linear_maps_of_pixels():
    stem = stems.build_stem(VisionConfig(**{**tiny.VISION, "patch_bias": True})).double()
    x = tiny.pixels(1)
    patch = x[0, :, 8:16, 24:32].flatten()
    want = stem.projection.weight.flatten(1) @ patch + stem.projection.bias
    torch.testing.assert_close(stem(x)[0, :, 1, 3], want)


def test_unknown_stems_are_refused_with_the_known_ones():
    with pytest.raises(
        ClipworksError, match=r"vision.stem must be one of .*'patch'.*Got 'patches'.*Did you mean 'patch'"
    ):
        stems.build_stem(VisionConfig(stem="patches"))
    for name in ("build-stem", "check-choice", "PatchStem"):  # no stems, though names of the module
        with pytest.raises(ClipworksError, match=r"vision.stem must be one of"):
            stems.build_stem(VisionConfig(stem=name))


def test_a_new_stem_is_a_function_and_its_grid_is_honoured(monkeypatch):
    def half_resolution(config):
        return nn.Conv2d(3, config.width, 16, stride=16)

    half_resolution.__module__ = stems.__name__
    monkeypatch.setattr(stems, "half_resolution", half_resolution, raising=False)
    tower = VisionTransformer(VisionConfig(**{**tiny.VISION, "stem": "half-resolution"}), 16).double().eval()
    x = tiny.pixels()
    output = tower.run(x)
    assert output.grid == (2, 2)
    assert output.tokens.shape == (2, 5, 24)
    table = resize_positions(tower.positions, (4, 4), (2, 2))
    torch.testing.assert_close(tower.run(x, positions=table).pooled, output.pooled)
