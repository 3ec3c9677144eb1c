"""DeCLIP: content and context in both forms against numpy and torch's own divergence, invariances and limits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipworks.errors import ClipworksError
from clipworks.losses.declip import completed, content_distance, context_distance, declip

from .oracle import assert_gradient, softmax, unit

REGION, TEACHER = unit(5, 4, 6, seed=1), unit(5, 6, seed=2)
CONTEXT, VISION = unit(2, 9, 8, seed=3), unit(2, 9, 7, seed=4)
RELATIONS = VISION @ VISION.transpose(1, 2)
TOKENS = unit(5, 4, 3, seed=5)
INSIDE = TOKENS @ TOKENS.transpose(1, 2)


def _loss(region=REGION, teacher=TEACHER, context=CONTEXT, relations=RELATIONS, **options):
    return declip(region, teacher, context, relations, **options)


def cosines(x):
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x @ x.swapaxes(-1, -2)


def test_the_first_form_against_numpy():
    found = _loss(weight=0.3)
    pooled = REGION.numpy().mean(1)
    cos = [p @ t / np.linalg.norm(p) / np.linalg.norm(t) for p, t in zip(pooled, TEACHER.numpy(), strict=True)]
    assert found["content"].item() == pytest.approx(1 - np.mean(cos), abs=1e-12)
    rows = np.sqrt(((RELATIONS.numpy() - cosines(CONTEXT.numpy())) ** 2).sum(-1))
    assert found["context"].item() == pytest.approx(0.3 * rows.mean(), abs=1e-12)


def test_the_second_form_against_torch():
    found = _loss(form="divergence", region_relations=INSIDE, temperature=0.4, weight=0.3)
    total = 0.0
    for tokens, goal in zip(REGION.numpy(), TEACHER.numpy(), strict=True):
        shares = softmax(np.array([t @ goal / np.linalg.norm(t) for t in tokens]))
        pooled = (shares[:, None] * tokens).sum(0)
        total += 1 - pooled @ goal / np.linalg.norm(pooled)
    logs = (torch.tensor(cosines(REGION.numpy())) / 0.4).log_softmax(-1)
    within = F.kl_div(logs, (INSIDE / 0.4).softmax(-1), reduction="sum") / (5 * 4)
    assert found["content"].item() == pytest.approx(total / 5 + within.item(), abs=1e-12)
    logs = (torch.tensor(cosines(CONTEXT.numpy())) / 0.4).log_softmax(-1)
    apart = F.kl_div(logs, (RELATIONS / 0.4).softmax(-1), reduction="sum") / (2 * 9)
    assert found["context"].item() == pytest.approx(0.3 * apart.item(), abs=1e-12)


@pytest.mark.parametrize("form", ["distance", "divergence"])
def test_gradient_against_differences(form):
    assert_gradient(lambda r, c: _loss(r, context=c, form=form, region_relations=INSIDE), REGION, CONTEXT)


@pytest.mark.parametrize("form", ["distance", "divergence"])
def test_context_is_zero_exactly_where_the_relations_agree(form):
    own = torch.tensor(cosines(CONTEXT.numpy()))
    assert context_distance(CONTEXT, own, form).item() == pytest.approx(0.0, abs=1e-9)
    assert context_distance(CONTEXT, RELATIONS, form).item() > 0.01
    turn = torch.linalg.qr(unit(8, 8, seed=6))[0]
    turned = context_distance(3.7 * CONTEXT @ turn, RELATIONS, form)
    assert turned.item() == pytest.approx(context_distance(CONTEXT, RELATIONS, form).item(), abs=1e-12)


def test_a_row_is_measured_by_its_length():
    """Neither the Frobenius norm nor the mean of squares: rows of differing error tell them apart."""
    goal = torch.tensor(cosines(CONTEXT.numpy()))[:1]
    goal[0, 0, 1:] += 1.0
    value = context_distance(CONTEXT[:1], goal).item()
    assert value == pytest.approx(np.sqrt(8) / 9, abs=1e-9)


def test_the_divergence_has_a_direction():
    one, other = (x[..., :8] @ x[..., :8].transpose(1, 2) for x in (CONTEXT, VISION))
    assert context_distance(CONTEXT, other, "divergence").item() != pytest.approx(
        context_distance(VISION, one, "divergence").item(), abs=1e-4
    )


def test_one_token_is_the_first_form():
    one = REGION[:, :1]
    ones = torch.ones(5, 1, 1, dtype=torch.float64)
    second = _loss(one, form="divergence", region_relations=ones)["content"]
    assert second.item() == pytest.approx(_loss(one)["content"].item(), abs=1e-12)
    assert second.item() == pytest.approx(_loss(REGION[:, 0])["content"].item(), abs=1e-12)
    assert declip(REGION[:, 0], TEACHER, CONTEXT, RELATIONS, form="divergence")["content"].item() == pytest.approx(
        second.item(), abs=1e-12
    )


def test_content_and_context_have_leaves_of_their_own_and_teachers_none():
    leaves = [x.clone().requires_grad_() for x in (REGION, TEACHER, CONTEXT, RELATIONS)]
    found = declip(*leaves)
    content = torch.autograd.grad(found["content"], leaves, allow_unused=True)
    context = torch.autograd.grad(found["context"], leaves, allow_unused=True)
    assert [g is not None for g in content] == [True, False, False, False]
    assert [g is not None for g in context] == [False, False, True, False]


def test_completion():
    eye = torch.eye(9, dtype=torch.float64).expand(2, 9, 9)
    assert torch.equal(completed(RELATIONS, [eye, eye]), RELATIONS)
    assert completed(RELATIONS, []) is RELATIONS
    even = torch.full((2, 9, 9), 1 / 9, dtype=torch.float64)
    assert torch.allclose(completed(RELATIONS, [even]), RELATIONS.mean(1, keepdim=True).expand(2, 9, 9))
    first, second = (torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    assert torch.allclose(completed(RELATIONS, [first, second]), first @ second @ RELATIONS)


def test_no_box_and_safe_numbers():
    region = REGION[:0].clone().requires_grad_()
    found = declip(region, TEACHER[:0], CONTEXT, RELATIONS)
    found["content"].backward()
    assert found["content"].item() == 0
    for dtype in (torch.float32, torch.bfloat16):
        value = declip(*(x.to(dtype) for x in (REGION, TEACHER, CONTEXT, RELATIONS)))
        assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in value.values())
    at_goal = CONTEXT.clone().requires_grad_()
    context_distance(at_goal, torch.tensor(cosines(CONTEXT.numpy()))).backward()
    assert torch.isfinite(at_goal.grad).all(), "the length of a row of zeros has a gradient"
    assert content_distance(REGION, TEACHER).item() >= 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"form": "distanz"}, "form must be one of .* Did you mean 'distance'"),
        ({"weight": -1.0}, "weight must lie in"),
        ({"temperature": 0.0}, "temperature must be above 0. Got 0"),
        ({"teacher": TEACHER[:3]}, r"teacher must have the shape \(5, 6\)"),
        ({"relations": RELATIONS[:, :5]}, r"relations must have the shape \(2, 9, 9\)"),
        ({"form": "divergence"}, "needs region_relations"),
        ({"region_relations": INSIDE[:2]}, r"region_relations must have the shape \(5, 4, 4\)"),
    ],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(ClipworksError, match=says):
        _loss(**change)
