"""FarSLIP: both terms against numpy, shared categories, rows that fill up, and limits."""

import math

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.farslip import category_contrast, farslip, patch_distillation
from clipworks.losses.infonce import infonce, shared_targets

from .oracle import assert_gradient, assert_safe, log_softmax, pair

FULL, CROP = pair(5, 6, seed=3)
REGION, TEXT = pair(7, 6)
LABELS = torch.tensor([2, 0, -1, 2, 1, 0, 2])


def _loss(full=FULL, crop=CROP, region=REGION, text=TEXT, scale=4.0, labels=LABELS, **options):
    return farslip(full, crop, region, text, scale, labels, **options)


def test_against_numpy():
    found = _loss(distillation=0.2, categories=0.6)
    a, b = FULL.numpy(), 3 * CROP.numpy()
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert found["distillation"].item() == pytest.approx(0.2 * (1 - cosines.mean()), abs=1e-12)
    kept = [i for i in range(7) if LABELS[i] >= 0]
    r, t, c = REGION.numpy()[kept], TEXT.numpy()[kept], LABELS.numpy()[kept]
    total = 0.0
    for z in (4 * r @ t.T, 4 * t @ r.T):
        for i, row in enumerate(log_softmax(z)):
            total -= row[c == c[i]].mean()
    assert found["categories"].item() == pytest.approx(0.6 * total / 12, abs=1e-7)  # shares of a third are float32


def test_gradient_against_differences():
    assert_gradient(_loss, FULL, CROP, REGION, TEXT, torch.tensor(3.0))


def test_different_categories_are_the_contrast_of_pairs():
    value = category_contrast(REGION, TEXT, 4.0, torch.arange(7))
    assert value.item() == pytest.approx(infonce(REGION, TEXT, 4.0).item(), abs=1e-14)


def test_one_category_and_equal_logits_give_log_m():
    value = category_contrast(REGION[:1].expand(7, 6), TEXT[:1].expand(7, 6), 9.0, torch.zeros(7).long())
    assert value.item() == pytest.approx(math.log(7), abs=1e-7)


def test_the_least_value_is_the_mean_log_of_the_positives():
    """Categories at right angles and a high scale: nothing is left but the entropy of the targets."""
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    rows = torch.eye(3, dtype=torch.float64)[labels]
    value = category_contrast(rows, rows, 1e3, labels)
    assert value.item() == pytest.approx((3 * math.log(3) + 2 * math.log(2)) / 6, abs=1e-6)
    other = category_contrast(rows, torch.tensor(np.random.default_rng(0).normal(size=(6, 3))), 1.0, labels)
    assert other > value


def test_targets():
    targets = shared_targets(LABELS[LABELS >= 0])
    assert torch.allclose(targets.sum(1), torch.ones(6))
    assert torch.equal(targets, targets.T)


def test_rows_that_fill_up_have_no_influence():
    region, text = (x.clone().requires_grad_() for x in (REGION, TEXT))
    value = category_contrast(region, text, 4.0, LABELS)
    grads = torch.autograd.grad(value, (region, text))
    assert all((g[2] == 0).all() for g in grads)
    kept = LABELS >= 0
    alone = category_contrast(REGION[kept], TEXT[kept], 4.0, LABELS[kept])
    assert value.item() == pytest.approx(alone.item(), abs=1e-15)


def test_no_object_gives_zero_with_a_graph():
    region = REGION.clone().requires_grad_()
    value = category_contrast(region, TEXT, 4.0, torch.full((7,), -1))
    value.backward()
    assert value.item() == 0
    assert (region.grad == 0).all()
    assert patch_distillation(FULL[:0], CROP[:0]).item() == 0


def test_bounds_of_the_distillation():
    assert patch_distillation(FULL, 7 * FULL).item() == pytest.approx(0.0, abs=1e-12)
    assert patch_distillation(FULL, -FULL).item() == pytest.approx(2.0, abs=1e-12)


def test_safe_numbers():
    assert_safe(lambda s, r, t: category_contrast(r, t, s, LABELS), REGION, TEXT)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"crop": CROP[:3]}, r"crop must have the shape \(5, 6\)"),
        ({"text": TEXT[:3]}, r"text must have the shape \(7, 6\)"),
        ({"labels": LABELS[:3]}, r"labels must have the shape \(7\)"),
        ({"labels": LABELS.float()}, "labels must be integers"),
        ({"distillation": -1.0}, "distillation must lie in"),
        ({"categories": -1.0}, "categories must lie in"),
    ],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(ClipworksError, match=says):
        _loss(**change)
