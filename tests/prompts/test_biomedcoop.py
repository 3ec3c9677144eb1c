"""BiomedCoOp from its formula, and the checkable facts of its card."""

import numpy as np
import prompt_toys as toys
import pytest
import torch
import torch.nn.functional as F

from clipworks.errors import ClipworksError
from clipworks.prompts.biomedcoop import BiomedCoOp, means, near_the_mean
from clipworks.prompts.coop import CoOp
from clipworks.prompts.parts import frozen

TOLD = {
    "cat": ["a cat purrs.", "whiskers and paws.", "it sleeps all day.", "a small tiger."],
    "golden retriever": ["a dog of gold.", "it brings the ball back.", "long fur."],
    "fire engine": ["a red truck.", "it has a ladder.", "loud and fast.", "water for a fire."],
}


def biomedcoop(**settings):
    given = {"descriptions": TOLD, "epochs": 2, "lr": 0.05, "tau": 1.0, "batch_size": 6, **settings}
    return BiomedCoOp(toys.NAMES, encoder=toys.encoder(), **given)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def oracle(method, t, x, y):
    """The loss in numpy, sentence by sentence, with the median of the release; t (C, dim), x (B, dim)."""
    scale = method.encoder.logit_scale
    e = [np.asarray(method.encoder.texts(own)) for own in TOLD.values()]
    scores = []
    for i in range(max(map(len, e))):
        of_i = np.stack([own[i] for own in e if i < len(own)])
        scores.append((scale * x @ of_i.T).max(1).mean())
    z = np.array(scores) - np.median(scores)
    z = z / np.median(np.abs(z))
    kept = np.abs((z - z.mean()) / z.std(ddof=1)) <= method.tau
    m = np.stack([unit(own.mean(0)) for own in e])
    a = np.stack([unit(np.mean([v for v, k in zip(own, kept, strict=False) if k], 0)) for own in e])

    def log_softmax(v):
        return v - np.log(np.exp(v).sum(1, keepdims=True))

    p, q = log_softmax(scale * x @ t.T), log_softmax(scale * x @ a.T)
    parts = [-p[np.arange(len(y)), y].mean(), ((t - m) ** 2).mean(), (np.exp(q) * (q - p)).sum() / p.size]
    return parts, kept


def opened(method, y):
    method._open(y, None)
    method._remake()
    return method


def terms(method, t, x, y):
    with frozen(method.encoder):
        return float(method.loss({}, {"image": x}, torch.tensor(y), x, t))


def test_the_loss_is_that_of_the_formula():
    """Card, facts 2 and 5; whatever is not left out or left in by all is a poor test of the selection."""
    x, y = toys.pixels()
    method = opened(biomedcoop(consistency=7.0, distillation=3.0), y)
    images = method.encoder.images(x)
    texts = toys.unit(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))
    (ce, sc, kd), kept = oracle(method, texts.double().numpy(), images.double().numpy(), y)
    assert 0 < kept.sum() < len(kept)
    assert kd > 0
    assert terms(method, texts, images, y) == pytest.approx(ce + 7 * sc + 3 * kd, rel=1e-4)
    every, there = method.teachers()
    assert not every.requires_grad  # card, fact 7
    assert there.sum(1).tolist() == [4, 3, 4]


def test_without_its_two_weights_it_is_coop_step_by_step():
    """Card, fact 1."""
    x, y = toys.pixels()
    one = biomedcoop(consistency=0.0, distillation=0.0, batch_size=4).fit(x, y)
    other = CoOp(toys.NAMES, encoder=one.encoder, init="a photo of a", epochs=2, lr=0.05, batch_size=4).fit(x, y)
    np.testing.assert_allclose(one.losses_, other.losses_, rtol=1e-5)
    torch.testing.assert_close(one.learned_["context"], other.learned_["context"])
    assert toys.numbers(BiomedCoOp()) == 4 * 512


def test_selection():
    """Card, facts 2, 3 and 4."""
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0))
    kept = near_the_mean(scores, 1.5)
    z = (scores.numpy() - scores.numpy().mean()) / scores.numpy().std(ddof=1)
    assert kept.tolist() == (np.abs(z) <= 1.5).tolist()
    assert 0 < kept.sum() < 50
    assert torch.equal(near_the_mean(3 * scores + 7, 1.5), kept)
    assert near_the_mean(scores, float("inf")).all()
    assert near_the_mean(torch.tensor([0.3]), 1.5).all()
    told, there = torch.randn(2, 3, 5), torch.tensor([[True, True, True], [True, False, False]])
    torch.testing.assert_close(means(told, there)[1], toys.unit(told[1, 0]))
    torch.testing.assert_close(means(told, there, torch.tensor([False, True, True]))[1], toys.unit(told[1, 0]))


def test_one_sentence_each_and_class_vectors_at_their_teachers():
    """Card, facts 3 to 6: one sentence is the teacher; there both terms are 0; two orthogonal vectors are 2/d apart."""
    x, y = toys.pixels()
    told = {name: own[:1] for name, own in TOLD.items()}
    method = opened(biomedcoop(descriptions=told, consistency=7.0, distillation=3.0), y)
    images, e = method.encoder.images(x), method.encoder.texts([own[0] for own in told.values()])
    ce = F.cross_entropy(method.encoder.logit_scale * images @ e.T, torch.tensor(y)).item()
    assert terms(method, e, images, y) == pytest.approx(ce, rel=1e-5)
    method.distillation = 0.0
    away = toys.unit(torch.linalg.svd(e)[2][-3:])  # orthogonal to all teachers
    ce = F.cross_entropy(method.encoder.logit_scale * images @ away.T, torch.tensor(y)).item()
    assert terms(method, away, images, y) == pytest.approx(ce + 7 * 2 / 16, rel=1e-4)


class Guided(BiomedCoOp):
    """Without the cross entropy's gradient."""

    def scores(self, images, texts):
        return super().scores(images, texts).detach()


def test_guidance_brings_class_vectors_to_their_means():
    """Card, fact 8."""
    x, y = toys.pixels()
    method = opened(Guided(toys.NAMES, encoder=toys.encoder(), descriptions=TOLD, consistency=20, distillation=0), y)
    p = {"context": method.start(method.encoder)["context"].requires_grad_()}
    every, found = means(*method.teachers()), []
    with frozen(method.encoder):
        for _ in range(6):
            method.backward(p, {"image": method.encoder.images(x)}, torch.tensor(y))
            with torch.no_grad():
                found.append(float((method.texts(p, {}, torch.arange(3)) * every).sum(1).mean()))
                p["context"] -= 0.1 * p["context"].grad
                p["context"].grad = None
    assert np.all(np.diff(found) > 0)


def test_only_the_context_moves_and_it_needs_no_sentences_for_new_classes(tmp_path):
    """Card, fact 7."""
    x, y = toys.pixels()
    method = biomedcoop()
    toys.assert_only_the_learned_moves(method, x, y)
    method.save(tmp_path / "own.safetensors")
    again = BiomedCoOp.load(tmp_path / "own.safetensors", encoder=method.encoder)
    np.testing.assert_array_equal(again.logits(x), method.logits(x))
    assert again.descriptions == TOLD
    assert method.to_new(["bird", "fish"]).logits(x).shape == (6, 2)


def test_templates_stand_for_missing_descriptions():
    _, y = toys.pixels()
    part = {"cat": TOLD["cat"]}
    told = opened(biomedcoop(descriptions=part, templates=["a {}.", "the {}."]), y)._told()
    assert told == [
        TOLD["cat"],
        ["a golden retriever.", "the golden retriever."],
        ["a fire engine.", "the fire engine."],
    ]
    with pytest.raises(ClipworksError, match="descriptions must map names"):
        opened(biomedcoop(descriptions=len), y)._told()
    with pytest.raises(ClipworksError, match="tau"):
        biomedcoop(tau=-1).start(toys.encoder())


def test_bundled_model():
    toys.assert_works_on_the_bundled_model(
        lambda names, **settings: BiomedCoOp(names, templates="default", epochs=6, batch_size=4, lr=0.02, **settings)
    )
