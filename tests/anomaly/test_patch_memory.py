"""Patch memory: heat by a double loop, the card's facts of a memory, and planted defects."""

import numpy as np
import pytest
import torch
from parts import flawed, good, toy
from scipy import ndimage

from clipworks.anomaly.patch_memory import PatchMemory
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.metrics.anomaly import pixel_auroc
from clipworks.metrics.detection import auroc


def places(encoder, images, layer):
    """Unit features (n, 36, width) of one block, averaged over 3 x 3 cells, by loops."""
    tokens = encoder.visual.run(images, output_layers=(layer,)).layers[layer][:, 1:].detach().numpy()
    grid = tokens.reshape(len(images), 6, 6, -1)
    found = np.zeros_like(grid)
    for y in range(6):
        for x in range(6):
            found[:, y, x] = grid[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].mean((1, 2))
    found = found / np.linalg.norm(found, axis=-1, keepdims=True)
    return found.reshape(len(images), 36, -1)


def test_heat_is_the_distance_to_the_nearest_remembered_place():
    encoder, train, test = toy(), good(6), flawed(2)[0]
    detector = PatchMemory(encoder, layers=[1]).fit(train)
    memory = np.concatenate(places(encoder, train, 1))
    expected = [[min(1 - memory @ place) for place in image] for image in places(encoder, test, 1)]
    maps = torch.tensor(np.reshape(expected, (2, 1, 6, 6)))
    large = torch.nn.functional.interpolate(maps, (24, 24), mode="bilinear")[:, 0].numpy()
    large = ndimage.gaussian_filter(large, (0, 24 / 56, 24 / 56), mode="nearest")
    found = list(detector.score_maps(test))
    np.testing.assert_allclose([m.heat for m in found], large, atol=1e-5)
    np.testing.assert_allclose([m.score for m in found], large.max((1, 2)), atol=1e-5)


def test_good_images_are_judged_without_their_own_fold():
    encoder, train = toy(), good(7)
    detector = PatchMemory(encoder, layers=[1], rate=0.05).fit(train)
    rows = places(encoder, train, 1)
    peaks = []
    for i, image in enumerate(rows):
        others = np.concatenate([r for j, r in enumerate(rows) if j % 5 != i % 5])
        heat = torch.tensor([min(1 - others @ place) for place in image]).view(1, 1, 6, 6)
        large = torch.nn.functional.interpolate(heat, (24, 24), mode="bilinear")[:, 0].numpy()
        peaks.append(ndimage.gaussian_filter(large, (0, 24 / 56, 24 / 56), mode="nearest").max())
    np.testing.assert_allclose(detector.scores_, np.sort(peaks), atol=1e-5)
    assert detector.threshold_ == pytest.approx(max(peaks), abs=1e-5)


def test_a_remembered_image_is_cold_and_more_memory_never_heats():
    """Card, fact 5."""
    train, test = good(10), flawed()[0]
    some, more = PatchMemory(toy()).fit(train[:5]), PatchMemory(toy()).fit(train)
    np.testing.assert_allclose([m.heat for m in more.score_maps(train)], 0, atol=1e-6)
    for few, many in zip(some.score_maps(test), more.score_maps(test), strict=True):
        assert (many.heat <= few.heat + 1e-6).all()


def test_planted_defects_are_found():
    """Card, fact 8."""
    images, masks = flawed()
    fresh = good(12, seed=5)
    detector = PatchMemory(toy(), layers=[0], neighbourhood=1).fit(good(20))
    maps = list(detector.score_maps(torch.cat([fresh, images])))
    labels = np.arange(18) >= 12
    assert auroc([m.score for m in maps], labels) == 1
    assert pixel_auroc([m.heat for m in maps[12:]], masks) > 0.95
    assert all(m.defective for m in maps[12:])
    assert sum(m.defective for m in maps[:12]) <= 3
    for heat, mask in zip(maps[12:], masks, strict=True):
        assert mask[np.unravel_index(heat.heat.argmax(), mask.shape)]
        box = heat.regions()[0]
        assert mask[box.y0 : box.y1, box.x0 : box.x1].any()


def test_the_memory_is_bounded_and_still_sees():
    images, _ = flawed()
    detector = PatchMemory(toy(), layers=[0], limit=40).fit(good(20))
    assert len(detector.memory_.rows()) <= 40
    assert auroc(detector.score(torch.cat([good(6, 9), images])), [0] * 6 + [1] * 6) == 1


def test_a_convolutional_stem_and_larger_images():
    encoder = toy_encoder(1, image_size=32, stem="efficientnet-lite0", patch_size=32)
    detector = PatchMemory(encoder, image_size=64).fit(good(2, side=64))
    assert detector.score_map(good(1, side=50)[0]).heat.shape == (50, 50)
    assert detector._described(good(1, side=64))["places"].shape == (1, 8, 8, 152)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbourhood": 2}, "neighbourhood must be odd"),
        ({"limit": 3}, "limit must lie in"),
        ({"image_size": 30}, "multiple of the patches' 4 pixels. Got 30"),
        ({"rate": 2}, "rate must lie in"),
        ({"layers": [7]}, "^layers must name layers from 0 to 1"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ClipworksError, match=message):
        PatchMemory(toy(), **settings).fit(good(2))


def test_images_are_needed():
    with pytest.raises(ClipworksError, match="at least one image of a good part"):
        PatchMemory(toy()).fit([])
