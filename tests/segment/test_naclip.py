"""Neighbour-aware attention against numpy; both limits of sigma."""

import numpy as np
import plain_dense as plain
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.segment.naclip import NACLIP, neighbourhood


def bonus(grid, sigma):
    """Loops over pairs of patches; the class token's row and column are 0."""
    h, w = grid
    made = np.zeros((1 + h * w, 1 + h * w))
    for a in range(h * w):
        for b in range(h * w):
            far = (a // w - b // w) ** 2 + (a % w - b % w) ** 2
            made[1 + a, 1 + b] = np.exp(-far / (2 * sigma**2))
    return made


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("sigma", [0.7, 5.0])
def test_against_numpy(sigma, residual):
    found = plain.hidden()
    k = plain.projections(found)[1]
    weights = plain.softmax(k @ k.swapaxes(-2, -1) / np.sqrt(k.shape[-1]) + bonus(found.grid, sigma))
    y = plain.attended(found, weights)
    expected = plain.projected(found, plain.finished(found, y) if residual else y)
    np.testing.assert_allclose(NACLIP(sigma, residual).features(found), expected, atol=1e-10)


@torch.no_grad()
def test_a_wide_bonus_is_the_same_for_all_patches():
    """Without the class token the constant cancels: key-key attention."""
    found = plain.hidden()
    found.inputs[-1], found.prefix = found.inputs[-1][:, 1:], 0
    weights = plain.like(plain.projections(found)[1])
    expected = plain.projected(found, plain.attended(found, weights), prefix=0)
    np.testing.assert_allclose(NACLIP(1e6).features(found), expected, atol=1e-6)


@torch.no_grad()
def test_a_narrow_bonus_is_the_patch_itself():
    assert torch.equal(neighbourhood((3, 4), 0.0), torch.eye(12, dtype=torch.float64))
    found = plain.hidden()
    found.inputs[-1], found.prefix = found.inputs[-1][:, 1:], 0
    found.block.attention.k.weight.zero_(), found.block.attention.k.bias.zero_()
    weights = np.full((24, 24), 1 / (np.e + 23))
    np.fill_diagonal(weights, np.e / (np.e + 23))
    expected = plain.projected(found, plain.attended(found, weights[None, None]), prefix=0)
    np.testing.assert_allclose(NACLIP(0.0).features(found), expected, atol=1e-10)


def test_sigma_is_checked():
    with pytest.raises(ClipworksError, match="sigma must lie in"):
        NACLIP(-1.0)
