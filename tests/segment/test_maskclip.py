"""Value features against numpy; each patch alone; smoothing and denoising of a known map."""

import numpy as np
import plain_dense as plain
import pytest
import torch

from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.errors import ClipworksError
from clipworks.segment.common import enter
from clipworks.segment.maskclip import SHARP, MaskCLIP


@torch.no_grad()
@pytest.mark.parametrize("residual", [True, False])
def test_against_numpy(residual):
    found = plain.hidden()
    n = found.inputs[-1].shape[1]
    y = plain.attended(found, np.eye(n)[None, None])
    expected = plain.projected(found, plain.finished(found, y) if residual else y)
    np.testing.assert_allclose(MaskCLIP(residual=residual).features(found), expected, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("residual", [True, False])
def test_a_patch_does_not_see_the_others(residual):
    found = plain.hidden()
    before = MaskCLIP(residual=residual).features(found).flatten(1, 2)
    found.inputs[-1][:, 1 + 7] += 1
    after = MaskCLIP(residual=residual).features(found).flatten(1, 2)
    changed = (before != after).any(-1)
    assert changed[:, 7].all()
    assert changed.sum() == len(changed)


@torch.no_grad()
@pytest.mark.parametrize("divide", [True, False])
def test_key_smoothing(divide):
    found, words = plain.hidden(), torch.eye(8, dtype=torch.float64)[:3]
    raw = MaskCLIP().local(found, words).numpy()
    k = plain.projections(found)[1].transpose(0, 2, 1, 3).reshape(2, 25, -1)[:, 1:]
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    near = k @ k.swapaxes(1, 2)
    near = near / near.sum(-1, keepdims=True) if divide else near
    smooth = np.einsum("bpq,bkq->bkp", near, raw.reshape(2, 3, -1)).reshape(raw.shape)
    sure = plain.softmax(SHARP * raw.transpose(0, 2, 3, 1)).max(-1)[:, None]
    middle = float(np.median(sure))
    for threshold in (middle, 1.0):
        got = MaskCLIP(smooth=threshold, divide=divide).local(found, words)
        np.testing.assert_allclose(got, np.where(sure < threshold, smooth, raw), atol=1e-5)


@torch.no_grad()
def test_prompt_denoising_leaves_out_classes_that_are_never_sure():
    found = plain.hidden()
    features = MaskCLIP().features(found)
    sure = torch.nn.functional.normalize(features[0, 1, 2], dim=0)  # the very feature of one patch
    words = torch.stack([sure, -sure])
    plainly, denoised = MaskCLIP().local(found, words), MaskCLIP(denoise=0.5).local(found, words)
    best = (SHARP * plainly).softmax(1).amax((2, 3))
    for b in range(2):
        for c in range(2):
            expected = -torch.ones_like(plainly[b, c]) if best[b, c] < 0.5 else plainly[b, c]
            assert torch.equal(denoised[b, c], expected)
    alone = MaskCLIP(denoise=1.0).local(found, torch.stack([sure, sure]))  # never above a half: none is left out
    assert (alone > -1).all()


@torch.no_grad()
def test_a_resnet_goes_through_the_maps_of_its_pool():
    vision = VisionConfig(kind="resnet", layers=(1, 1, 1, 1), width=8, heads=4, image_size=64)
    text = TextConfig(width=16, layers=1, heads=2, mlp_width=16, vocab_size=64, eot_id=63)
    encoder = Encoder(EncoderConfig("r", 12, vision, text, PreprocessConfig(64)), seed=0).double().eval()
    found = enter(encoder, plain.images(1, 64, 96))
    pool, cells = encoder.visual.pool, found.inputs[0].numpy()
    expected = plain.linear(plain.linear(cells, pool.v), pool.out).reshape(1, 2, 3, 12)
    np.testing.assert_allclose(MaskCLIP().features(found), expected, atol=1e-10)
    from clipworks.segment.clearclip import ClearCLIP

    with pytest.raises(ClipworksError, match="ResNet"):
        ClearCLIP().features(found)


@pytest.mark.parametrize("setting", [{"smooth": 1.5}, {"denoise": -1}])
def test_messages(setting):
    with pytest.raises(ClipworksError, match=f"{next(iter(setting))} must lie in"):
        MaskCLIP(**setting)
