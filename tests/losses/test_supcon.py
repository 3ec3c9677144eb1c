"""SupCon: loops, NT-Xent as its special case, classes of one, and what is refused."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.simclr import simclr
from clipworks.losses.supcon import supcon

from .oracle import assert_gradient, assert_safe, pair

A, B = pair(6, 5)
LABELS = torch.tensor([0, 0, 1, 1, 1, 2])


def _oracle(x, labels, tau):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    terms = []
    for i in range(len(x)):
        near = [p for p in range(len(x)) if p != i and labels[p] == labels[i]]
        whole = sum(np.exp(x[i] @ x[a] / tau) for a in range(len(x)) if a != i)
        if near:
            terms.append(-np.mean([np.log(np.exp(x[i] @ x[p] / tau) / whole) for p in near]))
    return np.mean(terms)


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_against_loops(tau):
    lengths = torch.linspace(0.5, 4.0, 6)[:, None]
    assert supcon(A * lengths, LABELS, tau).item() == pytest.approx(_oracle(A.numpy(), LABELS.numpy(), tau), abs=1e-9)


def test_two_views_of_every_sample_are_nt_xent():
    both, labels = torch.cat([A, B]), torch.arange(6).repeat(2)
    assert supcon(both, labels, 0.1).item() == pytest.approx(simclr(A, B, 0.1).item(), abs=1e-12)


def test_names_of_classes_do_not_matter():
    renamed = torch.tensor([7, 7, -3, -3, -3, 0])
    assert supcon(A, renamed).item() == pytest.approx(supcon(A, LABELS).item(), abs=1e-14)


def test_a_class_of_one_is_a_negative_and_nothing_else():
    with_single, without = supcon(A, LABELS), supcon(A[:5], LABELS[:5])
    assert torch.isfinite(with_single)
    assert with_single > without  # one more wrong answer
    alone = A.clone().requires_grad_()
    loss = supcon(alone, torch.arange(6))
    loss.backward()
    assert loss.item() == 0
    assert (alone.grad == 0).all()


def test_gradient_against_differences():
    assert_gradient(lambda a, b: supcon(torch.cat([a, b]), LABELS.repeat(2), 0.5), A, B)


def test_safe_numbers():
    assert_safe(lambda scale, a, b: supcon(torch.cat([a, b]), LABELS.repeat(2), 1 / scale), A, B, scales=(1.0, 1e4))


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="labels must be 6 integers"):
        supcon(A, LABELS[:5])
    with pytest.raises(ClipworksError, match="labels must be 6 integers"):
        supcon(A, LABELS.double())
    with pytest.raises(ClipworksError, match="temperature must be above 0"):
        supcon(A, LABELS, 0)
