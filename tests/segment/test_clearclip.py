"""The attention's output alone, against numpy, by every rule that the paper compares."""

import numpy as np
import plain_dense as plain
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.segment.clearclip import ClearCLIP
from clipworks.segment.maskclip import MaskCLIP
from clipworks.segment.patch_tokens import PatchTokens


@torch.no_grad()
@pytest.mark.parametrize("rule", ["qq", "kk", "vv"])
def test_against_numpy(rule):
    found = plain.hidden()
    weights = plain.like(plain.projections(found)["qkv".index(rule[0])])
    expected = plain.projected(found, plain.attended(found, weights))
    np.testing.assert_allclose(ClearCLIP(rule).features(found), expected, atol=1e-10)


@torch.no_grad()
def test_with_residual_sum_the_trained_rule_gives_clips_own_tokens():
    found = plain.hidden()
    assert torch.equal(ClearCLIP("qk", residual=True).features(found), PatchTokens().features(found))


@torch.no_grad()
def test_with_the_identity_it_is_maskclip_without_residual():
    found = plain.hidden()
    assert torch.equal(ClearCLIP("identity").features(found), MaskCLIP(residual=False).features(found))


@torch.no_grad()
def test_every_patch_sees_every_other():
    found = plain.hidden()
    before = ClearCLIP().features(found).flatten(1, 2)
    found.inputs[-1][:, 1 + 7] += torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (before != ClearCLIP().features(found).flatten(1, 2)).any(-1).all()


def test_an_unknown_rule():
    with pytest.raises(ClipworksError, match="attention must be one of"):
        ClearCLIP("qw").features(plain.hidden())
