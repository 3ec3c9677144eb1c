"""CLOOB: numpy, limits of the retrieval, InfoLOOB against InfoNCE, and what is refused."""

import math

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.cloob import cloob, infoloob, retrieve
from clipworks.losses.infonce import infonce

from .oracle import assert_gradient, assert_safe, log_softmax, pair, softmax, softplus, unit

X, Y = pair(6, 5)


def _oracle(x, y, scale, beta):
    def h(r, z):
        found = softmax(beta * r @ z.T) @ z
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def loob(p, q):
        k = scale * p @ q.T
        rows = range(len(k))
        return np.mean([-k[i, i] + np.log(sum(np.exp(k[i, j]) for j in rows if j != i)) for i in rows])

    x, y = np.asarray(x), np.asarray(y)
    return (loob(h(x, x), h(y, x)) + loob(h(y, y), h(x, y))) / scale


@pytest.mark.parametrize(("n", "scale", "beta"), [(2, 30.0, 8.0), (6, 30.0, 8.0), (17, 14.3, 14.3)])
def test_against_numpy(n, scale, beta):
    x, y = pair(n)
    assert cloob(x, y, scale, beta=beta).item() == pytest.approx(_oracle(x, y, scale, beta), abs=1e-12)


def test_gradient_against_differences():
    """Through states, stored rows and retrieval weights alike."""
    assert_gradient(lambda x, y, s: cloob(x, y, s), X, Y, torch.tensor(5.0))


def test_beta_of_0_retrieves_the_mean_and_a_large_one_the_nearest():
    for state in (X, Y):
        expected = (X.mean(0) / X.mean(0).norm()).expand(6, 5)
        assert torch.allclose(retrieve(state, X, 0.0), expected, atol=1e-14)
    assert torch.allclose(retrieve(X, X, 1e6), X, atol=1e-12)
    assert torch.allclose(retrieve(Y, X, 1e6), X[(Y @ X.T).argmax(1)], atol=1e-9)
    assert cloob(X, Y, 30.0, beta=0.0).item() == pytest.approx(2 * math.log(5) / 30, abs=1e-12)
    assert 2 * math.log(5) / 30 == pytest.approx(0.1072959, abs=1e-7)


def test_retrievals_are_unit_rows_that_follow_the_order_of_the_batch():
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    for state, stored in ((X, X), (Y, X), (X, Y), (Y, Y)):
        found = retrieve(state, stored, 8.0)
        assert found.shape == (6, 5)
        assert torch.allclose(found.norm(dim=1), torch.ones(6, dtype=torch.float64))
        assert torch.allclose(retrieve(state[order], stored[order], 8.0), found[order], atol=1e-14)
    assert cloob(X[order], Y[order]).item() == pytest.approx(cloob(X, Y).item(), abs=1e-13)


def test_sides_may_be_swapped():
    assert cloob(Y, X).item() == pytest.approx(cloob(X, Y).item(), abs=1e-13)


def test_infonce_is_softplus_of_infoloob_row_by_row():
    logits = 9.0 * (X @ Y.T)
    rows = torch.stack([torch.cat([row[:i], row[i + 1 :]]).logsumexp(0) - row[i] for i, row in enumerate(logits)])
    nce = -np.diag(log_softmax(logits.numpy()))
    assert np.allclose(softplus(rows.numpy()), nce, atol=1e-14)
    assert infoloob(X, Y, 9.0).item() == pytest.approx(rows.mean().item(), abs=1e-14)


def test_its_gradient_is_never_the_smaller_one():
    """dNCE_i = sigmoid(l_i) dLOOB_i: the well matched rows are those that still pull."""
    k = (9.0 * (X @ Y.T)).requires_grad_()
    off = k.masked_fill(torch.eye(6, dtype=torch.bool), -math.inf).logsumexp(1) - k.diagonal()
    (loob,) = torch.autograd.grad(off.sum(), k)
    (nce,) = torch.autograd.grad(torch.nn.functional.cross_entropy(k, torch.arange(6), reduction="sum"), k)
    assert torch.allclose(nce, torch.sigmoid(off)[:, None] * loob, atol=1e-12)


def test_without_retrieval_and_with_the_positive_it_is_clip():
    def with_positive(p, q):
        k = 30.0 * p @ q.T
        off = k.masked_fill(torch.eye(6, dtype=torch.bool), -math.inf).logsumexp(1) - k.diagonal()
        return softplus(off.numpy()).mean()

    # the second term has texts as queries, the first images
    got = (with_positive(X, Y) + with_positive(Y, X)) / 30
    assert got == pytest.approx(2 * infonce(X, Y, 30.0).item() / 30, abs=1e-12)


def test_it_may_be_negative():
    rows = unit(6, 40)
    assert cloob(rows, rows, 30.0).item() < 0


def test_it_does_not_hang_on_the_strong_cue():
    """A strong and a weak group of features that occur together: less of the variance lies in one direction."""

    def share(loss, seed):
        rng = np.random.default_rng(seed)
        strong, weak = rng.normal(size=(8, 12)), rng.normal(size=(8, 12))
        shown = np.c_[3 * strong[rng.integers(0, 8, 256)], weak[rng.integers(0, 8, 256)]]
        sides = [torch.tensor(shown + 0.3 * rng.normal(size=shown.shape), dtype=torch.float32) for _ in range(2)]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoders = [torch.nn.Linear(24, 16) for _ in range(2)]
        optimizer = torch.optim.Adam([p for e in encoders for p in e.parameters()], lr=5e-3)

        def encode(rows):
            return [torch.nn.functional.normalize(e(x[rows]), dim=1) for e, x in zip(encoders, sides, strict=True)]

        for _ in range(200):
            optimizer.zero_grad()
            loss(*encode(torch.tensor(rng.permutation(256)[:64]))).backward()
            optimizer.step()
        image = encode(torch.arange(256))[0].detach()
        variance = torch.linalg.svdvals(image - image.mean(0)) ** 2
        return (variance[0] / variance.sum()).item()

    for seed in (0, 1, 2):
        assert share(cloob, seed) < share(lambda x, y: infonce(x, y, 30.0), seed)


def test_safe_numbers():
    assert_safe(lambda scale, x, y: cloob(x, y, scale), X, Y, scales=(1.0, 100.0, 1e4))
    assert_safe(lambda scale, x, y: cloob(x, y, 30.0, beta=scale), X, Y)
    with pytest.raises(ClipworksError, match=r"at least 2 rows. Got 1"):
        cloob(X[:1], Y[:1])
    with pytest.raises(ClipworksError, match="beta must lie in"):
        cloob(X, Y, beta=-1.0)
