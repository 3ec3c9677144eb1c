"""PAMR and the dense CRF against loops, their fixed points, and an edge that neither crosses."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.segment.refine import dense_crf, pamr


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_pamr(image, scores, dilations):
    """One iteration, pixel by pixel."""
    _, height, width = image.shape
    made = np.zeros_like(scores)
    for y in range(height):
        for x in range(width):
            window, places = [], []
            for d in dilations:
                for dy in (-d, 0, d):
                    for dx in (-d, 0, d):
                        at = (min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1))
                        window.append(image[:, at[0], at[1]])
                        if dy or dx:
                            places.append(at)
            spread = np.std(window, axis=0, ddof=1)
            logits = [np.mean(-np.abs(image[:, y, x] - image[:, a, b]) / (1e-8 + 0.1 * spread)) for a, b in places]
            weights = np.exp(np.array(logits) - max(logits))
            weights /= weights.sum()
            made[:, y, x] = sum(w * scores[:, a, b] for w, (a, b) in zip(weights, places, strict=True))
    return made


def test_pamr_against_loops():
    image, scores = random(3, 5, 6), random(2, 5, 6, seed=1)
    got = pamr(image, scores, iterations=2, dilations=(1, 2))
    expected = plain_pamr(image.numpy(), plain_pamr(image.numpy(), scores.numpy(), (1, 2)), (1, 2))
    np.testing.assert_allclose(got, expected, atol=1e-10)


def test_pamr_keeps_constants_and_sums():
    image = random(3, 9, 9)
    np.testing.assert_allclose(pamr(image, torch.full((2, 9, 9), 0.5, dtype=torch.float64)), 0.5, atol=1e-12)
    scores = random(4, 9, 9).softmax(0)
    np.testing.assert_allclose(pamr(image, scores).sum(0), 1, atol=1e-12)


def test_pamr_on_one_colour_is_the_mean_of_the_neighbours():
    scores = random(1, 7, 7)
    got = pamr(torch.ones(3, 7, 7, dtype=torch.float64), scores, iterations=1, dilations=(1, 2))
    at = [(3 + dy * d, 3 + dx * d) for d in (1, 2) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    assert float(got[0, 3, 3]) == pytest.approx(np.mean([float(scores[0, y, x]) for y, x in at]))


def test_pamr_does_not_mix_two_colours():
    image = torch.zeros(3, 12, 12, dtype=torch.float64)
    image[:, :, 6:] = 1
    scores = torch.stack([1 - image[0], image[0]])
    got = pamr(image, scores, iterations=10, dilations=(1, 2))
    assert (got - scores).abs().max() < 1e-3


def plain_crf(image, scores, iterations, space, color, weight, smooth_space, smooth_weight):
    k, height, width = scores.shape
    n = height * width
    pixels, unary = image.reshape(3, n).T, np.log(scores.reshape(k, n))
    kernel = np.zeros((n, n))
    for a in range(n):
        for b in range(n):
            far = (a // width - b // width) ** 2 + (a % width - b % width) ** 2
            unlike = ((pixels[a] - pixels[b]) ** 2).sum()
            if a != b:
                kernel[a, b] = weight * np.exp(-far / (2 * space**2) - unlike / (2 * color**2))
                kernel[a, b] += smooth_weight * np.exp(-far / (2 * smooth_space**2))
    q = np.exp(unary) / np.exp(unary).sum(0)
    for _ in range(iterations):
        e = unary + q @ kernel
        e = np.exp(e - e.max(0))
        q = e / e.sum(0)
    return q.reshape(k, height, width)


def test_crf_against_loops():
    image, scores = 10 * random(3, 4, 5), random(3, 4, 5, seed=2).softmax(0)
    how = dict(space=3.0, color=2.0, weight=0.3, smooth_space=1.0, smooth_weight=0.2)
    got = dense_crf(image, scores, iterations=3, **how)
    np.testing.assert_allclose(got, plain_crf(image.numpy(), scores.numpy(), 3, **how), atol=1e-6)


def test_crf_without_pairs_is_its_input_and_one_label_stays():
    image, scores = random(3, 6, 6), random(3, 6, 6, seed=1).softmax(0)
    np.testing.assert_allclose(dense_crf(image, scores, weight=0, smooth_weight=0), scores, atol=1e-12)
    sure = torch.zeros(2, 6, 6, dtype=torch.float64)
    sure[0] = 1
    np.testing.assert_allclose(dense_crf(image, sure), sure, atol=1e-7)


def test_crf_takes_a_speck_back_but_not_across_an_edge():
    image = torch.zeros(3, 10, 10, dtype=torch.float64)
    image[:, :, 5:] = 200
    scores = torch.stack([torch.full((10, 10), 0.7), torch.full((10, 10), 0.3)]).double()
    scores[:, :, 5:] = scores[:, :, 5:].flip(0)
    clean = scores.argmax(0)
    scores[:, 4, 2] = torch.tensor([0.4, 0.6], dtype=torch.float64)
    assert torch.equal(dense_crf(image, scores).argmax(0), clean)


def test_messages():
    with pytest.raises(ClipworksError, match="one size"):
        pamr(random(3, 4, 4), random(2, 4, 5))
    with pytest.raises(ClipworksError, match="at most 10000"):
        dense_crf(torch.zeros(3, 200, 100), torch.zeros(2, 200, 100))
