"""Views: shapes, distributions, replay."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from clipworks.data.item import Item
from clipworks.errors import BadImage, ClipworksError
from clipworks.training.augment import AUGMENTS, Augment, resolve_augment, view

from .toy import tiny


def _noise(width=60, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["light", "standard", "strong"])
def test_a_view_is_replayed_from_its_seed(name):
    augment = AUGMENTS[name]
    one, two, other = (augment(_noise(), 32, np.random.default_rng(s)) for s in (5, 5, 6))
    assert one.size == (32, 32)
    assert one.mode == "RGB"
    assert one.tobytes() == two.tobytes() != other.tobytes()


def test_crops_keep_to_scale_and_ratio_and_lie_inside():
    augment = Augment(scale=(0.2, 0.6))
    shares, ratios = [], []
    for seed in range(400):
        left, top, right, bottom = augment.box(200, 150, np.random.default_rng(seed))
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 150
        shares.append((right - left) * (bottom - top) / 30000)
        ratios.append((right - left) / (bottom - top))
    assert 0.19 < min(shares) < 0.25
    assert 0.52 < max(shares) < 0.61
    assert min(ratios) > 0.74
    assert max(ratios) < 1.36
    assert abs(np.mean(np.log(ratios))) < 0.03


def test_crop_of_a_shape_that_cannot_be_falls_back_to_the_centre():
    assert Augment(scale=(0.9, 1.0)).box(100, 10, np.random.default_rng(0)) == (43, 0, 56, 10)


def test_the_box_does_not_depend_on_the_size_of_the_view():
    """A teacher and a student of other resolutions see the same region."""
    image = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3)))
    small, large = (
        np.asarray(AUGMENTS["standard"](image, s, np.random.default_rng(3))).mean((1, 2)).mean() for s in (16, 64)
    )
    assert small == pytest.approx(large, abs=1.0)


def test_frequencies_of_flip_and_grey_within_three_sigma():
    rising, dark = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1)), np.zeros((32, 32), np.uint8)
    ramp = Image.fromarray(np.stack([rising, rising, dark], -1))
    augment = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.5, grey=0.2)
    views = [np.asarray(augment(ramp, 32, np.random.default_rng(s))).astype(int) for s in range(600)]
    flipped = np.mean([v[0, 0, 0] > v[0, -1, 0] for v in views])
    grey = np.mean([np.ptp(v, axis=2).max() == 0 for v in views])
    assert abs(flipped - 0.5) < 3 * math.sqrt(0.25 / 600)
    assert abs(grey - 0.2) < 3 * math.sqrt(0.16 / 600)


def test_whole_crop_without_changes_is_the_image():
    image = _noise(32, 32)
    same = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))(image, 32, np.random.default_rng(0))
    assert same.tobytes() == image.tobytes()


def test_view_normalises_as_the_encoder_does():
    item, preprocess = Item("k", _noise(32, 32)), tiny().preprocess
    plain = view(item, preprocess, None, np.random.default_rng(0))
    whole = view(item, preprocess, Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0)), np.random.default_rng(0))
    assert plain.equal(whole)
    with pytest.raises(BadImage, match="broken"):
        view(Item("broken", b"no image"), preprocess, AUGMENTS["light"], np.random.default_rng(0))


def test_preprocessed_pixels_are_taken_as_they_are():
    pixels = tiny().preprocess(_noise(32, 32))
    assert view(Item("k", pixels), tiny().preprocess, AUGMENTS["strong"], np.random.default_rng(0)) is pixels


def test_names():
    assert resolve_augment("none") is None
    assert resolve_augment(AUGMENTS["strong"]) is AUGMENTS["strong"]
    with pytest.raises(ClipworksError, match="Did you mean 'strong'"):
        resolve_augment("srtong")
