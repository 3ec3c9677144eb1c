"""SwALIP: balanced codes and the swapped prediction against numpy, their limits, and what is refused."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.swalip import sinkhorn, swalip

from .oracle import cross, unit

PROTOTYPES = unit(4, 5, seed=9)
IMAGE, TEXT = unit(12, 5) @ PROTOTYPES.T, unit(12, 5, seed=1) @ PROTOTYPES.T


def _codes(scores, epsilon, rounds):
    """The textbook loop: prototypes to 1 / K each, samples to 1 / n each, then rows to 1."""
    q = np.exp(np.asarray(scores) / epsilon)
    q /= q.sum()
    for _ in range(rounds):
        q = q / q.sum(0, keepdims=True) / q.shape[1]
        q = q / q.sum(1, keepdims=True) / q.shape[0]
    return q * q.shape[0]


@pytest.mark.parametrize(("epsilon", "rounds"), [(0.05, 3), (0.5, 1), (0.05, 50)])
def test_codes_against_numpy(epsilon, rounds):
    found = sinkhorn(IMAGE, epsilon, rounds).numpy()
    assert np.allclose(found, _codes(IMAGE, epsilon, rounds), atol=1e-12)
    assert np.allclose(found.sum(1), 1, atol=1e-14)


def test_prototypes_are_used_alike_and_more_so_with_every_round():
    uneven = [np.abs(sinkhorn(IMAGE, 0.05, rounds).sum(0).numpy() - 3).max() for rounds in (1, 3, 30)]
    assert uneven[0] > uneven[1] > uneven[2]
    assert uneven[1] < 1.5


def test_against_numpy():
    terms = [cross(np.asarray(guess) / 0.1, _codes(said, 0.05, 3)) for guess, said in ((IMAGE, TEXT), (TEXT, IMAGE))]
    assert swalip(IMAGE, TEXT).item() == pytest.approx(0.2 * sum(terms) / 2, abs=1e-12)


def test_codes_carry_no_gradient():
    image, text = (x.clone().requires_grad_() for x in (IMAGE, TEXT))
    (slope,) = torch.autograd.grad(swalip(image, text, weight=1.0), image)
    expected = ((IMAGE / 0.1).softmax(1) - torch.tensor(_codes(TEXT, 0.05, 3))) / 0.1 / 12 / 2
    assert torch.allclose(slope, expected, atol=1e-12)


def test_sides_that_agree_on_even_clusters_cost_little():
    scores = torch.eye(4).repeat(3, 1)
    assert swalip(scores, scores, weight=1.0, temperature=0.01).item() == pytest.approx(0.0, abs=1e-5)
    other = torch.eye(4).roll(1, 0).repeat(3, 1)
    assert swalip(scores, other, weight=1.0, temperature=0.1).item() > 5


def test_half_precision_and_large_similarities_stay_finite():
    for scores in (IMAGE.bfloat16(), 1e4 * IMAGE):
        leaf = scores.clone().requires_grad_()
        value = swalip(leaf, leaf.detach().flip(0))
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"temperature": 0.0}, {"epsilon": 0.0}, {"rounds": 0}])
def test_mistakes_are_named(wrong):
    with pytest.raises(ClipworksError, match=f"{next(iter(wrong))} must"):
        swalip(IMAGE, TEXT, **wrong)
