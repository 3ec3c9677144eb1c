"""ComCLIP: numpy, its limits, masks pixel by pixel, Winoground's figures, a world of colours."""

import numpy as np
import pytest
from PIL import Image

from clipworks.errors import ClipworksError
from clipworks.retrieval.captions import Parts, named_boxes, parse_caption
from clipworks.retrieval.comclip import comclip, match, part_weights, sub_image, winoground


def rows(*shape, seed=0):
    x = np.abs(np.random.default_rng(seed).normal(size=shape))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


IMAGE, PARTS, WORDS, TEXT = rows(4, 6), rows(4, 3, 6, seed=1), rows(4, 3, 6, seed=2), rows(4, 6, seed=3)


@pytest.mark.parametrize(("rule", "strength"), [("sum", 1.0), ("sum", 0.4), ("softmax", 1.0)])
def test_against_loops(rule, strength):
    found = comclip(3 * IMAGE, 2 * PARTS, WORDS, 5 * TEXT, rule=rule, strength=strength, temperature=0.1)
    for n in range(4):
        s = np.array([PARTS[n, k] @ WORDS[n, k] for k in range(3)])
        w = s / s.sum() if rule == "sum" else np.exp(s / 0.1) / np.exp(s / 0.1).sum()
        whole = IMAGE[n] + strength * sum(w[k] * PARTS[n, k] for k in range(3))
        assert found[n] == pytest.approx(whole @ TEXT[n] / np.linalg.norm(whole), abs=1e-6)


def test_nothing_found_or_no_strength_is_plain_clip():
    plain = (IMAGE * TEXT).sum(1)
    whole = np.repeat(IMAGE[:, None], 3, 1)
    np.testing.assert_allclose(comclip(IMAGE, whole, WORDS, TEXT), plain, atol=1e-6)
    np.testing.assert_allclose(comclip(IMAGE, PARTS, WORDS, TEXT, strength=0), plain, atol=1e-6)


def test_weights():
    s = np.array([[0.2, 0.3, 0.5], [0.1, 0.1, 0.1], [0.4, 0.0, 0.0], [0.3, -0.2, 0.1], [0.0, 0.0, 0.0]])
    found = part_weights(s)
    np.testing.assert_allclose(found.sum(1), 1)
    np.testing.assert_allclose(found[0], s[0])
    np.testing.assert_allclose(found[1], 1 / 3)
    np.testing.assert_allclose(found[2], [1, 0, 0], atol=3e-3)
    assert (found >= 0).all()
    np.testing.assert_allclose(part_weights(7 * s), found)
    np.testing.assert_allclose(part_weights(s, "softmax", 0.1).sum(1), 1)


def test_scores_are_cosines_whatever_the_signs():
    rng = np.random.default_rng(0)
    found = comclip(*(rng.normal(size=s) for s in ((50, 4), (50, 2, 4), (50, 2, 4), (50, 4))))
    assert (np.abs(found) <= 1 + 1e-6).all()


def test_sub_images_pixel_by_pixel():
    pixels = np.random.default_rng(0).integers(1, 256, (20, 30, 3), np.uint8)
    image, boxes = Image.fromarray(pixels), [(2, 3, 10, 9), (8, 5, 25, 15)]
    inside = np.zeros((20, 30), bool)
    for left, top, right, bottom in boxes:
        inside[top:bottom, left:right] = True
    for fill, colour in (("black", 0), ("mean", pixels.reshape(-1, 3).mean(0).round())):
        found = np.asarray(sub_image(image, boxes, fill))
        assert np.array_equal(found[inside], pixels[inside])
        assert (found[~inside] == colour).all()
        assert np.array_equal(found, np.asarray(sub_image(image, boxes[::-1], fill)))
    assert np.array_equal(np.asarray(sub_image(image, boxes, "blur"))[inside], pixels[inside])
    assert sub_image(image, []) is image
    whole = sub_image(image, [(-5, -5, 99, 99)])
    assert np.array_equal(np.asarray(whole), pixels)
    assert (np.asarray(sub_image(image, [(5, 5, 5, 9)])) == 0).all()


def test_winoground_by_hand_and_by_chance():
    table = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.95], [0.1, 0.99]]])
    assert winoground(table) == {"text": 2 / 3, "image": 1 / 3, "group": 1 / 3}
    chance = winoground(np.random.default_rng(0).random((60000, 2, 2)))
    assert chance == pytest.approx({"text": 0.25, "image": 0.25, "group": 1 / 6}, abs=0.01)
    assert chance["group"] <= min(chance["text"], chance["image"])
    with pytest.raises(ClipworksError, match=r"shape \(n, 2, 2\)"):
        winoground(np.eye(2))


def test_captions():
    found = parse_caption("Two dogs are next to a red ball, in the park")
    assert found == Parts(["two dogs", "red ball", "park"], [("are next to", 0, 1), ("in", 1, 2)])
    assert parse_caption("the building").entities == ["building"]
    assert parse_caption("") == Parts([], [])
    regions = named_boxes(lambda image: [("person", 1), ("dog", 2), ("sports ball", 3), ("dog", 4)],
                          {"person": ["man"], "sports ball": ["ball"]})  # fmt: skip
    assert regions(None, "two dogs") == [2, 4]
    assert regions(None, "old man") == [1]
    assert regions(None, "red ball") == [3]
    assert regions(None, "cat") == []


class Colours:
    """Images are their share of red, green and blue; texts are the colours they name, one space for both."""

    names = ("red", "green", "blue")

    def images(self, pictures, batch_size=32):
        x = np.stack([np.asarray(p, float).reshape(-1, 3).sum(0) + 1e-3 for p in pictures])
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def texts(self, sentences):
        x = np.array([[s.count(c) + 1e-3 for c in self.names] for s in sentences])
        return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_a_world_of_colours():
    """A small red and a large blue square; the caption that names what is there gains, none that is wrong does."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[2:8, 2:8, 0] = 255
    pixels[4:30, 10:30, 2] = 255
    image = Image.fromarray(pixels)
    regions = named_boxes(lambda _: [("red", (2, 2, 8, 8)), ("blue", (10, 4, 30, 30))])
    captions = ["a red square on a blue square", "a blue square on a red square", "a green square on a blue square"]
    found = match([(image, c) for c in captions], Colours(), regions)
    assert found.plain[0] == pytest.approx(found.plain[1])
    assert found.scores[0] > found.plain[0]
    assert found.scores[1] > found.plain[1]
    assert found.scores[0] > found.scores[2]
    assert found.found.tolist() == [2, 2, 1]
    nothing = match([(image, c) for c in captions], Colours(), lambda image, entity: [])
    np.testing.assert_allclose(nothing.scores, nothing.plain, atol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match=r"words must have the shape \(4, 3, 6\)"):
        comclip(IMAGE, PARTS, WORDS[:, :2], TEXT)
    with pytest.raises(ClipworksError, match="parts must have the shape"):
        comclip(IMAGE, PARTS[:, :0], WORDS[:, :0], TEXT)
    with pytest.raises(ClipworksError, match="rule must be one of"):
        comclip(IMAGE, PARTS, WORDS, TEXT, rule="max")
    with pytest.raises(ClipworksError, match="fill must be one of"):
        sub_image(Image.new("RGB", (4, 4)), [(0, 0, 2, 2)], "white")
