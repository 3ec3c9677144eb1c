"""Boxes: conversions, the generalised intersection over union against cells that are counted."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.regions import centres, check_regions, corners, giou, nothing


def boxes(n, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 12, (n, 2))
    return torch.tensor(np.concatenate([low, low + rng.integers(1, 9, (n, 2))], 1), dtype=torch.float64)


def counted(a, b):
    """Whole-numbered boxes as sets of cells."""
    cells = [{(x, y) for x in range(int(l), int(r)) for y in range(int(t), int(u))} for l, t, r, u in (a, b)]  # noqa: E741
    inside, union = len(cells[0] & cells[1]), len(cells[0] | cells[1])
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inside / union - (around - union) / around


def test_against_counted_cells():
    one, other = boxes(30), boxes(30, 1)
    expected = [counted(a, b) for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    assert np.allclose(giou(one, other), expected, atol=1e-12)
    assert torch.equal(giou(one[:, None], other[None]).diagonal(), giou(one, other))


def test_bounds_symmetry_and_limits():
    one, other = boxes(60), boxes(60, 1)
    values = giou(one, other)
    assert ((values >= -1) & (values <= 1)).all()
    assert torch.equal(values, giou(other, one))
    assert torch.allclose(giou(one, one), torch.ones(60, dtype=torch.float64))
    inner = centres(one) * torch.tensor([1, 1, 0.5, 0.25])
    assert torch.allclose(giou(corners(inner), one), torch.full((60,), 0.125, dtype=torch.float64)), "nested: IoU"
    apart = one + torch.tensor([40.0, 0, 40, 0])
    assert (giou(one, apart) < 0).all()


def test_a_box_of_no_area_gives_no_nan():
    empty = torch.tensor([[0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    value = giou(empty, empty.detach())
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(empty.grad).all()


def test_forms_there_and_back():
    one = boxes(20) / 20
    assert torch.allclose(corners(centres(one)), one, atol=1e-12)
    assert torch.allclose(centres(corners(one)), one, atol=1e-12)
    assert corners(torch.tensor([0.5, 0.5, 0.2, 0.4])).tolist() == pytest.approx([0.4, 0.3, 0.6, 0.7])


def test_nothing_has_a_graph_and_shapes_are_checked():
    rows = torch.ones(0, 3, requires_grad=True)
    value = nothing(rows, torch.ones(2, 2))
    assert value.item() == 0
    value.backward()
    assert rows.grad is not None
    check_regions({"a": (None, 3)}, a=rows)
    with pytest.raises(ClipworksError, match=r"a must have the shape \(any, 4\). Got \(0, 3\)"):
        check_regions({"a": (None, 4)}, a=rows)
