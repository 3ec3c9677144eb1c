"""Drawings pixel by pixel, the blur against a sum and its limits, scores by hand, regions, a world of colours."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.segment.fgvp import candidates, fgvp, mask_box, prompted_vectors, referring_scores, squared
from clipworks.segment.proposals import box_masks, point_masks, stability, without_doubles, without_specks
from clipworks.segment.visual_prompts import (
    PROMPTS,
    Style,
    box_region,
    circle_region,
    gaussian_blur,
    visual_prompt,
)

DRAW = np.random.default_rng(0)
PICTURE = DRAW.integers(0, 256, (24, 32, 3), np.uint8)
BOX = (5, 4, 20, 15)
MASK = np.zeros((24, 32), bool)
MASK[6:14, 8:18], MASK[6:9, 8:10] = True, False


def plain_blur(pixels, sigma):
    """The sum over a picture with its border repeated, pixel by pixel, of a Gaussian summed finely over each pixel."""
    reach = int(8 * sigma) + 1
    at = (np.arange(-50 * (2 * reach + 1), 50 * (2 * reach + 1)) + 0.5) / 100
    weights = np.exp(-(at**2) / (2 * sigma**2)).reshape(-1, 100).sum(1)
    weights /= weights.sum()
    wide = np.pad(pixels.astype(float), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    for axis in (0, 1):
        wide = np.apply_along_axis(np.convolve, axis, wide, weights, "valid")
    return wide


def test_the_blur_is_a_gaussians():
    expected = plain_blur(PICTURE, 1.7)
    assert np.abs(gaussian_blur(PICTURE, 1.7) - expected).max() <= 0.51
    sampled = ndimage.gaussian_filter(PICTURE.astype(float), (4, 4, 0), mode="nearest", truncate=8)
    assert np.abs(gaussian_blur(PICTURE, 4) - sampled).max() <= 1


def test_limits_of_the_blur():
    assert np.array_equal(gaussian_blur(PICTURE, 0), PICTURE)
    assert np.array_equal(gaussian_blur(PICTURE, 1e-3), PICTURE)
    flat = np.full((9, 7, 3), (3, 100, 255), np.uint8)
    assert np.array_equal(gaussian_blur(flat, 100), flat)
    corners = PICTURE[[0, 0, -1, -1], [0, -1, 0, -1]].mean(0)  # all that is seen of a picture from far enough
    assert np.abs(gaussian_blur(PICTURE, 1e7) - corners).max() <= 0.51


@pytest.mark.parametrize("prompt", ["mask-grey", "mask-blur", "box-grey", "box-blur", "circle-grey", "circle-blur"])
def test_outside_inks_leave_the_region_and_a_whole_region_leaves_all(prompt):
    shape = prompt.split("-")[0]
    region = {"mask": MASK, "box": box_region(24, 32, BOX), "circle": circle_region(24, 32, BOX)}[shape]
    seen = visual_prompt(PICTURE, BOX, prompt, MASK)
    other = gaussian_blur(PICTURE, 100) if "blur" in prompt else np.rint(PICTURE @ [0.299, 0.587, 0.114])[..., None]
    assert np.array_equal(seen[region], PICTURE[region])
    assert np.array_equal(seen[~region], np.broadcast_to(other, PICTURE.shape)[~region])
    if shape != "circle":
        assert np.array_equal(visual_prompt(PICTURE, (0, 0, 32, 24), prompt, MASK | True), PICTURE)
    nothing = visual_prompt(PICTURE, BOX, f"mask-{prompt.split('-')[1]}", MASK & False)
    assert np.array_equal(nothing, np.broadcast_to(other, PICTURE.shape))


def test_a_box_is_the_mask_that_fills_it():
    for ink in ("line", "colour", "grey", "blur"):
        full = visual_prompt(PICTURE, BOX, f"mask-{ink}", box_region(24, 32, BOX))
        assert np.array_equal(visual_prompt(PICTURE, BOX, f"box-{ink}"), full)


def test_overlays_and_lines_pixel_by_pixel():
    seen = visual_prompt(PICTURE, BOX, "mask-colour", MASK, Style(share=0.25, fill=(40, 80, 120)))
    assert np.array_equal(seen[~MASK], PICTURE[~MASK])
    assert np.abs(seen[MASK] - (0.75 * PICTURE[MASK] + 0.25 * np.array([40, 80, 120]))).max() <= 0.51
    lined = visual_prompt(PICTURE, BOX, "box-line")
    inner = np.zeros((24, 32), bool)
    inner[6:13, 7:18] = True  # two pixels inside
    line = box_region(24, 32, BOX) & ~inner
    assert (lined[line] == (255, 0, 0)).all()
    assert np.array_equal(lined[~line], PICTURE[~line])
    assert np.array_equal(visual_prompt(PICTURE, BOX, "crop"), PICTURE[4:15, 5:20])
    tinted = visual_prompt(PICTURE, BOX, "crop-colour")
    assert np.abs(tinted - (0.5 * PICTURE[4:15, 5:20] + [0, 127.5, 0])).max() <= 0.51
    dot = (visual_prompt(PICTURE, (10, 10, 12, 12), "keypoint", style=Style(dot=2)) == (255, 0, 0)).all(-1)
    assert {(y, x) for y, x in np.argwhere(dot)} >= {(11, 11), (9, 10), (12, 11)}
    assert dot.sum() <= 16


def test_the_circle_is_inscribed_and_regions_are_never_empty():
    seen = circle_region(24, 32, BOX)
    for y in range(24):
        for x in range(32):
            inside = ((x + 0.5 - 12.5) / 7.5) ** 2 + ((y + 0.5 - 9.5) / 5.5) ** 2 <= 1
            assert seen[y, x] == inside
    assert box_region(24, 32, (3.2, 4.7, 3.4, 4.8)).sum() == circle_region(24, 32, (3.2, 4.7, 3.4, 4.8)).sum() == 1
    assert box_region(24, 32, (-5, -5, 2, 3)).sum() == 6


def test_pictures_are_not_written_to():
    given = PICTURE.copy()
    for prompt in PROMPTS:
        visual_prompt(given, BOX, prompt, MASK)[:] = 0
    assert np.array_equal(given, PICTURE)


def test_subtraction_of_the_bank():
    logits = DRAW.normal(size=(5, 4))
    expected = [row[0] - sum(row[1:]) / 3 for row in logits]
    np.testing.assert_allclose(referring_scores(logits), expected)
    shifted = referring_scores(logits + np.arange(5.0)[:, None])
    np.testing.assert_allclose(shifted, expected)  # what a region says to all texts alike does not count
    np.testing.assert_allclose(referring_scores(logits[:, [0, 0]]), 0)
    np.testing.assert_array_equal(referring_scores(logits[:, :1]), logits[:, 0])


class Colours:
    """Vectors of pictures are the mean colours of their middles, of texts a colour."""

    image_size = 16
    WORDS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}  # noqa: RUF012

    def __init__(self, scale=10.0, gain=(1, 1, 1)):
        self.logit_scale, self.gain = scale, np.array(gain)

    def images(self, pictures, batch_size):
        assert len(pictures) <= batch_size
        assert {p.shape for p in pictures} == {(16, 16, 3)}
        return torch.tensor(np.array([p[4:12, 4:12].mean((0, 1)) * self.gain + 1e-3 for p in pictures]))

    def texts(self, sentences):
        rows = [next(np.array(c) for w, c in self.WORDS.items() if w in s) for s in sentences]
        return torch.tensor(np.array(rows, float))


def scene():
    """A red disc, a green square and a blue bar on a rough grey ground."""
    ground = np.random.default_rng(1).integers(90, 150, (40, 60, 1), np.uint8).repeat(3, 2)
    masks = np.zeros((3, 40, 60), bool)
    y, x = np.mgrid[:40, :60]
    masks[0] = (y - 12) ** 2 + (x - 14) ** 2 <= 60
    masks[1, 20:32, 30:42] = True
    masks[2, 5:35, 52:58] = True
    for mask, colour in zip(masks, ((220, 20, 20), (20, 220, 20), (20, 20, 220)), strict=True):
        ground[mask] = colour
    return ground, masks


@pytest.mark.parametrize("word", ["red", "green", "blue"])
def test_the_region_of_that_colour_is_found(word):
    picture, masks = scene()
    for more in ({"masks": masks}, {"boxes": [mask_box(m) for m in masks]}, {"masks": masks, "bank": ["red", "blue"]}):
        seen = fgvp(picture, f"the {word} one", Colours(), batch_size=2, prompts=["crop"], **more)
        assert seen.best == list(Colours.WORDS).index(word)
        assert seen.as_rows()[0]["region"] == seen.best
    assert seen.probabilities.sum() == pytest.approx(1)
    line = np.asarray(seen.overlay(picture)) != picture
    assert line.any()
    assert not line[:, : int(seen.boxes[seen.best][0])].any()


def test_reverse_blur_hides_what_stands_beside():
    """A green thing among red: the crop of its box shows the red as well, the blur of all but the mask does not."""
    picture = np.full((40, 40, 3), 128, np.uint8)
    mask = np.zeros((1, 40, 40), bool)
    mask[0, 8:32, 17:23] = True
    picture[8:32, 10:30] = (250, 0, 0)
    picture[mask[0]] = (0, 250, 0)
    box = np.array([[10, 8, 30, 32]])
    score = {p: prompted_vectors(picture, Colours(), box, p, masks=mask)[0] @ [1, 0, 0] for p in ("crop", "mask-blur")}
    assert score["mask-blur"] < score["crop"] - 0.1


def test_scores_add_up_over_encoders_and_drawings():
    """With one encoder the order does not depend on its scale; with two it does, as by hand."""
    picture, masks = scene()
    one, two = Colours(10.0), Colours(10.0, gain=(1, 5, 0))
    texts = np.array([0.0, 1, 0])

    def by_hand(*parts):
        return sum(
            e.logit_scale * prompted_vectors(picture, e, np.array([mask_box(m) for m in masks]), p, masks=masks) @ texts
            for e, p in parts
        )

    seen = fgvp(picture, "green", [one, two], masks=masks)
    np.testing.assert_allclose(seen.scores, by_hand(*((e, p) for e in (one, two) for p in ("crop", "mask-blur"))), 1e-6)
    far = fgvp(picture, "green", Colours(1000.0), masks=masks)
    assert np.array_equal(far.order, fgvp(picture, "green", one, masks=masks).order)
    np.testing.assert_allclose(far.scores, 100 * fgvp(picture, "green", one, masks=masks).scores, 1e-6)
    louder = fgvp(picture, "green", [Colours(1000.0), two], masks=masks).scores
    quieter = fgvp(picture, "green", [one, Colours(1000.0, gain=(1, 5, 0))], masks=masks).scores
    assert not np.allclose(louder / louder.max(), quieter / quieter.max(), atol=1e-3)


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_a_region_at_the_border_of_a_wide_picture_stays_in_sight(fit):
    picture = np.zeros((20, 100, 3), np.uint8)
    mask = np.zeros((20, 100), bool)
    mask[4:16, 90:] = True
    seen = squared(visual_prompt(picture, mask_box(mask), "mask-colour", mask, Style(share=1)), fit, 50)
    assert seen.shape == (50, 50, 3)
    area = {"squash": 5 * 30, "pad": 5 * 6}[fit]
    assert (seen[..., 1] > 127).sum() == area
    encoder = toy_encoder()
    cut = encoder.preprocess.pixels(squared(picture + mask[..., None] * np.uint8(200), "crop", 16))
    assert not cut.any()  # what "crop" would lose


def test_candidates_and_their_faults():
    boxes, masks = candidates((24, 32), [BOX, (0, 0, 3, 3)], np.array([MASK, MASK & False], np.uint8))
    assert np.array_equal(masks[1], box_region(24, 32, (0, 0, 3, 3)))
    assert boxes.shape == (2, 4)
    assert candidates((24, 32), None, MASK[None])[0].tolist() == [[8, 6, 18, 14]]
    faults = {
        "boxes or masks must be given": {},
        r"boxes must have the shape \(N, 4\)": {"boxes": np.zeros((0, 4))},
        r"boxes must have the shape \(1, 4\)": {"boxes": [BOX, BOX], "masks": MASK[None]},
        "left below right": {"boxes": [(5, 5, 5, 9)]},
        "cover part of the picture": {"boxes": [(40, 0, 50, 9)]},
        "boxes must be numbers": {"boxes": "box"},
        r"masks must have the shape \(N, 24, 32\)": {"masks": MASK},
        "masks must hold 0 and 1": {"masks": 2 * MASK[None].astype(int)},
        "must not be empty": {"masks": MASK[None] & False},
    }
    for message, given in faults.items():
        with pytest.raises(ClipworksError, match=message):
            fgvp(PICTURE, "x", toy_encoder(), **given)
    with pytest.raises(ClipworksError, match="need masks, or a sam"):
        fgvp(PICTURE, "x", toy_encoder(), boxes=[BOX], prompts=["mask-blur"])
    with pytest.raises(ClipworksError, match="Did you mean 'mask-blur'"):
        fgvp(PICTURE, "x", toy_encoder(), boxes=[BOX], prompts=["mask-blurr"])
    with pytest.raises(ClipworksError, match="expression must be words"):
        fgvp(PICTURE, " ", toy_encoder(), boxes=[BOX])


def test_specks_are_cleaned():
    mask = np.zeros((40, 40), bool)
    mask[2:30, 2:30], mask[10:13, 10:13], mask[35:38, 35:38] = True, False, True
    clean = np.zeros((40, 40), bool)
    clean[2:30, 2:30] = True
    assert np.array_equal(without_specks(mask, 20), clean)
    assert np.array_equal(without_specks(mask, 5), mask)
    small = np.zeros((40, 40), bool)
    small[1:4, 1:4], small[20:22, 20:22] = True, True
    assert without_specks(small).sum() == 9  # the largest stays
    assert not without_specks(mask & False).any()


def test_doubles_are_dropped():
    masks = np.zeros((4, 1, 10), bool)
    masks[0, 0, :8], masks[1, 0, :7], masks[2, 0, 4:], masks[3, 0, 9] = True, True, True, True
    assert without_doubles(masks, [0.5, 0.9, 0.7, 0.1]).tolist() == [1, 2, 3]  # IoU of 0 and 1: 7 / 8
    assert without_doubles(masks, [0.5, 0.9, 0.7, 0.1], 0.9).tolist() == [1, 2, 0, 3]
    assert without_doubles(masks[:0], []).tolist() == []


def test_masks_of_a_promptable_model():
    """It answers with the thing at the point or in the box, surely or not."""
    _, things = scene()

    def predict(box, point, scores):
        assert scores is None
        for thing in things:
            if thing[point[1], point[0]] if box is None else mask_box(thing)[:2] == box[:2]:
                return torch.where(torch.tensor(thing), 5.0, -5.0), 0.9
        return torch.linspace(-2, 2, 40 * 60).reshape(40, 60), 0.9  # changes with the threshold

    boxes = [mask_box(m) for m in things]
    asked = box_masks(predict, (40, 60), boxes)
    assert np.array_equal(asked, things)
    found = point_masks(predict, (40, 60))
    assert sorted(m.sum() for m in found) == sorted(m.sum() for m in things)
    assert not len(point_masks(lambda *_: (torch.ones(40, 60), 0.8), (40, 60), points=2))
    empty = box_masks(lambda *_: (-torch.ones(40, 60), 0.9), (40, 60), boxes)
    assert np.array_equal(empty[0], box_region(40, 60, boxes[0]))
    assert stability(-9 * torch.ones(2, 2)) == 0


def test_an_encoder_of_the_house():
    """Every drawing on a real tower, in passes of different sizes."""
    places = [BOX, (0, 0, 9, 9), (10, 10, 32, 24)]
    runs = [fgvp(PICTURE, "dog", toy_encoder(), boxes=places, masks=[MASK] * 3, prompts=PROMPTS, batch_size=n)
            for n in (1, 2, 9)]  # fmt: skip
    assert np.isfinite(runs[0].scores).all()
    for run in runs[1:]:
        np.testing.assert_allclose(run.scores, runs[0].scores, rtol=1e-5)
