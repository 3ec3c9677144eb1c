"""Sigmoid loss: numpy, closed forms, blocks, local rows, and what is refused."""

import math

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.sigmoid import sigmoid

from .oracle import assert_gradient, assert_safe, pair, softplus


def _oracle(image, text, scale, bias):
    logits = scale * np.asarray(image) @ np.asarray(text).T + bias
    sign = 2 * np.eye(len(logits)) - 1
    return softplus(-sign * logits).sum() / len(logits)


@pytest.mark.parametrize(("n", "scale", "bias"), [(1, 10.0, -10.0), (6, 10.0, -10.0), (33, 100.0, -2.71)])
def test_against_numpy(n, scale, bias):
    image, text = pair(n)
    assert sigmoid(image, text, scale, bias).item() == pytest.approx(_oracle(image, text, scale, bias), rel=1e-12)


def test_right_angles_have_a_closed_form():
    """All similarities 0 and the bias at its start: (B = 4) softplus(10) + 3 softplus(-10)."""
    image, text = torch.eye(8, dtype=torch.float64)[:4], torch.eye(8, dtype=torch.float64)[4:]
    value = sigmoid(image, text, 10.0).item()
    assert value == pytest.approx(10.00018160, abs=1e-8)
    assert value == pytest.approx(float(softplus(10) + 3 * softplus(-10)), abs=1e-12)


def test_without_a_matrix_of_labels():
    """softplus(-x) - softplus(x) = -x, so the positives enter by their sum alone."""
    image, text = pair(7)
    logits = 10.0 * (image @ text.T).numpy() - 10.0
    expected = (softplus(logits).sum() - np.trace(logits)) / 7
    assert sigmoid(image, text, 10.0).item() == pytest.approx(expected, abs=1e-12)


def test_gradient_against_differences():
    image, text = pair()
    for chunk in (None, 4):
        assert_gradient(lambda i, t, s, c, chunk=chunk: sigmoid(i, t, s, c, chunk=chunk), image, text,
                       torch.tensor(3.0), torch.tensor(-2.0))  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_blocks_of_rows_are_the_whole(chunk):
    inputs = [x.requires_grad_() for x in (*pair(8), torch.tensor(12.0).double(), torch.tensor(-5.0).double())]
    whole = sigmoid(*inputs)
    cut = sigmoid(*inputs, chunk=chunk)
    assert cut.item() == pytest.approx(whole.item(), abs=1e-12)
    for got, wanted in zip(torch.autograd.grad(cut, inputs), torch.autograd.grad(whole, inputs), strict=True):
        assert torch.allclose(got, wanted, atol=1e-12, rtol=0)


def test_blocks_take_less_memory():
    """What the graph keeps: without blocks matrices of n x n, with them rows alone."""
    image, text = (x.requires_grad_() for x in pair(64))
    largest = {}
    for chunk in (None, 4):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            sigmoid(image, text, 10.0, chunk=chunk)
        largest[chunk] = max(kept, default=0)
    assert largest[None] >= 64 * 64
    assert largest[4] <= 64 * 5


@pytest.mark.parametrize("chunk", [None, 3])
def test_mean_over_local_rows_is_the_whole(chunk):
    inputs = [x.requires_grad_() for x in (*pair(8), torch.tensor(12.0).double(), torch.tensor(-5.0).double())]
    image, text, scale, bias = inputs
    whole = sigmoid(*inputs)
    values = [
        sigmoid(image[k : k + 4], text[k : k + 4], scale, bias, all_image=image, all_text=text, offset=k, chunk=chunk)
        for k in (0, 4)
    ]
    mean = torch.stack(values).mean()
    assert mean.item() == pytest.approx(whole.item(), abs=1e-12)
    for got, wanted in zip(torch.autograd.grad(mean, inputs), torch.autograd.grad(whole, inputs), strict=True):
        assert torch.allclose(got, wanted, atol=1e-12, rtol=0)


def test_sides_and_order_of_pairs_do_not_matter():
    image, text = pair(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    value = sigmoid(image, text, 10.0).item()
    assert sigmoid(text, image, 10.0).item() == pytest.approx(value, abs=1e-12)
    assert sigmoid(image[order], text[order], 10.0).item() == pytest.approx(value, abs=1e-12)
    assert sigmoid(image, text[order], 10.0).item() > value + 0.1


def test_safe_numbers():
    assert_safe(lambda scale, i, t: sigmoid(i, t, scale), *pair())
    assert_safe(lambda scale, i, t: sigmoid(i, t, scale, chunk=2), *pair())
    # right and very sure: softplus(z) - z would have lost it all in float32
    assert 0 < sigmoid(torch.ones(1, 1), torch.ones(1, 1), 60.0, -10.0).item() < math.exp(-49)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": torch.ones(4, 2)}, "text must have the shape of image"),
        ({"chunk": 0}, "chunk must lie in"),
        ({"all_text": torch.ones(8, 3)}, "given together"),
        ({"all_image": torch.ones(8, 3), "all_text": torch.ones(8, 3), "offset": -1}, "offset must lie in"),
    ],
)
def test_mistakes_are_named(change, says):
    given = {"image": torch.ones(4, 3), "text": torch.ones(4, 3), "scale": 1.0, **change}
    with pytest.raises(ClipworksError, match=says):
        sigmoid(**given)
