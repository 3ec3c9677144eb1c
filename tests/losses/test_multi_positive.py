"""Several positives: numpy, one text and equal texts as CLIP, slots that do not meet, local rows."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.infonce import infonce
from clipworks.losses.multi_positive import multi_positive
from clipworks.pretraining.caption_pools import CaptionPools

from .oracle import assert_gradient, assert_safe, clip, cross, pair, unit

IMAGE = unit(6, 5)
TEXTS = unit(6, 3, 5, seed=1)


def test_against_numpy():
    expected = np.mean([clip(IMAGE, TEXTS[:, k], 9.0) for k in range(3)])
    assert multi_positive(IMAGE, TEXTS, 9.0).item() == pytest.approx(expected, abs=1e-12)
    target = 0.8 * np.eye(6) + 0.2 / 6
    logits = [9.0 * (IMAGE @ TEXTS[:, k].T).numpy() for k in range(3)]
    expected = np.mean([(cross(x, target) + cross(x.T, target)) / 2 for x in logits])
    assert multi_positive(IMAGE, TEXTS, 9.0, smoothing=0.2).item() == pytest.approx(expected, abs=1e-12)


def test_gradient_against_differences():
    assert_gradient(multi_positive, IMAGE, TEXTS, torch.tensor(3.0))


def test_equal_texts_are_one_text_in_value_and_gradient():
    image, text = (x.requires_grad_() for x in pair(6))
    one, several = infonce(image, text, 9.0), multi_positive(image, text[:, None].expand(6, 4, 5), 9.0)
    assert several.item() == pytest.approx(one.item(), abs=1e-14)
    for got, wanted in zip(torch.autograd.grad(several, (image, text)), torch.autograd.grad(one, (image, text)),
                           strict=True):  # fmt: skip
        assert torch.allclose(got, wanted, atol=1e-14, rtol=0)


def test_texts_of_other_slots_are_no_negatives():
    """The image's own texts may be as near as they like to each other and to those of other slots."""
    image, text = torch.eye(4), torch.stack([torch.eye(4), torch.eye(4).roll(1, 0)], 1)
    alone = infonce(image, text[:, 1], 5.0)
    assert multi_positive(image, text, 5.0).item() == pytest.approx((infonce(image, image, 5.0) + alone).item() / 2)


def test_it_is_what_the_recipe_of_pools_computes():
    features = {"image": IMAGE, "text": TEXTS, "scale": torch.tensor(9.0)}
    found = CaptionPools(texts_per_image=3).losses(features)["infonce"]
    assert found.item() == pytest.approx(multi_positive(IMAGE, TEXTS, 9.0).item(), abs=1e-14)


def test_mean_over_local_rows_is_the_whole():
    image, texts = unit(8, 5, grad=True), unit(8, 3, 5, seed=1, grad=True)
    whole = multi_positive(image, texts, 9.0)
    rows = {"all_image": image, "all_text": texts}
    parts = [multi_positive(image[k : k + 2], texts[k : k + 2], 9.0, **rows, offset=k) for k in (0, 2, 4, 6)]
    mean = torch.stack(parts).mean()
    assert mean.item() == pytest.approx(whole.item(), abs=1e-13)
    for got, wanted in zip(torch.autograd.grad(mean, (image, texts)), torch.autograd.grad(whole, (image, texts)),
                           strict=True):  # fmt: skip
        assert torch.allclose(got, wanted, atol=1e-13, rtol=0)


def test_safe_numbers():
    assert_safe(lambda scale, i, t: multi_positive(i, t, scale), IMAGE, TEXTS)


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match=r"text must be a tensor of real numbers of shape \(n, k, dim\)"):
        multi_positive(IMAGE, TEXTS[:, 0], 9.0)
    with pytest.raises(ClipworksError, match=r"text must hold several rows per image, shape \(6, K, 5\). Got \(5, 3"):
        multi_positive(IMAGE, TEXTS[:5], 9.0)
    with pytest.raises(ClipworksError, match="given together"):
        multi_positive(IMAGE, TEXTS, 9.0, all_image=IMAGE)
