"""InfoNCE against numpy, its limits, targets, local rows, and what is refused."""

import math

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.infonce import infonce, shared_targets

from .oracle import assert_gradient, assert_safe, clip, cross, pair, unit


@pytest.mark.parametrize(("n", "scale"), [(2, 1.0), (6, 14.3), (33, 100.0)])
def test_against_numpy(n, scale):
    image, text = pair(n)
    assert infonce(image, text, scale).item() == pytest.approx(clip(image, text, scale), abs=1e-12)
    assert infonce(image, text, torch.tensor(scale)).item() == pytest.approx(clip(image, text, scale), abs=1e-6)


def test_gradient_against_differences():
    image, text = pair()
    assert_gradient(infonce, image, text, torch.tensor(3.0))
    targets = torch.softmax(unit(6, 6, seed=4), 1)
    assert_gradient(lambda i, t, s: infonce(i, t, s, targets=targets, smoothing=0.1), image, text, torch.tensor(3.0))


def test_no_text_closer_than_another_is_log_n():
    same = unit(1, 5).expand(7, 5)
    assert infonce(same, unit(7, 5, seed=1)[:1].expand(7, 5), 50.0).item() == pytest.approx(math.log(7), abs=1e-12)
    assert infonce(*pair(7), 0.0).item() == pytest.approx(math.log(7), abs=1e-12)


def test_right_answers_at_a_large_scale_cost_nothing():
    assert infonce(torch.eye(5), torch.eye(5), 1e4).item() == 0.0


def test_sides_and_order_of_pairs_do_not_matter():
    image, text = pair(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    value = infonce(image, text, 10.0).item()
    assert infonce(text, image, 10.0).item() == pytest.approx(value, abs=1e-14)
    assert infonce(image[order], text[order], 10.0).item() == pytest.approx(value, abs=1e-13)
    assert infonce(image, text[order], 10.0).item() > value + 0.1


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_mean_over_local_rows_is_the_whole(parts):
    """Value and gradients; the gathered rows carry gradient, as they do across processes."""
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    image, text = (x.requires_grad_() for x in pair(8))
    whole = infonce(image, text, scale)
    expected = torch.autograd.grad(whole, (image, text, scale))
    size = 8 // parts
    cut = [slice(k * size, (k + 1) * size) for k in range(parts)]
    values = [infonce(image[c], text[c], scale, all_image=image, all_text=text, offset=c.start) for c in cut]
    mean = torch.stack(values).mean()
    assert mean.item() == pytest.approx(whole.item(), abs=1e-13)
    for got, wanted in zip(torch.autograd.grad(mean, (image, text, scale)), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-13, rtol=0)


def test_without_gradient_through_gathered_rows_half_of_it_is_lost():
    image, text = (x.requires_grad_() for x in pair(8))
    (expected,) = torch.autograd.grad(infonce(image, text, 5.0), image)
    (got,) = torch.autograd.grad(infonce(image, text, 5.0, all_image=image.detach(), all_text=text.detach()), image)
    assert not torch.allclose(got, expected, rtol=0.1)


def test_soft_targets():
    image, text = pair(5)
    rng = np.random.default_rng(3)
    one, two = rng.dirichlet(np.ones(5), 5), rng.dirichlet(np.ones(5), 5)
    logits = 7.0 * (image @ text.T).numpy()
    got = infonce(image, text, 7.0, targets=(torch.tensor(one), torch.tensor(two))).item()
    assert got == pytest.approx((cross(logits, one) + cross(logits.T, two)) / 2, abs=1e-12)
    got = infonce(image, text, 7.0, targets=torch.tensor(one)).item()
    assert got == pytest.approx((cross(logits, one) + cross(logits.T, one)) / 2, abs=1e-12)
    identity = infonce(image, text, 7.0, targets=torch.eye(5))
    assert identity.item() == pytest.approx(infonce(image, text, 7.0).item(), abs=1e-12)


def test_smoothing():
    image, text = pair(5)
    target = 0.9 * np.eye(5) + 0.1 / 5
    logits = 7.0 * (image @ text.T).numpy()
    got = infonce(image, text, 7.0, smoothing=0.1).item()
    assert got == pytest.approx((cross(logits, target) + cross(logits.T, target)) / 2, abs=1e-12)


def test_pairs_that_share_a_caption_share_the_target():
    groups = torch.tensor([3, 1, 3, 0])
    expected = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]])
    assert torch.equal(shared_targets(groups), expected)
    assert torch.equal(shared_targets(groups[1:3], groups), expected[1:3])
    rows = torch.eye(4)[[0, 1, 0, 2]]
    assert infonce(rows, rows, 1e3, targets=shared_targets(groups)).item() == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_safe_numbers():
    assert_safe(lambda scale, i, t: infonce(i, t, scale), *pair())
    image, text = pair(1)
    assert infonce(image, text, 100.0).item() == 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": torch.ones(4, 2)}, "text must have the shape of image"),
        ({"image": torch.ones(4)}, r"image must be a tensor of real numbers of shape \(n, dim\)"),
        ({"image": torch.ones(0, 3), "text": torch.ones(0, 3)}, "not empty"),
        ({"all_image": torch.ones(8, 3)}, "given together"),
        ({"all_image": torch.ones(8, 3), "all_text": torch.ones(7, 3)}, r"all_text must have the shape \(8, 3\)"),
        ({"all_image": torch.ones(8, 2), "all_text": torch.ones(8, 3)}, r"all_image must have the shape \(8, 3\)"),
        ({"all_image": torch.ones(8, 3), "all_text": torch.ones(8, 3), "offset": 5}, "offset must lie in"),
        ({"offset": 1}, "offset must lie in"),
        ({"targets": torch.ones(4, 3)}, "targets must have the shape of the logits"),
    ],
)
def test_mistakes_are_named(change, says):
    given = {"image": torch.ones(4, 3), "text": torch.ones(4, 3), "scale": 1.0, **change}
    with pytest.raises(ClipworksError, match=says):
        infonce(**given)
