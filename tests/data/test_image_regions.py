"""Regions in a column: every form they come in, what a window makes of a box, and mistakes."""

import json

import numpy as np
import pytest
from PIL import Image

from clipworks.data.item import Item
from clipworks.data.regions import Region, from_pixels, regions_of, seen
from clipworks.data.sources import open_source
from clipworks.errors import ClipworksError
from clipworks.training.augment import Augment

TWO = [{"box": [0.1, 0.2, 0.5, 0.9], "text": "a cat"}, {"box": [0, 0, 1, 1], "text": "a room", "score": 0.4}]


def item(value):
    return Item("a.png", columns={"regions": value})


def test_a_list_its_json_and_regions_are_the_same():
    wanted = [Region((0.1, 0.2, 0.5, 0.9), "a cat"), Region((0.0, 0.0, 1.0, 1.0), "a room", 0.4)]
    for value in (TWO, json.dumps(TWO), wanted, np.array(TWO, dtype=object)):
        assert regions_of(item(value)) == wanted
    for nothing in (None, "", " ", []):
        assert regions_of(item(nothing)) == []
    assert regions_of(Item("a.png")) == []


def test_a_file_beside_the_image_and_a_table_carry_them(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps({"caption": "a cat in a room", "regions": TWO, "other": [1]}))
    (from_folder,) = open_source(tmp_path)
    (tmp_path / "t.csv").write_text('path,caption,regions\na.png,a cat,"' + json.dumps(TWO).replace('"', '""') + '"\n')
    (from_table,) = open_source(tmp_path / "t.csv")
    for found in (from_folder, from_table):
        assert [r.text for r in regions_of(found)] == ["a cat", "a room"]
    assert "other" not in from_folder.columns


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[{", "'a.png' must be JSON"),
        (3, "must be a list of"),
        ([{"box": [0, 0, 1], "text": "x"}], "a region of 'a.png' must be"),
        ([{"box": [0, 0, 1, 1]}], "a region of 'a.png' must be"),
        ([{"box": [10, 10, 50, 60], "text": "x"}], "shares of width and height, no pixels"),
        ([{"box": [0.5, 0, 0.5, 1], "text": "x"}], "left < right"),
        ([{"box": [0, 0, float("nan"), 1], "text": "x"}], "left < right"),
    ],
)
def test_mistakes_are_named(value, says):
    with pytest.raises(ClipworksError, match=says):
        regions_of(item(value))


def test_a_box_in_a_window():
    assert seen((2, 2, 4, 6), (0, 0, 8, 8)) == ((0.25, 0.25, 0.5, 0.75), 1.0)
    assert seen((2, 2, 4, 6), (0, 0, 8, 8), mirrored=True) == ((0.5, 0.25, 0.75, 0.75), 1.0)
    assert seen((2, 2, 4, 6), (3, 0, 8, 4))[1] == pytest.approx(0.25)
    assert seen((0, 0, 1, 1), (4, 4, 8, 8))[1] == 0.0
    assert from_pixels([(-5, 0, 50, 400)], 100, 200) == [(0.0, 0.0, 0.5, 1.0)]


def test_boxes_follow_crop_and_flip():
    """The marked pixels of a drawn shape lie within the box that `seen` gives for the view, and fill it."""
    rng = np.random.default_rng(0)
    kind = Augment(scale=(0.4, 1.0), flip=0.5)
    flips = 0
    for _ in range(40):
        width, height = (int(v) for v in rng.integers(60, 160, 2))
        left, top = int(rng.integers(0, width - 25)), int(rng.integers(0, height - 25))
        box = (left, top, left + int(rng.integers(10, 25)), top + int(rng.integers(10, 25)))
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[box[1] : box[3], box[0] : box[2]] = 255
        view, crop, mirrored = kind.placed(Image.fromarray(pixels), 128, rng, "bilinear")
        flips += mirrored
        found, share = seen(box, crop, mirrored)
        marked = np.argwhere(np.asarray(view)[..., 0] > 127)
        if share < 0.05:
            continue
        edges = np.array([marked[:, 1].min(), marked[:, 0].min(), marked[:, 1].max() + 1, marked[:, 0].max() + 1])
        assert np.abs(edges / 128 - np.array(found)).max() < 2.5 / 128
    assert 5 < flips < 35


def test_placing_draws_as_calling_does():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 70, 3)).astype(np.uint8))
    kind = Augment(scale=(0.3, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2, blur=0.5)
    for seed in range(5):
        one, two = (np.random.default_rng(seed) for _ in range(2))
        assert np.array_equal(np.asarray(kind(image, 32, one)), np.asarray(kind.placed(image, 32, two)[0]))
