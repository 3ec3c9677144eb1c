"""Windows: where they begin, that they cover all and none reaches out, that what they say is averaged."""

import numpy as np
import plain_dense as plain
import pytest
import torch

from clipworks.segment.common import cosines, enter, interpolation, resample
from clipworks.segment.naclip import NACLIP
from clipworks.segment.windows import padded, slide, starts


def test_windows_cover_everything_and_stay_inside():
    for length in range(1, 40):
        for window in range(1, 12):
            for stride in range(1, window + 1):
                found = starts(length, window, stride)
                assert len(found) == max(length - window + stride - 1, 0) // stride + 1
                seen = np.zeros(length, bool)
                for start in found:
                    assert start >= 0
                    assert start + window <= max(length, window)
                    seen[start : start + window] = True
                assert seen.all()
                assert len(set(found)) == len(found)


def run(image, work, window, stride, batch_size=3):
    return slide(image, work, patch=4, window=window, stride=stride, batch_size=batch_size)


def cells(windows, fine=1):
    """The mean of every cell, `fine` cells along each side of a patch."""
    return torch.nn.functional.avg_pool2d(windows, 4 // fine)


@pytest.mark.parametrize("fine", [1, 2])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 8), (12, 8), (100, 4)])
def test_what_depends_on_the_cell_alone_is_kept_by_any_windows(window, stride, fine):
    image = plain.images(1, 20, 28)[0].float()
    got = run(image, lambda w: cells(w, fine), window, stride)
    np.testing.assert_allclose(got, cells(image[None], fine)[0], atol=1e-6)


def test_overlaps_are_means_of_the_windows_that_see_them():
    image, numbers = torch.zeros(3, 4, 12), iter(range(1, 9))

    def number(windows):
        return torch.stack([torch.full((1, 1, w.shape[-1] // 4), float(next(numbers))) for w in windows])

    got = run(image, number, 8, 4)
    assert got.flatten().tolist() == [1.0, 1.5, 2.0]


def test_memory_is_bounded_by_the_batch():
    sizes = []
    run(torch.zeros(3, 40, 40), lambda w: sizes.append(len(w)) or cells(w), 8, 4, batch_size=5)
    assert max(sizes) == 5
    assert sum(sizes) == 81


@torch.no_grad()
def test_one_window_is_the_whole_image_bit_for_bit():
    encoder, image, words = plain.toy(), plain.images(1)[0], torch.eye(8)[:3]
    found = run(image, lambda w: NACLIP().local(enter(encoder, w), words), 64, 32)
    assert torch.equal(found, cosines(NACLIP().features(enter(encoder, image[None])), words)[0])


def test_padding_repeats_the_border():
    made = padded(torch.arange(15.0).expand(3, 1, 15).expand(3, 5, 15), 4)
    assert made.shape == (3, 8, 16)
    assert (made[:, :, 15] == 14).all()
    assert padded(made, 4).shape == made.shape


@pytest.mark.parametrize(("size", "cells_"), [(12, 5), (5, 12), (7, 7), (9, 1)])
def test_interpolation_is_torchs_bilinear(size, cells_):
    maps = torch.randn(2, cells_, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(maps[None], (size, 8), mode="bilinear")[0]
    np.testing.assert_allclose(resample(maps, interpolation(size, cells_), interpolation(8, 6)), expected, atol=1e-5)


def test_interpolation_of_a_part_leaves_out_the_padding():
    """Ten pixels on cells of four: two and a half cells."""
    ramp = (torch.arange(3) * 4 + 1.5)[:, None]  # at each cell's centre its own place in pixels
    got = (interpolation(10, 3, 2.5) @ ramp).flatten()
    np.testing.assert_allclose(got[2:], np.arange(2, 10), atol=1e-5)
