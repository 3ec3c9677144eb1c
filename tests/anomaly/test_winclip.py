"""WinCLIP: windows by hidden patches, both harmonic means by loops, and the facts of the card."""

import numpy as np
import pytest
import torch
from parts import flawed, good, toy

from clipworks.anomaly.states import BAD, GOOD, PHOTOS, bad_share, sentences, state_vectors
from clipworks.anomaly.winclip import WinCLIP, harmonic, window_cover, window_places
from clipworks.errors import ClipworksError
from clipworks.metrics.detection import auroc

TEXT = np.eye(2, 8)


def test_windows_of_the_published_grid():
    """Card, fact 3."""
    assert len(window_places(15, 15, 2)) == 196
    assert len(window_places(15, 15, 3)) == 169
    for side, inside in ((2, 4), (3, 9)):
        covered = window_cover(15, 15, side).sum(0).view(15, 15)
        assert covered[0, 0] == 1
        assert covered[7, 7] == inside
    assert window_places(2, 3, 2).tolist() == [[0, 1, 3, 4], [1, 2, 4, 5]]


@pytest.mark.parametrize("towards", ["normal", "abnormal"])
def test_harmonic_means_by_loops(towards):
    """Card, fact 2."""
    p, cover = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)), window_cover(4, 5, 2)
    found = harmonic(p, cover, towards).numpy()
    for n in range(2):
        for j in range(20):
            over = [float(p[n, i]) for i in range(12) if cover[i, j]]
            if towards == "normal":
                expected = len(over) / sum(1 / q for q in over)
                assert expected <= np.mean(over) + 1e-7
            else:
                expected = 1 - len(over) / sum(1 / (1 - q) for q in over)
                assert expected >= np.mean(over) - 1e-7
            assert found[n, j] == pytest.approx(expected, abs=1e-6)
            assert min(over) - 1e-6 <= expected <= max(over) + 1e-6
    same = harmonic(torch.full((1, 12), 0.3), cover, towards)
    np.testing.assert_allclose(same, 0.3, atol=1e-6)
    p[0, 6] = 0.0 if towards == "normal" else 1.0
    np.testing.assert_allclose(harmonic(p, cover, towards)[0][cover[6] > 0], p[0, 6], atol=1e-6)


def test_a_window_is_the_class_feature_of_its_patches_alone():
    encoder, images = toy(), good(2)
    described = WinCLIP(encoder, text=TEXT).fit(None)._described(images)
    places = window_places(6, 6, 3)
    for number in (0, 9, 15):
        hidden = torch.zeros(2, 36, dtype=torch.bool)
        hidden[:, places[number]] = True
        seen = torch.nn.functional.normalize(encoder.visual.run(images, mask=hidden).pooled, dim=1)
        torch.testing.assert_close(described["3"][:, number], seen.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("vision", [{}, {"stem": "efficientnet-lite0", "patch_size": 32, "image_size": 64}])
def test_a_window_as_large_as_the_image_is_the_image(vision):
    """Card, fact 4."""
    encoder = toy(**vision)
    side = encoder.visual.grid[0]
    images = good(3, side=encoder.image_size)
    described = WinCLIP(encoder, text=TEXT, windows=[side]).fit(None)._described(images)
    torch.testing.assert_close(described[str(side)][:, 0], encoder.images(images), atol=1e-5, rtol=1e-4)


def test_zero_shot_map_and_score_by_hand():
    encoder, images = toy(), good(2)
    detector = WinCLIP(encoder, text=TEXT, windows=[6], scale=5.0).fit(None)
    x = encoder.images(images).numpy()
    p = 1 / (1 + np.exp(5 * (x[:, 0] - x[:, 1])))
    found = list(detector.score_maps(images))
    np.testing.assert_allclose([m.score for m in found], p, atol=1e-5)
    for one, expected in zip(found, p, strict=True):
        np.testing.assert_allclose(one.heat, expected, atol=1e-5)  # a window of the whole image, so a flat map
    assert (detector.threshold_, detector.pixel_threshold_) == (0.5, 0.5)


def test_equal_and_swapped_texts():
    """Card, fact 7."""
    images = flawed(3)[0]

    def maps(text):
        return np.stack(
            [m.heat for m in WinCLIP(toy(), text=text, windows=[6], scale=5.0).fit(None).score_maps(images)]
        )

    np.testing.assert_allclose(maps(np.ones((2, 8))), 0.5, atol=1e-6)
    np.testing.assert_allclose(maps(TEXT) + maps(TEXT[::-1]), 1, atol=1e-5)


def test_memory_alone():
    """Card, fact 5: with equal texts what remains above one half is the memory's map."""
    train, test = good(10), flawed(4)[0]
    some, more = (WinCLIP(toy(), text=np.ones((2, 8))).fit(train[:n]) for n in (5, 10))
    np.testing.assert_allclose([m.heat for m in more.score_maps(train)], 0.5, atol=1e-5)
    for few, many in zip(some.score_maps(test), more.score_maps(test), strict=True):
        assert (many.heat <= few.heat + 1e-6).all()
    described = more._described(test[:1])
    far = [min(1 - float(f @ m) for m in more.memories_[2].rows()) / 2 for f in described["2"][0]]
    over = window_cover(6, 6, 2).numpy()
    spread = [np.mean([far[i] for i in range(25) if over[i, j]]) for j in range(36)]
    cover = window_cover(6, 6, 2)
    again = more.memories_[2].distances(described["2"]) / 2 @ cover / cover.sum(0)
    np.testing.assert_allclose(again[0], spread, atol=1e-6)


def test_few_good_images_find_planted_defects():
    """Card, fact 8."""
    detector = WinCLIP(toy(), text=np.ones((2, 8))).fit(good(4))
    images = torch.cat([good(6, 9), flawed()[0]])
    assert auroc(detector.score(images), [0] * 6 + [1] * 6) == 1


def test_sentences():
    bad_words = ("damaged", "with flaw", "with defect", "with damage")
    fine, bad = sentences("metal nut")
    assert (len(fine), len(bad)) == (len(GOOD) * len(PHOTOS), len(BAD) * len(PHOTOS))
    assert len(PHOTOS) == 22
    assert all("metal nut" in s for s in fine + bad)
    assert all(any(w in s for w in bad_words) for s in bad)
    for ensemble in ("industrial", "textural"):
        assert all(len(group) == 7 * 28 for group in sentences("wood", ensemble))

    class Words:
        dim = 2

        def texts(self, given):
            return torch.tensor([[1.0, 0] if any(w in s for w in bad_words) else [0, 1.0] for s in given])

    assert state_vectors(None, "tile", Words()).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"towards": "norml"}, "Did you mean 'normal'"),
        ({"windows": [7]}, "from 1 to 6 patches wide on this grid. Got 7"),
        ({"text": np.eye(3, 8)}, "two vectors, of good and of defective things. Got 3"),
        ({"text": None, "name": " "}, "name must be the object in words"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ClipworksError, match=message):
        WinCLIP(toy(), **{"text": TEXT, **settings}).fit(good(2))


def test_probabilities_of_two():
    x = torch.eye(3)
    np.testing.assert_allclose(bad_share(x, x[:2], 2.0), [1 / (1 + np.e**2), np.e**2 / (1 + np.e**2), 0.5], rtol=1e-6)
