"""The losses of mask decoders against numpy loops, the assignment against all permutations, points against a resize."""

import itertools

import numpy as np
import pytest
import torch

from clipworks.segment.mask_decoder import Proposals
from clipworks.segment.mask_losses import (
    MaskCriterion,
    at_points,
    dice_costs,
    dice_loss,
    draw_points,
    pixel_costs,
    pixel_loss,
    proposal_losses,
    segments,
    soft_iou,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def plain_pixels(x, y, gamma=0.0, alpha=None):
    """The focal loss as it is published, of probabilities."""
    total = 0.0
    for logit, truth in zip(x, y, strict=True):
        p = sigmoid(logit) if truth else 1 - sigmoid(logit)
        weight = 1.0 if alpha is None else alpha if truth else 1 - alpha
        total += -weight * (1 - p) ** gamma * np.log(p)
    return total / len(x)


def plain_dice(x, y):
    p = sigmoid(x)
    return 1 - (2 * np.sum(p * y) + 1) / (np.sum(p) + np.sum(y) + 1)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(("gamma", "alpha"), [(0.0, None), (2.0, 0.25), (1.5, None)])
def test_pixels_and_dice_against_numpy(gamma, alpha):
    x, y = drawn(3, 20), (drawn(3, 20, seed=1) > 0).astype(float)
    a, b = torch.tensor(x), torch.tensor(y)
    expected = [plain_pixels(p, q, gamma, alpha) for p, q in zip(x, y, strict=True)]
    np.testing.assert_allclose(pixel_loss(a, b, gamma, alpha), expected, rtol=1e-10)
    np.testing.assert_allclose(dice_loss(a, b), [plain_dice(p, q) for p, q in zip(x, y, strict=True)], rtol=1e-10)
    pairs = [[plain_pixels(p, q, gamma, alpha) for q in y] for p in x]
    np.testing.assert_allclose(pixel_costs(a, b, gamma, alpha), pairs, rtol=1e-10)
    np.testing.assert_allclose(dice_costs(a, b), [[plain_dice(p, q) for q in y] for p in x], rtol=1e-10)


def test_entropy_is_torchs():
    x, y = torch.tensor(drawn(2, 9)), torch.tensor(drawn(2, 9, seed=1)).sigmoid()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none").mean(-1)
    np.testing.assert_allclose(pixel_loss(x, y), expected, rtol=1e-12)


def test_intersection_over_union_of_hard_masks_is_the_usual_one():
    a, b = drawn(4, 30) > 0, drawn(3, 30, seed=1) > 0
    expected = [[(p & q).sum() / (p | q).sum() for q in b] for p in a]
    np.testing.assert_allclose(soft_iou(torch.tensor(a).double(), torch.tensor(b).double()), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_assignment_is_the_cheapest_of_all(seed):
    draw = torch.Generator().manual_seed(seed)
    logits, masks = torch.randn(5, 4, generator=draw), torch.randn(5, 12, generator=draw)
    classes, targets = torch.tensor([0, 2, 1]), (torch.randn(3, 12, generator=draw) > 0).float()
    rows, columns = MaskCriterion().assign(logits, masks, classes, targets)

    def cost(q, m):
        e = np.exp(logits[q].numpy() - logits[q].max().item())
        pair = masks[q].numpy().astype(float), targets[m].numpy()
        return -2 * e[classes[m]] / e.sum() + 5 * plain_pixels(*pair) + 5 * plain_dice(*pair)

    best = min(sum(cost(q, m) for m, q in enumerate(order)) for order in itertools.permutations(range(5), 3))
    assert sorted(columns.tolist()) == [0, 1, 2]
    assert sum(cost(int(q), int(m)) for q, m in zip(rows, columns, strict=True)) == pytest.approx(best, rel=1e-5)


def test_points_are_a_resize():
    maps = torch.tensor(drawn(2, 4, 6))
    whole = torch.nn.functional.interpolate(maps[None], (12, 30), mode="bilinear", align_corners=False)[0]
    points = torch.tensor([0, 29, 31, 200, 359])
    np.testing.assert_allclose(at_points(maps, points, (12, 30)), whole.flatten(1)[:, points], atol=1e-12)


def test_points_are_drawn_among_labelled_pixels():
    labels = torch.full((6, 6), 255)
    labels[2:4, 1:5] = 1
    torch.manual_seed(0)
    every, some = draw_points(labels, None), draw_points(labels, 5)
    assert every.tolist() == [13, 14, 15, 16, 19, 20, 21, 22]
    assert len(set(some.tolist())) == 5
    assert set(some.tolist()) <= set(every.tolist())


def test_segments_of_labels():
    found, pixels = segments(torch.tensor([3, 1, 3, 3]))
    assert found.tolist() == [1, 3]
    assert pixels.tolist() == [[0, 1, 0, 0], [1, 0, 1, 1]]


def answer(sure=20.0):
    """Logits and masks that are the truth of a label map of halves, with a proposal to spare; the map."""
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[:, :, 2:] = 1
    masks = torch.stack([labels[0] == 1, labels[0] == 7, labels[0] == 0]).float()[None] * 2 * sure - sure
    logits = sure * torch.eye(3)[[1, 2, 0]][None]
    return logits, masks, labels


def test_a_right_answer_costs_nothing_and_a_wrong_class_its_share():
    logits, masks, labels = answer()
    found = MaskCriterion(points=None)(logits, masks, labels)
    assert {name: round(float(v), 4) for name, v in found.items()} == {"class": 0, "mask": 0, "dice": 0}
    wrong = logits.clone()
    wrong[0, 1] = logits[0, 0]  # the spare proposal calls itself a class
    cost = MaskCriterion(points=None)(wrong, masks, labels)["class"]
    assert float(cost) == pytest.approx(2 * 0.1 * 20 / 2.1, rel=1e-4)  # weighted mean: weights 1, 1, 0.1


def test_unlabelled_pixels_do_not_count():
    logits, masks, labels = answer(2.0)
    labels[0, 0] = 255
    spoiled = masks.clone()
    spoiled[0, :, 0] *= -5
    criterion = MaskCriterion(points=None)
    a, b = criterion(logits, masks, labels), criterion(logits, spoiled, labels)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_image_without_labels_teaches_that_nothing_is_there():
    logits, masks, labels = answer()
    logits.requires_grad_(), masks.requires_grad_()
    found = MaskCriterion()(logits, masks, torch.full_like(labels, 255))
    assert not found["mask"].any()
    assert not found["dice"].any()
    sum(found.values()).backward()
    assert (logits.grad[0, :, 2] <= 0).all()
    assert not masks.grad.any()


def test_losses_of_all_layers_add_up():
    logits, masks, labels = answer(1.0)
    criterion = MaskCriterion(points=None)
    one = criterion(logits, masks, labels)
    first, second = Proposals(masks, logits), Proposals(masks, logits)
    both = proposal_losses(Proposals(masks, logits, [first, second]), lambda q: q, labels, criterion)
    for name in one:
        assert float(both[name]) == pytest.approx(3 * float(one[name]), rel=1e-6)
