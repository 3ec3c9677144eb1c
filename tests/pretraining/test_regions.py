"""Batches of regions: which are taken, how they follow the view, what fills up, and what cutting shows."""

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.data.item import Item
from clipworks.errors import ClipworksError
from clipworks.pretraining.regions import RegionRecipe, View, encode_kept, kept_rows, placed, text_number
from clipworks.training.augment import Augment
from clipworks.training.feed import step_generator
from training.toy import tiny

from .scenes import scenes


def bound(**options):
    recipe = RegionRecipe(**options)
    recipe.bind(tiny(), None)
    return recipe


def test_a_batch_and_what_fills_up():
    items = scenes(6, least=1)
    recipe = bound(regions=3)
    batch = recipe.batch(items, 0, step_generator(0, 0))
    assert batch["boxes"].shape == (6, 3, 4)
    assert batch["words"].shape[:2] == batch["labels"].shape == (6, 3)
    for item, boxes, labels in zip(items, batch["boxes"], batch["labels"], strict=True):
        there = item.columns["regions"]
        assert (labels >= 0).sum() == min(3, len(there))
        known = {text_number(r["text"]): r["box"] for r in there}
        assert all(int(label) in known for label in labels if label >= 0)
        for box, label in zip(boxes, labels, strict=True):
            if label >= 0:
                assert any(np.allclose(box, r["box"]) for r in there if text_number(r["text"]) == int(label))
            else:
                assert box.tolist() == [0, 0, 1, 1]
    again = recipe.batch(items, 0, step_generator(0, 0))
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_items_without_regions_count_for_their_caption():
    items = [Item("a", np.zeros((20, 20, 3), np.uint8), caption="a photo")]
    batch = bound().batch(items, 0, step_generator(0, 0))
    assert (batch["labels"] == -1).all()


def test_the_surest_are_taken():
    (item,) = scenes(1, least=4)
    batch = bound(regions=2, surest=True).batch([item], 0, step_generator(0, 0))
    best = sorted(item.columns["regions"], key=lambda r: -r["score"])[:2]
    assert [int(v) for v in batch["labels"][0]] == [text_number(r["text"]) for r in best]


def test_regions_outside_the_view_or_too_small_are_left_out():
    left, small = {"box": [0.0, 0.0, 0.2, 0.2], "text": "red"}, {"box": [0.5, 0.5, 0.52, 0.52], "text": "blue"}
    wide = Item("a", np.zeros((20, 60, 3), np.uint8), caption="x", columns={"regions": [left, small]})
    labels = bound().batch([wide], 0, step_generator(0, 0))["labels"]  # the centred square does not reach the left
    assert sorted((labels >= 0).sum(1).tolist()) == [1]
    assert (bound(smallest=0.01).batch([wide], 0, step_generator(0, 0))["labels"] < 0).all()


def test_views_without_augmentation_are_the_encoders_own():
    coarse = np.random.default_rng(0).integers(0, 255, (5, 9, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((90, 50), Image.Resampling.BICUBIC))
    encoder = tiny()
    view = placed(Item("a", pixels), encoder.preprocess, None, 32, np.random.default_rng(0))
    assert view.crop == (20, 0, 70, 50)
    own = encoder.preprocess(pixels)
    seen = encoder.preprocess.normalize(np.asarray(view.image))  # differs by rounding 57.6 pixels to 58 before the cut
    assert torch.corrcoef(torch.stack([seen.flatten(), own.flatten()]))[0, 1] > 0.97


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_cutting_shows_what_the_view_shows(flip):
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    kind = Augment(scale=(0.3, 0.8), flip=flip)
    view = placed(Item("a", pixels), tiny().preprocess, kind, 128, np.random.default_rng(3))
    assert view.mirrored == bool(flip)
    part = np.asarray(view.cut((0.25, 0.5, 0.75, 1.0), 64, "bicubic")).astype(float)
    assert np.abs(part - np.asarray(view.image)[64:, 32:96]).mean() < 6
    whole = np.asarray(view.cut((0, 0, 1, 1), 128, "bicubic"))
    assert np.array_equal(whole, np.asarray(view.image))


def test_a_box_and_its_pixels_agree_after_a_flip():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[8:24, 4:20] = 255
    source = Image.fromarray(pixels)
    view = View(source, (0, 0, 64, 64), True, source)
    box, left = view.box((4 / 64, 8 / 64, 20 / 64, 24 / 64))
    assert left == 1
    assert np.asarray(view.cut(box, 16, "bilinear")).min() == 255


def test_kept_entries_alone_are_encoded():
    values, kept = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[True, False, True], [False, False, True]])
    seen = []
    rows = encode_kept(lambda v: seen.append(len(v)) or v * 2, values, kept, 2)
    assert seen == [3]
    assert torch.equal(rows, torch.where(kept[..., None], 2 * values, 0))
    assert encode_kept(lambda v: 1 / 0, values, torch.zeros(2, 3, dtype=torch.bool), 2).sum() == 0
    found = kept_rows({"labels": torch.tensor([[1, -1], [-1, 0]]), "a": torch.arange(4).reshape(2, 2)}, "a")
    assert found["a"].tolist() == [0, 3]
    assert found["labels"].tolist() == [1, 0]


def test_faults():
    for wrong in ({"regions": 0}, {"least": 2.0}, {"smallest": -1.0}):
        with pytest.raises(ClipworksError, match=next(iter(wrong))):
            RegionRecipe(**wrong)
