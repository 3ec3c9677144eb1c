"""VR-LwF: the random sentences, both distillations in numpy, its reductions; tasks one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.relation_distillation import divergence
from clipworks.tuning.class_words import ClassRecipe
from clipworks.tuning.common import run
from clipworks.tuning.continual import ContinualReport, Task, continual
from clipworks.tuning.vr_lwf import ReplayRecipe, VRLwF, random_sentences

from .toys import NAMES, TEMPLATE, changed, clip_shaped, coloured, pixels, quick


def log_softmax(z):
    return z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)


def test_random_sentences():
    """Card: start first, one end token at 11, no special one inside, padding behind; argmax of the ids at 11."""
    encoder = clip_shaped()
    rows = random_sentences(encoder, 50)
    assert rows.shape == (50, 77)
    assert (rows[:, 0] == 49406).all()
    assert (rows[:, 1:11] < 49406).all()
    assert (rows.argmax(1) == 11).all()
    assert ((rows == 49407).sum(1) == 1).all()
    assert (rows[:, 12:] == 0).all()
    assert (rows[:, 1:11] != 0).all()
    assert torch.equal(rows, random_sentences(encoder, 50))
    assert not torch.equal(rows, random_sentences(encoder, 50, seed=1))


def recipe_of(teacher, tokens, weights=(0.7, 0.4), per_step=None):
    made = ReplayRecipe(dict(zip("012", NAMES, strict=True)), TEMPLATE, None, 0.2, teacher=teacher, tokens=tokens,
                        weights=weights, temperature=2.0, per_step=per_step)  # fmt: skip
    made.bind(clip_shaped(), None)
    return made


def test_both_distillations_are_the_formula():
    teacher, student = clip_shaped(seed=1).double(), clip_shaped(seed=2).double()
    tokens, x = random_sentences(teacher, 9), pixels(4).double()
    batch = {"pixels": x, "labels": torch.tensor([0, 1, 2, 0]), "chosen": torch.tensor([4, 0, 7, 2, 8])}
    found = recipe_of(teacher, tokens).forward(student, batch)
    part = tokens[batch["chosen"]]
    f0, f1 = teacher.encode_image(x).detach().numpy(), student.encode_image(x).detach().numpy()
    r0, r1 = teacher.encode_text(part).detach().numpy(), student.encode_text(part).detach().numpy()
    s = student.logit_scale
    for name, weight, old, new in (("images", 0.7, f0 @ r0.T, f1 @ r0.T), ("texts", 0.4, r0 @ f0.T, r1 @ f1.T)):
        q, p = log_softmax(s * old / 2), log_softmax(s * new / 2)
        expected = weight * 4 * (np.exp(q) * (q - p)).sum(1).mean()
        assert found[name].item() == pytest.approx(expected, rel=1e-5), name


def test_where_nothing_was_forgotten_there_is_no_loss_and_no_gradient():
    encoder = clip_shaped()
    recipe = recipe_of(encoder, random_sentences(encoder, 6))
    batch = {"pixels": pixels(4), "labels": torch.tensor([0, 1, 2, 0]), "chosen": torch.arange(6)}
    found = recipe.forward(encoder, batch)
    (found["images"] + found["texts"]).backward()
    assert abs(found["images"].item()) + abs(found["texts"].item()) < 1e-5
    assert max(p.grad.abs().max().item() for p in encoder.parameters() if p.grad is not None) < 1e-5
    assert not any(p.requires_grad for p in recipe.teacher.parameters())


def test_one_sentence_says_nothing_of_images():
    """Card: V = 1 makes the loss over sentences exactly 0."""
    recipe = recipe_of(clip_shaped(seed=1), random_sentences(clip_shaped(), 1))
    batch = {"pixels": pixels(4), "labels": torch.tensor([0, 1, 2, 0]), "chosen": torch.arange(1)}
    found = recipe.forward(clip_shaped(seed=2), batch)
    assert found["images"].item() == 0
    assert found["texts"].item() > 0


def test_order_of_sentences_does_not_matter():
    teacher, student = clip_shaped(seed=1), clip_shaped(seed=2)
    tokens = random_sentences(teacher, 6)
    batch = {"pixels": pixels(4), "labels": torch.tensor([0, 1, 2, 0]), "chosen": torch.arange(6)}
    one, two = (recipe_of(teacher, t).forward(student, batch) for t in (tokens, tokens.flip(0)))
    assert one
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-5, rtol=1e-5)


def test_at_a_high_temperature_the_gradient_is_the_difference_of_the_centred_logits():
    """Card: T^2 KL has the gradient (z_new - z_old) / V there, both centred."""
    old, new = (torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    new.requires_grad_()
    t = 1e4
    (found,) = torch.autograd.grad(3 * t**2 * divergence((old / t).log_softmax(1), new / t), new)
    expected = (new - new.mean(1, keepdim=True) - old + old.mean(1, keepdim=True)) / 5
    torch.testing.assert_close(found, expected.detach(), atol=1e-3, rtol=1e-3)


def test_without_weights_it_is_plain_fine_tuning_to_the_last_bit():
    encoder, (x, y) = clip_shaped(), coloured()
    method = quick(VRLwF, encoder=encoder, image_weight=0.0, text_weight=0.0, lr=1e-2, steps=3, sentences=4).fit(x, y)
    shots = method._open(x, y)
    plain = run(encoder, shots.items, ClassRecipe(shots.table, TEMPLATE, None, 0.2), freeze=("log_scale",), lr=1e-2,
                weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, steps=3, batch_size=6, clip=1.0, seed=0)  # fmt: skip
    assert not changed(plain.encoder, method.encoder_)
    assert changed(plain.encoder, quick(VRLwF, encoder=encoder, lr=1e-2, steps=3, sentences=4).fit(x, y).encoder_)


def test_texts_in_place_of_random_sentences_and_what_is_refused(tmp_path):
    x, y = coloured()
    settings = {"encoder": clip_shaped(), "lr": 1e-2, "steps": 2}
    method = quick(VRLwF, sentences=["a horse", "a bird"], teacher=clip_shaped(seed=4), **settings).fit(x, y)
    again = VRLwF.load(method.save(tmp_path / "a.safetensors"), encoder=settings["encoder"])
    np.testing.assert_array_equal(again.logits(x), method.logits(x))
    refused = [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"words": 99}, "words must lie"),
        ({"per_step": 0}, "per_step must lie"),
        ({"sentences": 0}, "sentences must lie"),
    ]
    for changes, says in refused:
        with pytest.raises(ClipworksError, match=says):
            quick(VRLwF, **{**settings, **changes}).fit(x, y)


def test_with_replay_less_is_forgotten_at_the_same_accuracy():
    """Card's toy: divergence from the start on sentences and words that were never replayed."""
    x, y = coloured()
    encoder, words = clip_shaped(), ["a horse", "two birds", "rain", "an old boat", "the moon"]
    sets = [random_sentences(encoder, 64, seed=99), encoder.tokenize(words)]

    def forgotten(model):
        rows = [[m.logit_scale * m.encode_image(x) @ m.encode_text(t).T / 2 for m in (encoder, model)] for t in sets]
        return [divergence(old.log_softmax(1), new).item() for old, new in rows]

    settings = {"encoder": encoder, "lr": 1e-3, "steps": 40, "batch_size": 12, "sentences": 200}
    plain, kept = (quick(VRLwF, image_weight=w, text_weight=w, **settings).fit(x, y) for w in (0.0, 20.0))
    assert plain.score(x, y) == kept.score(x, y) == 1.0
    for without, with_replay in zip(forgotten(plain.encoder_), forgotten(kept.encoder_), strict=True):
        assert with_replay < without


def test_the_measures_of_a_sequence():
    accuracy = np.array([[90.0, 40.0, 50.0], [80.0, 95.0, 30.0], [60.0, 85.0, 99.0]])
    report = ContinualReport(["a", "b", "c"], np.zeros(3), accuracy, clip_shaped())
    assert report.transfer == pytest.approx((40 + (50 + 30) / 2) / 2)
    assert report.average == pytest.approx(accuracy.mean())
    assert report.last == pytest.approx((60 + 85 + 99) / 3)
    assert report.backward == pytest.approx(((60 - 90) + (85 - 95)) / 2)
    assert set(report.as_dict()) == {"tasks", "start", "accuracy", "transfer", "average", "last", "backward"}


def test_tasks_are_learned_one_after_the_other():
    x, y = coloured()
    first = Task("one", NAMES, x, y, x, y)
    other = Task("two", ["sea", "sky"], x[:6], ["sea", "sky"] * 3, x[:6], ["sea", "sky"] * 3)
    method = quick(VRLwF, encoder=clip_shaped(), lr=5e-3, steps=10, batch_size=12, sentences=8)
    report = continual(method, [first, other])
    assert report.accuracy.shape == (2, 2)
    alone = quick(VRLwF, encoder=clip_shaped(), lr=5e-3, steps=10, batch_size=12, sentences=8).fit(x, y)
    assert report.accuracy[0, 0] == pytest.approx(100 * alone.score(x, y))
    then = quick(VRLwF, encoder=alone.merge(), names=["sea", "sky"], lr=5e-3, steps=10, batch_size=12, sentences=8)
    assert not changed(then.fit(other.images, other.y).encoder_, report.encoder)
    kept = continual(method, [first, other], original_teacher=True)
    assert changed(kept.encoder, report.encoder)
    with pytest.raises(ClipworksError, match="at least one task"):
        continual(method, [])


def test_rehearsal_learns_the_first_images_of_earlier_classes_again():
    x, y = coloured()
    first = Task("one", NAMES, x, y, x, y)
    other = Task("two", ["sea", "sky"], x[:6], [0, 1] * 3, x[:6], [0, 1] * 3)
    common = {"lr": 5e-3, "steps": 10, "batch_size": 12, "sentences": 8}
    report = continual(quick(VRLwF, encoder=clip_shaped(), **common), [first, other], rehearsal=2)
    alone = quick(VRLwF, encoder=clip_shaped(), **common).fit(x, y).merge()
    rows = sorted(i for name in set(y) for i in [j for j, own in enumerate(y) if own == name][:2])
    images, told = torch.cat([x[rows], x[:6]]), [NAMES[y[i]] for i in rows] + ["sea", "sky"] * 3
    names = [*NAMES, "sea", "sky"]
    assert not changed(quick(VRLwF, encoder=alone, **{**common, "names": names}).fit(images, told).encoder_,
                       report.encoder)  # fmt: skip
    with pytest.raises(ClipworksError, match="rehearsal must"):
        continual(quick(VRLwF, encoder=clip_shaped()), [first], rehearsal=-1)
