"""GRAIN: the matching against all permutations, both region terms against numpy, and limits."""

import itertools
import math

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.grain import grain, match
from clipworks.losses.infonce import infonce
from clipworks.losses.regions import corners, giou

from .oracle import assert_gradient, assert_safe, log_softmax, pair, unit

N, Q, G = 3, 4, 3
IMAGE, TEXT = pair(N, 5)
REGION, DESCRIPTION = unit(N, Q, 5, seed=3), unit(N, G, 5, seed=4)
RNG = np.random.default_rng(2)


def drawn(*shape):
    return torch.tensor(np.concatenate([RNG.uniform(0.3, 0.7, (*shape, 2)), RNG.uniform(0.1, 0.5, (*shape, 2))], -1))


PREDICTED, TARGET = drawn(N, Q), drawn(N, G)
LABELS = torch.tensor([[5, 7, -1], [-1, -1, -1], [9, 5, 2]])


def _loss(image=IMAGE, text=TEXT, scale=4.0, region=REGION, predicted=PREDICTED, description=DESCRIPTION,
          target=TARGET, labels=LABELS, **options):  # fmt: skip
    return grain(image, text, scale, region, predicted, description, target, labels, **options)


def _distance(p, t):
    return np.abs(p - t).sum() + 1 - giou(corners(torch.tensor(p)), corners(torch.tensor(t))).item()


def _best(predicted, target):
    """The permutation of least cost, by trying all."""
    cost = lambda p, t: 5 * np.abs(p - t).sum() - 2 * (np.abs(p - t).sum() + 1 - _distance(p, t))  # noqa: E731
    tries = itertools.permutations(range(len(predicted)), len(target))
    return min(tries, key=lambda o: sum(cost(predicted[q], t) for q, t in zip(o, target, strict=True)))


def test_against_numpy():
    found = _loss(boxes=0.4, descriptions=0.6)
    pairs = []
    for n in range(N):
        here = [g for g in range(G) if LABELS[n, g] >= 0]
        order = _best(PREDICTED[n].numpy(), TARGET[n, here].numpy()) if here else ()
        pairs += [(n, q, g) for q, g in zip(order, here, strict=True)]
    apart = np.mean([_distance(PREDICTED[n, q].numpy(), TARGET[n, g].numpy()) for n, q, g in pairs])
    assert found["boxes"].item() == pytest.approx(0.4 * apart, abs=1e-9)
    known = [(DESCRIPTION[n, g], int(LABELS[n, g])) for n in range(N) for g in range(G) if LABELS[n, g] >= 0]
    total = 0.0
    for n, q, g in pairs:
        row = log_softmax(np.array([4.0 * float(REGION[n, q] @ d) for d, _ in known]))
        total -= np.mean([v for v, (_, label) in zip(row, known, strict=True) if label == LABELS[n, g]])
    assert found["descriptions"].item() == pytest.approx(0.6 * total / len(pairs), abs=1e-9)
    assert found["infonce"].item() == pytest.approx(infonce(IMAGE, TEXT, 4.0).item(), abs=1e-14)


def test_gradient_against_differences():
    assert_gradient(lambda i, t, s, r, p, d: _loss(i, t, s, r, p, d), IMAGE, TEXT, torch.tensor(3.0), REGION, PREDICTED,
                    DESCRIPTION)  # fmt: skip


def test_the_matching_recovers_an_order():
    order = torch.tensor([2, 0, 3, 1])
    target = PREDICTED[:, order]
    sample, query, truth = match(PREDICTED, target, torch.ones(N, 4, dtype=torch.bool))
    assert torch.equal(order[truth], query)
    assert len(sample) == N * 4
    labels = torch.arange(12).reshape(3, 4)
    found = _loss(description=unit(N, 4, 5, seed=8), target=target, labels=labels)
    assert found["boxes"].item() == pytest.approx(0.0, abs=1e-12)


def test_orders_do_not_matter():
    whole = _loss()
    order = torch.tensor([3, 1, 0, 2])
    moved = _loss(region=REGION[:, order], predicted=PREDICTED[:, order])
    turned = torch.tensor([2, 0, 1])
    other = _loss(description=DESCRIPTION[:, turned], target=TARGET[:, turned], labels=LABELS[:, turned])
    for name, value in whole.items():
        assert moved[name].item() == pytest.approx(value.item(), abs=1e-12)
        assert other[name].item() == pytest.approx(value.item(), abs=1e-12)


def test_unmatched_queries_and_what_fills_up_get_no_gradient():
    leaves = [x.clone().requires_grad_() for x in (REGION, PREDICTED, DESCRIPTION)]
    found = _loss(region=leaves[0], predicted=leaves[1], description=leaves[2])
    (found["boxes"] + found["descriptions"]).backward()
    sample, query, _ = match(PREDICTED, TARGET, LABELS >= 0)
    matched = torch.zeros(N, Q, dtype=torch.bool)
    matched[sample, query] = True
    assert matched.sum() == 5
    for leaf in leaves[:2]:
        assert (leaf.grad[~matched] == 0).all()
        assert (leaf.grad[matched].abs().sum(-1) > 0).all()
    assert (leaves[2].grad[LABELS < 0] == 0).all()


def test_no_region_is_plain_contrast():
    region = REGION.clone().requires_grad_()
    found = _loss(region=region, labels=torch.full((N, G), -1))
    assert found["boxes"].item() == found["descriptions"].item() == 0
    sum(found.values()).backward()
    assert (region.grad == 0).all()
    none = _loss(description=DESCRIPTION[:, :0], target=TARGET[:, :0], labels=LABELS[:, :0])
    assert sum(none.values()).item() == pytest.approx(infonce(IMAGE, TEXT, 4.0).item(), abs=1e-14)


def test_equal_similarities_give_log_k_and_twins_a_floor():
    flat = REGION[:1, :1].expand(N, Q, 5)
    labels = torch.arange(9).reshape(3, 3)
    found = _loss(region=flat, description=DESCRIPTION[:1, :1].expand(N, G, 5), labels=labels)
    assert found["descriptions"].item() == pytest.approx(math.log(9), abs=1e-12)
    # the same description in all three images, with labels that hide it: log 3; said by the labels: the same value,
    # but as the least that can be reached
    far = torch.eye(3, dtype=torch.float64)[None].expand(3, 3, 3)
    boxes = drawn(1, 3).expand(3, 3, 4)
    pair_ = torch.eye(3, dtype=torch.float64)
    for labels in (torch.arange(9).reshape(3, 3), torch.arange(3).expand(3, 3)):
        found = grain(pair_, pair_, 1e3, far, boxes, far, boxes, labels)
        assert found["descriptions"].item() == pytest.approx(math.log(3), abs=1e-6)


def test_twins_said_by_labels_are_not_pushed_away():
    region = DESCRIPTION[:, :1].clone().requires_grad_()
    same = DESCRIPTION[:1, :1].expand(N, 1, 5)
    box = drawn(N, 1)
    found = grain(IMAGE, TEXT, 4.0, region, box, same, box, torch.zeros(N, 1).long())
    assert torch.autograd.grad(found["descriptions"], region)[0].abs().max() < 1e-12


def test_safe_numbers():
    def loss(scale, region, description):
        fixed = [x.to(region) for x in (IMAGE.bfloat16(), TEXT.bfloat16())]
        return _loss(*fixed, scale, region, PREDICTED.to(region), description, TARGET.to(region), boxes=0.0)

    assert_safe(loss, REGION, DESCRIPTION)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"predicted": PREDICTED[:, :2]}, r"predicted must have the shape \(3, 4, 4\)"),
        ({"target": TARGET[:, :2]}, r"target must have the shape \(3, 3, 4\)"),
        ({"labels": LABELS[:2]}, r"labels must have the shape \(3, 3\)"),
        ({"region": REGION[:, :2], "predicted": PREDICTED[:, :2]}, r"regions per image must lie in \[0, 2\]. Got 3"),
        ({"boxes": -1.0}, "boxes must lie in"),
        ({"descriptions": -1.0}, "descriptions must lie in"),
    ],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(ClipworksError, match=says):
        _loss(**change)
