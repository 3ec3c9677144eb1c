"""`Mask` and its forms: shares, pictures, arrays, COCO's run-length code."""

import json

import numpy as np
import pytest
from PIL import Image

from clipworks.errors import ClipworksError
from clipworks.segment.mask import Mask, palette
from clipworks.segment.rle import decode, encode


@pytest.fixture
def mask():
    labels = np.zeros((6, 8), np.int32)
    labels[1:4, 2:5], labels[5, 7] = 2, 1
    scores = np.random.default_rng(0).random((3, 2, 3)).astype(np.float32)
    return Mask(labels, ["background", "cat", "dog"], scores, "a.jpg")


def test_shares_and_rows(mask):
    assert mask.shares == pytest.approx({"background": 38 / 48, "dog": 9 / 48, "cat": 1 / 48})
    assert [row["name"] for row in mask.as_rows()] == ["background", "dog", "cat"]
    assert mask.as_rows(1)[0]["largest"] == pytest.approx(mask.scores[0].max(), abs=1e-6)
    assert mask.of("dog").sum() == 9
    with pytest.raises(ClipworksError, match="Did you mean 'dog'"):
        mask.of("dogg")


def test_png_holds_indices(mask, tmp_path):
    page = Image.open(mask.save(tmp_path / "m.png"))
    assert page.mode == "P"
    assert np.array_equal(np.array(page), mask.labels)
    assert page.getpalette()[:3] == [0, 0, 0]


def test_npz_holds_everything(mask, tmp_path):
    again = Mask.load(mask.save(tmp_path / "m.npz"))
    assert (again.names, again.key) == (mask.names, mask.key)
    assert np.array_equal(again.labels, mask.labels)
    np.testing.assert_allclose(again.scores, mask.scores, atol=1e-3)


def test_json_holds_coco_without_background(mask, tmp_path):
    entries = json.loads(mask.save(tmp_path / "m.json").read_text())
    assert [(e["name"], e["area"], e["bbox"]) for e in entries] == [("cat", 1, [7, 5, 1, 1]), ("dog", 9, [2, 1, 3, 3])]
    for entry in entries:
        assert np.array_equal(decode(entry["segmentation"]), mask.of(entry["name"]))


def test_other_endings_and_too_many_names(mask, tmp_path):
    with pytest.raises(ClipworksError, match="ending"):
        mask.save(tmp_path / "m.jpg")
    with pytest.raises(ClipworksError, match=r"names of a \.png"):
        Mask(mask.labels, [str(i) for i in range(257)], mask.scores).save(tmp_path / "m.png")


def test_overlay_colours_all_but_the_background(mask):
    pixels = np.full((6, 8, 3), 100, np.uint8)
    bare = np.array(mask.overlay(pixels, legend=False))
    assert bare.shape == (6, 8, 3)
    assert (bare[0, 0] == 100).all()
    assert np.array_equal(bare[2, 3], np.round(0.45 * 100 + 0.55 * palette(3, 1)[2]).astype(np.uint8))
    assert mask.overlay(pixels).height > 6
    with pytest.raises(ClipworksError, match="size"):
        mask.overlay(np.zeros((5, 8, 3), np.uint8))


def test_colours_differ():
    colors = palette(60, 1)
    assert len({tuple(c) for c in colors.astype(int).tolist()}) == 60


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (40, 300)])
def test_run_lengths_there_and_back(shape, share):
    mask = np.random.default_rng(1).random(shape) < share
    code = encode(mask)
    assert np.array_equal(decode(code), mask)
    # the same runs counted by a loop
    runs, last = [], False
    length = 0
    for value in mask.flatten(order="F"):
        if value != last:
            runs.append(length)
            length, last = 0, value
        length += 1
    assert np.array_equal(decode({"size": shape, "counts": [*runs, length]}), mask)


def test_the_string_is_pycocotools_own():
    """As pycocotools 2.0 writes them: runs after the third as differences, five bits a letter."""
    stripes = np.zeros((4, 6), bool)
    stripes[:, 1::2] = True
    assert encode(stripes)["counts"] == "444000"
    long = np.zeros((100, 100), bool)
    long[10:20, 50] = True
    assert encode(long)["counts"] == "bl4:dk4"


@pytest.mark.parametrize("code", [{"size": [2, 2], "counts": [3]}, {"size": [2, 2], "counts": [5, -1]}])
def test_a_code_that_does_not_fit(code):
    with pytest.raises(ClipworksError, match="add up"):
        decode(code)
