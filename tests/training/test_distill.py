"""Distillation: the cache, the terms against numpy, one-sided teachers, processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clipworks.errors import BadImage, ClipworksError
from clipworks.training.augment import AUGMENTS
from clipworks.training.distill import DistillRecipe, check_losses, distill, parse_losses
from clipworks.training.feed import open_pairs, step_generator
from clipworks.training.teacher import TeacherRows, Views, teacher_fingerprint, teacher_rows

from .toy import drawings, spawn, tiny

QUICK = {"steps": 4, "batch_size": 8, "workers": 1, "device": "cpu", "seed": 1}


class Teacher:
    """Fixed random projections of pixels and letters, counting its calls; `dim` may differ from the student's."""

    image_size, logit_scale = 16, 20.0

    def __init__(self, dim=32, fingerprint="toy-teacher"):
        draw = np.random.default_rng(5)
        self.dim, self.fingerprint, self.seen = dim, fingerprint, 0
        self.pixels, self.letters = draw.normal(size=(16 * 16 * 3, dim)), draw.normal(size=(128, dim))

    def images(self, pictures):
        self.seen += len(pictures)
        rows = np.stack([np.asarray(p.resize((16, 16))).reshape(-1) / 255.0 - 0.3 for p in pictures]) @ self.pixels
        return torch.tensor(rows / np.linalg.norm(rows, axis=1, keepdims=True))

    def texts(self, words):
        rows = np.stack([np.bincount([ord(c) for c in w], minlength=128)[:128] for w in words]) @ self.letters
        return torch.tensor(rows / np.linalg.norm(rows, axis=1, keepdims=True))


class Eyes(Teacher):
    texts = property(lambda self: (_ for _ in ()).throw(AttributeError("texts")))


class Tongue(Teacher):
    images = property(lambda self: (_ for _ in ()).throw(AttributeError("images")))


def _rows(tmp_path, teacher, items, views=None, **options):
    return teacher_rows(teacher, items, views or Views(1, None, 0), tiny().preprocess, tmp_path, **options)


def test_the_teacher_is_asked_once(tmp_path):
    items, teacher = open_pairs(drawings(10)), Teacher()
    first = _rows(tmp_path, teacher, items)
    again = _rows(tmp_path, teacher, items)
    assert teacher.seen == 10
    assert torch.equal(first.image, again.image)
    online = teacher.images([item.image for item in items]).float()
    assert torch.equal(first.image[:, 0], online)
    assert torch.equal(first.text, teacher.texts([item.caption for item in items]).float())
    _rows(tmp_path, Teacher(fingerprint="another"), items)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_pass_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("clipworks.training.teacher.SHARD", 4)
    items, teacher = open_pairs(drawings(10)), Teacher()
    whole = _rows(tmp_path / "whole", Teacher(), items)
    plain = teacher.images

    def tired(pictures):
        if teacher.seen >= 8:
            raise KeyboardInterrupt
        return plain(pictures)

    monkeypatch.setattr(teacher, "images", tired)
    with pytest.raises(KeyboardInterrupt):
        _rows(tmp_path / "cut", teacher, items)
    monkeypatch.setattr(teacher, "images", plain)
    rows = _rows(tmp_path / "cut", teacher, items)
    assert teacher.seen == 10
    assert torch.equal(rows.image, whole.image)


def test_views_are_replayed_for_the_student(tmp_path):
    items, teacher, views = open_pairs(drawings(6)), Teacher(), Views(3, AUGMENTS["standard"], seed=7)
    rows = _rows(tmp_path, teacher, items, views)
    assert rows.image.shape == (6, 3, 32)
    student = tiny()
    recipe = DistillRecipe(student, items, rows, {"fd": 1.0}, views, 20.0)
    recipe.bind(student, None)
    batch = recipe.batch(items, 0, step_generator(0, 0))
    for row, item in enumerate(items):
        choices = [AUGMENTS["standard"](item.image, 32, views.draw(item.key, k)) for k in range(3)]
        pixels = [student.preprocess.normalize(np.asarray(c)) for c in choices]
        (number,) = [k for k in range(3) if torch.equal(pixels[k], batch["pixels"][row])]
        picture = AUGMENTS["standard"](item.image, 16, views.draw(item.key, number))
        assert torch.equal(batch["teacher_image"][row], teacher.images([picture])[0].float())
    again = recipe.batch(items, 0, step_generator(0, 0))
    assert torch.equal(batch["pixels"], again["pixels"])


def _softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_terms_against_numpy():
    """Feature, relation and interactive terms and their weights, from the formulas."""
    items, teacher, student = open_pairs(drawings(8)), Teacher(), tiny(double=True)
    rows = TeacherRows(teacher.images([i.image for i in items])[:, None], teacher.texts([i.caption for i in items]),
                       torch.ones(8, dtype=torch.bool))  # fmt: skip
    losses = {"fd": 2000.0, "crd": 1.5, "icl": 0.5, "clip": 1.0}
    recipe = DistillRecipe(student, items, rows, losses, Views(1, None, 0), 20.0).double()
    recipe.bind(student, None)
    batch = recipe.batch(items, 0, step_generator(0, 0))
    batch = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
    got = {n: v.item() for n, v in recipe.forward(student, batch).items()}
    u, w = (f.detach().numpy() for f in (student.encode_image(batch["pixels"]), student.encode_text(batch["tokens"])))
    v, y = rows.image[:, 0].numpy(), rows.text.numpy()
    s = math.exp(student.config.init_log_scale)

    def kl(target, scores):
        return (target * (np.log(target) - np.log(_softmax(scores)))).sum(1).mean()

    def cross(scores):
        return -np.log(np.diag(_softmax(scores))).mean()

    fd = ((u - v) ** 2).mean() + ((w - y) ** 2).mean()
    crd = (kl(_softmax(20 * v @ y.T), s * u @ w.T) + kl(_softmax(20 * y @ v.T), s * w @ u.T)) / 2
    icl = (cross(u @ y.T / 0.07) + cross(w @ v.T / 0.07)) / 2
    clip = (cross(s * u @ w.T) + cross(s * w @ u.T)) / 2
    assert got == pytest.approx({"fd": 2000 * fd, "crd": 1.5 * crd, "icl": 0.5 * icl, "clip": clip}, rel=1e-6)


def test_student_comes_to_the_teacher(tmp_path):
    pairs, teacher = drawings(64), Teacher(dim=24)
    report = distill(pairs, teacher, tiny(), out=tmp_path, losses="fd=2000", **{**QUICK, "steps": 60, "batch_size": 32})
    assert teacher.seen == 64
    assert report.parts["image_map.weight"].shape == (24, 32)
    mapped = report.encoder.images([p for p, _ in pairs]) @ report.parts["image_map.weight"].T
    cosine = torch.nn.functional.cosine_similarity(mapped, teacher.images([p for p, _ in pairs]).float())
    assert cosine.mean() > 0.7
    assert report.losses["loss"] == pytest.approx(report.losses.get("fd", report.losses["loss"]))


@pytest.mark.parametrize(
    ("kind", "terms"),
    [(Teacher, {"fd", "crd", "icl", "clip"}), (Eyes, {"fd", "clip"}), (Tongue, {"fd", "clip"})],
)
def test_teachers_with_one_side(tmp_path, kind, terms):
    report = distill(drawings(16), kind(), tiny(), out=tmp_path, **QUICK)
    assert set(report.losses) == terms | {"loss"}
    again = distill(drawings(16), kind(), tiny(), out=tmp_path, **QUICK)
    assert again.resumed_from == 4


def test_images_without_words_suffice_for_features(tmp_path):
    from clipworks.data.item import Item

    items = [Item(str(i), image) for i, (image, _) in enumerate(drawings(16))]
    report = distill(items, Eyes(), tiny(), out=tmp_path, losses={"fd": 100}, views=2, **QUICK)
    assert torch.equal(report.encoder.text.positions, tiny().text.positions)
    with pytest.raises(ClipworksError, match="every image a caption"):
        distill(items, Eyes(), tiny(), out=tmp_path / "b", losses={"fd": 100, "clip": 1}, **QUICK)


def test_bad_images_are_left_out(tmp_path):
    pairs = [*drawings(9), (b"broken", "a photo")]
    with pytest.raises(BadImage):
        distill(pairs, Teacher(), tiny(), out=tmp_path, **QUICK)
    with pytest.warns(UserWarning, match="'9'.*left out"):
        report = distill(pairs, Teacher(), tiny(), out=tmp_path, on_error="skip", **QUICK)
    assert report.steps == 4


def _two(rank, count, out):
    distill(drawings(16), Teacher(), tiny(double=True), out=out, micro_batch=3, **QUICK)


@pytest.mark.slow
def test_two_processes_distil_as_one(tmp_path):
    from clipworks.training.log import read_log

    spawn(_two, 2, tmp_path / "two")
    distill(drawings(16), Teacher(), tiny(double=True), out=tmp_path / "one", **QUICK)
    one, two = ([x["loss"] for x in read_log(tmp_path / n / "log.jsonl")] for n in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-9)


def test_a_teacher_without_a_name_is_known_by_its_answers():
    named = teacher_fingerprint(Teacher())
    assert named == "toy-teacher"
    one, same, other = (teacher_fingerprint(Teacher(dim, fingerprint=None)) for dim in (32, 32, 8))
    assert one == same != other


@pytest.mark.parametrize(
    ("losses", "teacher", "says"),
    [
        ("fd=2000,crdd=1", Teacher(), "Did you mean 'crd'"),
        ("fd=2000,crd", Teacher(), "must look like 'fd=2000,clip=1'"),
        ("crd=1", Eyes(), r"needs a teacher with images\(\) and texts\(\). This has no texts"),
        ("icl=1", Tongue(), r"This has no images"),
        ("fd=0", Teacher(), "at least one term"),
        ("fd=-1", Teacher(), "must lie in"),
    ],
)
def test_mistakes_are_named(losses, teacher, says):
    with pytest.raises(ClipworksError, match=says):
        check_losses(parse_losses(losses), teacher)


def test_answers_are_checked(tmp_path):
    class Odd(Teacher):
        def images(self, pictures):
            return torch.full((len(pictures), 4), float("nan"))

    with pytest.raises(ClipworksError, match="not finite"):
        _rows(tmp_path, Odd(), open_pairs(drawings(2)))
    with pytest.raises(ClipworksError, match="object has neither"):
        _rows(tmp_path, object(), open_pairs(drawings(2)))
