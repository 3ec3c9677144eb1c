"""Occlusion by loops, and on an encoder that looks at one place."""

import numpy as np
import pytest
import torch
from seen import Spot, pair, toy

from clipworks.analysis.explain import blur
from clipworks.analysis.explain_occlusion import occlusion, squares
from clipworks.errors import ClipworksError


def test_by_loops():
    encoder, (pixels, words) = toy(), pair(1)
    word = torch.nn.functional.normalize(words, dim=1)[0].double()
    loss, count = np.zeros((4, 4)), np.zeros((4, 4))
    with torch.no_grad():
        whole = encoder.encode_image(pixels)[0].double() @ word
        for y in range(-1, 4):
            for x in range(-1, 4):
                covered = pixels.clone()
                place = (..., slice(max(4 * y, 0), 4 * y + 8), slice(max(4 * x, 0), 4 * x + 8))
                covered[place] = blur(pixels)[place]
                lost = float(whole - encoder.encode_image(covered)[0].double() @ word)
                cells = (slice(max(y, 0), y + 2), slice(max(x, 0), x + 2))
                loss[cells] += lost
                count[cells] += 1
    found = occlusion(encoder, pixels, words, cells=4, square=2, batch_size=7)
    np.testing.assert_allclose(found[0], loss / count, atol=1e-6)


def test_the_place_that_is_looked_at():
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 2.5
    pixels[0, 0, 8:16, 16:24] = 1  # red; its blurred copy is far less red
    found = occlusion(Spot(8, 16), pixels, torch.tensor([[1.0, 0.0]]), cells=4, square=1)[0]
    assert found.argmax() == 4 * 1 + 2
    assert found.max() > 0.3
    assert found.flatten().sort().values[:15].abs().max() < 1e-6
    against = occlusion(Spot(8, 16), pixels, torch.tensor([[-1.0, 0.0]]), cells=4, square=1)[0]
    torch.testing.assert_close(against, -found)


def test_squares_cover_all_cells_equally():
    for cells, square in ((5, 1), (5, 2), (4, 3), (3, 3)):
        assert squares(cells, square).sum(0).unique().tolist() == [square**2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"cells": 0}, "cells must lie in"), ({"square": 9}, "square must be from 1 to 8"), ({"batch_size": 0}, "batch")],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ClipworksError, match=message):
        occlusion(toy(), *pair(), **settings)
