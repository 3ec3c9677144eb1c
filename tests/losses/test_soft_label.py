"""Softened labels: numpy, the entropy below which it cannot go, label smoothing, targets without gradient."""

import math

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.infonce import infonce
from clipworks.losses.soft_label import soft_label, softened, softened_targets

from .oracle import assert_safe, cross, pair, softmax

IMAGE, TEXT = pair(6, 5)


def _targets(logits, a, spread):
    n = len(logits)
    y = np.zeros((n, n))
    for i in range(n):
        others = [j for j in range(n) if j != i]
        y[i, others] = a / (n - 1) if spread == "even" else a * softmax(logits[i, others])
        y[i, i] = 1 - a
    return y


@pytest.mark.parametrize("spread", ["even", "similarity"])
@pytest.mark.parametrize("a", [0.0, 0.1, 0.7, 1.0])
def test_against_numpy(a, spread):
    logits = 9.0 * (IMAGE @ TEXT.T).numpy()
    expected = (cross(logits, _targets(logits, a, spread)) + cross(logits.T, _targets(logits.T, a, spread))) / 2
    assert soft_label(IMAGE, TEXT, 9.0, soften=a, spread=spread).item() == pytest.approx(expected, abs=1e-12)


def test_hard_labels_are_clip_and_even_ones_are_label_smoothing():
    assert soft_label(IMAGE, TEXT, 9.0, soften=0.0).item() == pytest.approx(infonce(IMAGE, TEXT, 9.0).item(), abs=1e-14)
    smoothing = 0.1 * 6 / 5  # a = e (B - 1) / B
    expected = infonce(IMAGE, TEXT, 9.0, smoothing=smoothing).item()
    assert soft_label(IMAGE, TEXT, 9.0, soften=0.1).item() == pytest.approx(expected, abs=1e-12)


def test_it_is_never_below_the_entropy_of_the_targets():
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1 / 5)
    assert entropy == pytest.approx(0.4860, abs=1e-4)
    for scale in (1.0, 3.8, 100.0):
        assert soft_label(torch.eye(6), torch.eye(6), scale, soften=0.1).item() >= entropy - 1e-6
    # reached where the softmax is the target: exp(s) = 0.9 * 5 / 0.1
    reached = soft_label(torch.eye(6), torch.eye(6), math.log(45.0), soften=0.1).item()
    assert reached == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize("spread", ["even", "similarity"])
def test_no_gradient_reaches_the_targets(spread):
    image, text = (x.clone().requires_grad_() for x in (IMAGE, TEXT))
    logits = 9.0 * (IMAGE @ TEXT.T).numpy()
    y, z = _targets(logits, 0.3, spread), _targets(logits.T, 0.3, spread)
    slope = ((softmax(logits) - y) + (softmax(logits.T) - z).T) / 12
    (got,) = torch.autograd.grad(soft_label(image, text, 9.0, soften=0.3, spread=spread), image)
    assert np.allclose(got, 9.0 * slope @ TEXT.numpy(), atol=1e-12)


@pytest.mark.parametrize("spread", ["even", "similarity"])
def test_mean_over_local_rows_is_the_whole(spread):
    image, text = pair(8)
    whole = soft_label(image, text, 9.0, spread=spread).item()
    parts = [soft_label(image[k : k + 2], text[k : k + 2], 9.0, spread=spread, all_image=image, all_text=text,
                        offset=k).item() for k in (0, 2, 4, 6)]  # fmt: skip
    assert np.mean(parts) == pytest.approx(whole, abs=1e-13)


def test_targets_are_probabilities_and_a_batch_of_one_has_its_own():
    logits = 9.0 * IMAGE @ TEXT.T
    for spread in ("even", "similarity"):
        targets = softened_targets(logits[2:4], 0.2, spread, 2)
        assert torch.allclose(targets.sum(1), torch.ones(2, dtype=torch.float64))
        assert targets[0, 2].item() == targets[1, 3].item() == 0.8
        assert soft_label(IMAGE[:1], TEXT[:1], 9.0, spread=spread).item() == 0.0


def test_softening_rises_in_a_line():
    found = [softened(0.2, step, 10) for step in range(12)]
    assert found[0] == 0.0
    assert found[10] == found[11] == 0.2
    assert found[:11] == pytest.approx(np.linspace(0, 0.2, 11))


def test_safe_numbers():
    for spread in ("even", "similarity"):
        assert_safe(lambda scale, i, t, spread=spread: soft_label(i, t, scale, spread=spread), IMAGE, TEXT)


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="soften must lie in"):
        soft_label(IMAGE, TEXT, 9.0, soften=1.5)
    with pytest.raises(ClipworksError, match="spread must be"):
        soft_label(IMAGE, TEXT, 9.0, spread="evn")
