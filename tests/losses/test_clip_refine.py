"""CLIP-Refine: both terms against numpy and closed forms, what a shared reference does, and a gap that closes."""

import math

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.clip_refine import clip_refine, hybrid_targets, random_alignment
from clipworks.losses.infonce import infonce
from clipworks.losses.relation_distillation import relation_distillation

from .oracle import assert_gradient, assert_safe, log_softmax, pair, softmax, total, unit

IMAGE, TEXT = pair(6, 5)
OLD_IMAGE, OLD_TEXT = pair(6, 5, seed=7)
NOISE = torch.tensor(np.random.default_rng(3).normal(size=(6, 5)))


def _loss(image=IMAGE, text=TEXT, old_image=OLD_IMAGE, old_text=OLD_TEXT, noise=NOISE, scale=4.0, old=3.0, **options):
    return clip_refine(image, text, scale, old_image, old_text, old, noise, **options)


def _distillation(image, text, old_image, old_text, scale, old, alpha, t):
    """Row by row, as the card writes it."""
    student, teacher = scale * np.asarray(image) @ np.asarray(text).T, old * np.asarray(old_image @ old_text.T)
    parts = []
    for s, k in ((student, teacher), (student.T, teacher.T)):
        value = 0.0
        for i in range(len(s)):
            p = alpha * np.eye(len(s))[i] + (1 - alpha) * softmax(k[i] / t)
            q = log_softmax(s[i] / t)
            value += sum(pj * (math.log(pj) - qj) for pj, qj in zip(p, q, strict=True) if pj > 0)
        parts.append(t * t * value / len(s))
    return sum(parts) / 2


@pytest.mark.parametrize(("alpha", "t"), [(0.5, 1.0), (0.0, 2.0), (1.0, 0.5), (0.3, 1.0)])
def test_against_numpy(alpha, t):
    found = _loss(alpha=alpha, temperature=t, alignment=0.3, distillation=0.7)
    expected = 0.7 * _distillation(IMAGE, TEXT, OLD_IMAGE, OLD_TEXT, 4.0, 3.0, alpha, t)
    assert found["distillation"].item() == pytest.approx(expected, abs=1e-12)
    # the paper's sum of squared lengths, brought to the scale of the released code: times 2 / dim
    paper = sum(((x - NOISE) ** 2).sum().item() for x in (IMAGE, TEXT)) / (2 * 6)
    assert found["alignment"].item() == pytest.approx(0.3 * paper * 2 / 5, abs=1e-12)


def test_gradient_against_differences():
    assert_gradient(lambda i, t, s: _loss(i, t, scale=s), IMAGE, TEXT, torch.tensor(3.0))


def test_no_gradient_reaches_the_teacher():
    old = [x.clone().requires_grad_() for x in (OLD_IMAGE, OLD_TEXT)]
    value = total(_loss(IMAGE.clone().requires_grad_(), TEXT, *old))
    assert torch.autograd.grad(value, old, allow_unused=True) == (None, None)


def test_true_pairs_alone_are_contrastive_training():
    assert _loss(alpha=1.0)["distillation"].item() == pytest.approx(infonce(IMAGE, TEXT, 4.0).item(), abs=1e-12)


def test_the_teacher_alone_is_relation_distillation():
    expected = relation_distillation(IMAGE, TEXT, OLD_IMAGE, OLD_TEXT, 4.0, 3.0).item()
    assert _loss(alpha=0.0)["distillation"].item() == pytest.approx(expected, abs=1e-12)


def test_at_the_start_the_teacher_says_nothing_and_the_pairs_pull_by_alpha():
    """Student = teacher: dL/dS of one direction is alpha (softmax(S) - 1) / n, and half of it enters."""
    image, text = (x.clone().requires_grad_() for x in (IMAGE, TEXT))
    value = _loss(image, text, IMAGE, TEXT, old=4.0, alpha=0.0)["distillation"]
    assert value.item() == pytest.approx(0.0, abs=1e-14)
    assert all(g.abs().max() < 1e-14 for g in torch.autograd.grad(value, (image, text)))
    for alpha in (0.2, 0.5, 1.0):
        value = _loss(image, text, IMAGE, TEXT, old=4.0, alpha=alpha)["distillation"]
        logits = (4.0 * IMAGE @ TEXT.T).numpy()
        slope = alpha * (softmax(logits) - np.eye(6)) / 6 + alpha * (softmax(logits.T) - np.eye(6)).T / 6
        expected = 0.5 * 4.0 * slope @ TEXT.numpy()
        assert np.allclose(torch.autograd.grad(value, image)[0], expected, atol=1e-12)


def test_divergence_is_cross_entropy_less_the_teachers_entropy():
    logits = {"there": 3.0 * OLD_IMAGE @ OLD_TEXT.T, "here": 4.0 * IMAGE @ TEXT.T}
    value = 0.0
    for old, new in ((logits["there"], logits["here"]), (logits["there"].T, logits["here"].T)):
        p, q = softmax(old.numpy()), log_softmax(new.numpy())
        value += (-(p * q).sum() + (p * np.log(p)).sum()) / 6 / 2
    assert _loss(alpha=0.0)["distillation"].item() == pytest.approx(value, abs=1e-12)


def test_targets():
    logits = 3.0 * OLD_IMAGE @ OLD_TEXT.T
    targets = hybrid_targets(logits[2:4], 0.4, 2)
    assert torch.allclose(targets.sum(1), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(targets, 0.6 * logits[2:4].softmax(1) + 0.4 * torch.eye(6, dtype=torch.float64)[2:4])


def test_in_the_mean_the_reference_only_shrinks():
    """E ||f - z||^2 = ||f||^2 + dim, so the expected pull is that of a shrinking norm."""
    rows = 2 * unit(1, 16)
    drawn = torch.tensor(np.random.default_rng(0).normal(size=(20000, 16)))
    wide = rows.expand(20000, 16).clone().requires_grad_()
    value = random_alignment(wide, wide, drawn) * 16 / 2
    assert value.item() == pytest.approx(4 + 16, rel=0.01)
    slope = torch.autograd.grad(value, wide)[0].sum(0)
    assert torch.allclose(slope, 2 * rows[0], atol=0.06)


def test_a_shared_reference_draws_a_pair_together_and_others_do_not():
    """A step of size c shrinks the difference of a pair by 1 - c, whatever was drawn."""
    rate, rng = 0.1, np.random.default_rng(0)
    free = [x.clone().requires_grad_() for x in (IMAGE, TEXT)]
    before = (IMAGE - TEXT).norm(dim=1)
    for _ in range(20):
        z = torch.tensor(rng.normal(size=(6, 5)))
        value = random_alignment(*free, z) * 5 * 6 / 2  # the sum of squared distances, halved
        slopes = torch.autograd.grad(value, free)
        free = [(x - rate * g).detach().requires_grad_() for x, g in zip(free, slopes, strict=True)]
    after = (free[0] - free[1]).norm(dim=1)
    assert torch.allclose(after, before * (1 - rate) ** 20, rtol=1e-9)
    apart = [x.clone() for x in (IMAGE, TEXT)]
    for _ in range(20):
        apart = [x - rate * (x - torch.tensor(rng.normal(size=(6, 5)))) for x in apart]
    assert ((apart[0] - apart[1]).norm(dim=1) > 2 * after).all()


def test_mean_over_local_rows_is_the_whole():
    image, text = (x.requires_grad_() for x in pair(8))
    old_image, old_text = pair(8, seed=7)
    noise = unit(8, 5, seed=9)
    whole = _loss(image, text, old_image, old_text, noise)
    rows = {"all_image": image, "all_text": text, "all_teacher_image": old_image, "all_teacher_text": old_text}
    parts = [_loss(*(x[k : k + 2] for x in (image, text, old_image, old_text, noise)), **rows, offset=k)
             for k in (0, 2, 4, 6)]  # fmt: skip
    for name, value in whole.items():
        assert np.mean([part[name].item() for part in parts]) == pytest.approx(value.item(), abs=1e-13)
    mean = torch.stack([total(part) for part in parts]).mean()
    for got, wanted in zip(torch.autograd.grad(mean, (image, text)), torch.autograd.grad(total(whole), (image, text)),
                           strict=True):  # fmt: skip
        assert torch.allclose(got, wanted, atol=1e-13, rtol=0)


def test_two_linear_encoders_with_an_offset_between_them():
    """The gap of the normalised features closes and nearest neighbours are no worse."""
    rng = np.random.default_rng(0)
    inputs = torch.tensor(rng.normal(size=(48, 12)))
    weight = torch.tensor(rng.normal(size=(12, 8)) / 3)
    offset = torch.tensor(rng.normal(size=8))
    offset *= 3.0 / offset.norm()
    learned = [weight.clone(), offset.clone(), weight + 0.1 * torch.tensor(rng.normal(size=(12, 8))), -offset]
    learned = [x.requires_grad_() for x in learned]

    def encode():
        return inputs @ learned[0] + learned[1], inputs @ learned[2] + learned[3]

    def judge():
        image, text = ((x / x.norm(dim=1, keepdim=True)).detach() for x in encode())
        right = (image @ text.T).argmax(1) == torch.arange(48)
        return (image.mean(0) - text.mean(0)).norm().item(), right.double().mean().item()

    old = [x.detach() for x in encode()]
    gap, accuracy = judge()
    optimizer = torch.optim.Adam(learned, lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        total(_loss(*encode(), *old, torch.tensor(rng.normal(size=(48, 8))), scale=1.0, old=1.0)).backward()
        optimizer.step()
    new_gap, new_accuracy = judge()
    assert gap > 1.0
    assert new_gap < 0.5 * gap
    assert new_accuracy >= accuracy


def test_safe_numbers():
    fixed = [x.bfloat16() for x in (OLD_IMAGE, OLD_TEXT, NOISE)]

    def loss(scale, image, text):
        return _loss(image, text, *(x.to(image.dtype) for x in fixed), scale=scale, old=3.0)

    assert_safe(loss, IMAGE, TEXT)
    assert all(v.item() == 0.0 for n, v in _loss(*(x[:1] for x in (IMAGE, TEXT, OLD_IMAGE, OLD_TEXT, NOISE))).items()
               if n == "distillation")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"temperature": 0.0}, "temperature must be above 0. Got 0"),
        ({"alignment": -1.0}, "alignment must lie in"),
        ({"distillation": -1.0}, "distillation must lie in"),
        ({"noise": NOISE[:5]}, "reference must have the shape of image"),
        ({"old_text": OLD_TEXT[:5]}, "teacher_text must have the shape of teacher_image"),
        ({"old_image": OLD_IMAGE[:5], "old_text": OLD_TEXT[:5]}, "teacher_image must have the rows of image, 6. Got 5"),
        ({"all_teacher_image": OLD_IMAGE}, "all_teacher_image and all_teacher_text must be given together"),
    ],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(ClipworksError, match=says):
        _loss(**change)
