"""Correlative attention against numpy; queries and keys of zero average all values, twice."""

import numpy as np
import plain_dense as plain
import pytest
import torch

from clipworks.segment.clearclip import ClearCLIP
from clipworks.segment.sclip import SCLIP


@torch.no_grad()
@pytest.mark.parametrize("residual", [True, False])
def test_against_numpy(residual):
    found = plain.hidden()
    q, k, _ = plain.projections(found)
    y = plain.attended(found, plain.like(q) + plain.like(k))
    expected = plain.projected(found, plain.finished(found, y) if residual else y)
    np.testing.assert_allclose(SCLIP(residual=residual).features(found), expected, atol=1e-10)


@torch.no_grad()
def test_without_queries_and_keys_it_is_twice_the_mean_of_the_values():
    found = plain.hidden()
    attention = found.block.attention
    for module in (attention.q, attention.k):
        module.weight.zero_(), module.bias.zero_()
    attention.out.bias.zero_()
    mean = plain.attended(found, np.full((2, 2, 25, 25), 1 / 25))
    np.testing.assert_allclose(found.attend("qq+kk"), 2 * mean, atol=1e-10)
    np.testing.assert_allclose(ClearCLIP().features(found), plain.projected(found, mean), atol=1e-10)
