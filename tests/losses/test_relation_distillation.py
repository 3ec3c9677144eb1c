"""Relation distillation: both forms against numpy, agreement, rotations, widths, several teachers."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.infonce import infonce
from clipworks.losses.relation_distillation import mean_log_softmax, relation_distillation

from .oracle import assert_gradient, assert_safe, log_softmax, pair, softmax, unit

U, W = pair(6, 5)
V, Y = pair(6, 8, seed=7)  # a wider teacher


def _oracle(form, logits, teacher):
    target, found = softmax(teacher), log_softmax(logits)
    return (target * ((np.log(target) - found) if form == "kl" else -found)).sum(1).mean()


@pytest.mark.parametrize("form", ["kl", "ce"])
def test_against_numpy(form):
    logits, teacher = 9.0 * (U @ W.T).numpy(), 20.0 * (V @ Y.T).numpy()
    expected = (_oracle(form, logits, teacher) + _oracle(form, logits.T, teacher.T)) / 2
    assert relation_distillation(U, W, V, Y, 9.0, 20.0, form=form).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("form", ["kl", "ce"])
def test_gradient_against_differences(form):
    assert_gradient(lambda u, w, s: relation_distillation(u, w, V, Y, s, 20.0, form=form), U, W, torch.tensor(4.0))


def test_the_forms_differ_by_the_entropy_of_the_teacher_and_not_in_gradient():
    teacher = 20.0 * (V @ Y.T).numpy()
    entropy = np.mean([-(softmax(t) * log_softmax(t)).sum(1).mean() for t in (teacher, teacher.T)])
    found = {}
    for form in ("kl", "ce"):
        u = U.clone().requires_grad_()
        value = relation_distillation(u, W, V, Y, 9.0, 20.0, form=form)
        found[form] = value.item(), torch.autograd.grad(value, u)[0]
    assert found["ce"][0] - found["kl"][0] == pytest.approx(entropy, abs=1e-13)
    assert torch.allclose(found["ce"][1], found["kl"][1], atol=1e-14)


def test_agreement_costs_nothing_and_pulls_nowhere():
    u = U.clone().requires_grad_()
    value = relation_distillation(u, W, U, W, 9.0, 9.0)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-15)
    assert u.grad.abs().max() < 1e-15


def test_a_teacher_that_is_sure_makes_it_infonce():
    sure = torch.eye(6)
    value = relation_distillation(U, W, sure, sure, 9.0, 1e4, form="ce")
    assert value.item() == pytest.approx(infonce(U, W, 9.0).item(), abs=1e-12)


def test_each_space_may_be_rotated():
    turn = lambda n: torch.linalg.qr(unit(n, n, seed=3))[0]  # noqa: E731
    got = relation_distillation(U @ turn(5), W @ turn(5), V @ turn(8), Y @ turn(8), 9.0, 20.0)
    assert got.item() == pytest.approx(relation_distillation(U, W, V, Y, 9.0, 20.0).item(), abs=1e-13)


def test_order_of_pairs_does_not_matter():
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    got = relation_distillation(U[order], W[order], V[order], Y[order], 9.0, 20.0)
    assert got.item() == pytest.approx(relation_distillation(U, W, V, Y, 9.0, 20.0).item(), abs=1e-13)


def test_no_gradient_reaches_the_teacher():
    v, y = V.clone().requires_grad_(), Y.clone().requires_grad_()
    u = U.clone().requires_grad_()
    relation_distillation(u, W, v, y, 9.0, 20.0).backward()
    assert v.grad is None
    assert y.grad is None
    assert u.grad.abs().sum() > 0


def test_probabilities_of_several_teachers_are_averaged():
    v2, y2 = pair(6, 3, seed=11)
    one, two = 20.0 * V @ Y.T, 20.0 * v2 @ y2.T
    mean = mean_log_softmax([one, two]).exp()
    assert torch.allclose(mean.sum(1), torch.ones(6, dtype=torch.float64))
    assert torch.allclose(mean, (one.softmax(1) + two.softmax(1)) / 2)
    assert not torch.allclose(mean, ((one + two) / 2).softmax(1), atol=1e-2)
    entropy = lambda p: -(p * p.log()).sum(1).mean()  # noqa: E731
    assert entropy(mean) >= (entropy(one.softmax(1)) + entropy(two.softmax(1))) / 2
    logits = 9.0 * (U @ W.T).numpy()
    expected = 0.0
    for found, a, b in ((logits, one, two), (logits.T, one.T, two.T)):
        target = (softmax(a.numpy()) + softmax(b.numpy())) / 2
        expected -= (target * log_softmax(found)).sum(1).mean() / 2
    got = relation_distillation(U, W, [V, v2], [Y, y2], 9.0, 20.0, form="ce")
    assert got.item() == pytest.approx(expected, abs=1e-12)
    assert relation_distillation(U, W, [V], [Y], 9.0, 20.0) == relation_distillation(U, W, V, Y, 9.0, 20.0)


def test_safe_numbers():
    assert_safe(lambda scale, u, w, v, y: relation_distillation(u, w, v, y, scale, scale), U, W, V, Y)
    assert relation_distillation(U[:1], W[:1], V[:1], Y[:1], 100.0, 100.0).item() == 0.0


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="Did you mean 'kl'"):
        relation_distillation(U, W, V, Y, 1.0, 1.0, form="kll")
    with pytest.raises(ClipworksError, match=r"rows of image, 6. Got 5"):
        relation_distillation(U, W, V[:5], Y[:5], 1.0, 1.0)
    with pytest.raises(ClipworksError, match=r"as many teachers. Got 2 and 1"):
        relation_distillation(U, W, [V, V], [Y], 1.0, 1.0)
