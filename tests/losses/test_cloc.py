"""CLOC: both terms against numpy, which texts count as the same, and limits."""

import math

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.cloc import cloc, same_text
from clipworks.losses.infonce import infonce

from .oracle import assert_gradient, assert_safe, pair, unit

REGION, TEXT = pair(7, 5)
RNG = np.random.default_rng(4)
LOW = RNG.uniform(0, 0.5, (2, 7, 2))
BOXES, TRUE = (torch.tensor(np.concatenate([low, low + RNG.uniform(0.1, 0.5, (7, 2))], 1)) for low in LOW)
LABELS = torch.tensor([3, 1, 3, 0, 2, 1, 3])


def _loss(region=REGION, text=TEXT, scale=4.0, boxes=BOXES, true=TRUE, **options):
    return cloc(region, text, scale, boxes, true, **{"threshold": None, **options})


def _distance(a, b):
    inside = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    around = np.prod(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2]))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inside
    return np.abs(a - b).sum() + 1 - (inside / union - (around - union) / around)


def test_against_numpy():
    found = _loss(labels=LABELS, contrast=0.7, grounding=0.3)
    logits, total = 4.0 * (REGION @ TEXT.T).numpy(), 0.0
    for z in (logits, logits.T):
        for i in range(7):
            kept = [j for j in range(7) if j == i or LABELS[j] != LABELS[i]]
            total += math.log(sum(math.exp(z[i, j]) for j in kept)) - z[i, i]
    assert found["contrast"].item() == pytest.approx(0.7 * total / 14, abs=1e-12)
    apart = np.mean([_distance(a, b) for a, b in zip(BOXES.numpy(), TRUE.numpy(), strict=True)])
    assert found["grounding"].item() == pytest.approx(0.3 * apart, abs=1e-12)


def test_gradient_against_differences():
    assert_gradient(lambda r, t, s, b: _loss(r, t, s, b, labels=LABELS), REGION, TEXT, torch.tensor(3.0), BOXES)


def test_without_filter_it_is_the_contrast_of_pairs():
    assert _loss()["contrast"].item() == pytest.approx(infonce(REGION, TEXT, 4.0).item(), abs=1e-14)
    different = _loss(labels=torch.arange(7), threshold=0.999)
    assert different["contrast"].item() == pytest.approx(infonce(REGION, TEXT, 4.0).item(), abs=1e-14)


def test_equal_texts():
    """All alike: with the filter nothing is left to confuse, without it and with equal regions log R."""
    same = TEXT[:1].expand(7, 5)
    assert _loss(text=same, threshold=0.95)["contrast"].item() == pytest.approx(0.0, abs=1e-12)
    assert _loss(text=same, labels=torch.zeros(7).long())["contrast"].item() == pytest.approx(0.0, abs=1e-12)
    assert _loss(REGION[:1].expand(7, 5), same)["contrast"].item() == pytest.approx(math.log(7), abs=1e-12)


def test_the_filter_is_symmetric_and_spares_the_diagonal():
    texts = torch.cat([TEXT, TEXT[:3] + 0.05 * unit(3, 5, seed=9)])
    found = same_text(texts, None, 0.95)
    assert torch.equal(found, found.T)
    assert not found.diagonal().any()
    rows = texts / texts.norm(dim=1, keepdim=True)
    assert torch.equal(found, ((rows @ rows.T) >= 0.95) & ~torch.eye(10, dtype=torch.bool))
    assert found.sum() >= 6
    both = same_text(TEXT, LABELS, None)
    assert both.sum() == 3 * 2 + 2 * 1


def test_right_boxes_cost_nothing():
    assert _loss(boxes=TRUE)["grounding"].item() == pytest.approx(0.0, abs=1e-12)


def test_no_region_gives_zero_with_a_graph():
    region = torch.zeros(0, 5, requires_grad=True)
    found = _loss(region, torch.zeros(0, 5), boxes=torch.zeros(0, 4), true=torch.zeros(0, 4))
    assert {n: v.item() for n, v in found.items()} == {"contrast": 0.0, "grounding": 0.0}
    sum(found.values()).backward()
    assert torch.equal(region.grad, torch.zeros(0, 5))


def test_safe_numbers():
    assert_safe(lambda s, r, t: cloc(r, t, s, BOXES.to(r), TRUE.to(r), labels=LABELS, grounding=0.0), REGION, TEXT)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": TEXT[:5]}, r"text must have the shape \(7, 5\). Got \(5, 5\)"),
        ({"boxes": BOXES[:, :3]}, r"predicted must have the shape \(7, 4\)"),
        ({"labels": LABELS[:5]}, r"labels must have the shape \(7\)"),
        ({"threshold": 1.5}, "threshold must lie in"),
        ({"grounding": -1.0}, "grounding must lie in"),
        ({"contrast": -1.0}, "contrast must lie in"),
    ],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(ClipworksError, match=says):
        _loss(**change)
