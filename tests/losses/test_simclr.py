"""NT-Xent: numpy, the closed form of identical views, local rows, and what is refused."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.simclr import simclr

from .oracle import assert_gradient, assert_safe, log_softmax, pair

A, B = pair(6, 5)


def _oracle(a, b, tau):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.asarray(a), np.asarray(b)))

    def one(q, k):
        within = q @ q.T / tau
        np.fill_diagonal(within, -1e9)
        return -np.mean(np.diag(log_softmax(np.concatenate([q @ k.T / tau, within], 1))))

    return (one(a, b) + one(b, a)) / 2


@pytest.mark.parametrize(("n", "tau"), [(1, 0.1), (6, 0.1), (17, 0.5)])
def test_against_numpy(n, tau):
    a, b = pair(n)
    lengths = torch.linspace(0.5, 4.0, n)[:, None]
    assert simclr(a * lengths, b, tau).item() == pytest.approx(_oracle(a, b, tau), abs=1e-7)
    assert simclr(a, b, tau).item() == pytest.approx(_oracle(a, b, tau), abs=1e-12)


def test_identical_views_have_a_closed_form():
    similarity = (A @ A.T).numpy()
    expected = np.mean([np.log1p(2 * sum(np.exp((similarity[i, j] - 1) / 0.1) for j in range(6) if j != i))
                        for i in range(6)])  # fmt: skip
    assert simclr(A, A).item() == pytest.approx(expected, abs=1e-12)


def test_gradient_against_differences():
    assert_gradient(lambda a, b: simclr(3 * a, b, 0.5), A, B)


def test_views_and_order_do_not_matter():
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    assert simclr(B, A).item() == pytest.approx(simclr(A, B).item(), abs=1e-13)
    assert simclr(A[order], B[order]).item() == pytest.approx(simclr(A, B).item(), abs=1e-13)


def test_mean_over_local_rows_is_the_whole():
    a, b = (x.requires_grad_() for x in pair(8))
    whole = simclr(a, b)
    parts = [simclr(a[k : k + 2], b[k : k + 2], all_first=a, all_second=b, offset=k) for k in (0, 2, 4, 6)]
    mean = torch.stack(parts).mean()
    assert mean.item() == pytest.approx(whole.item(), abs=1e-13)
    for got, wanted in zip(torch.autograd.grad(mean, (a, b)), torch.autograd.grad(whole, (a, b)), strict=True):
        assert torch.allclose(got, wanted, atol=1e-13, rtol=0)


def test_safe_numbers():
    assert_safe(lambda scale, a, b: simclr(a, b, 1 / scale), A, B, scales=(1.0, 100.0, 1e4))
    a = torch.zeros(3, 4, requires_grad=True)
    simclr(a, torch.ones(3, 4)).backward()
    assert torch.isfinite(a.grad).all()


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match=r"temperature must be above 0. Got 0"):
        simclr(A, B, 0.0)
    with pytest.raises(ClipworksError, match="second must have the shape of first"):
        simclr(A, B[:5])
    with pytest.raises(ClipworksError, match="all_first and all_second must be given together"):
        simclr(A, B, all_first=A)
