"""TaskRes against torch's Adam on the formula, the checkable facts of its card, and what it chooses."""

import numpy as np
import pytest
import torch
from few_shots import assert_sklearn_accepts, nll, shots, unit

from clipworks.errors import ClipworksError
from clipworks.heads.task_res import SCALES, TaskRes


def oracle(x, y, words, scale, length, lr, steps):
    """Prototypes after steps of torch's Adam on the residual, in double precision."""
    r = torch.zeros(words.shape, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.Adam([r], lr)
    rows, t = torch.tensor(x), torch.tensor(length * words)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + np.cos(np.pi * step / steps)) / 2
        moved = t + scale * r
        logits = 100 * rows @ (moved / moved.norm(dim=1, keepdim=True)).T
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.tensor(y)).backward()
        optimizer.step()
    return (t + scale * r).detach().numpy()


@pytest.mark.parametrize(("scale", "length"), [(0.5, 10.0), (1.0, 1.0)])
def test_training_is_the_formula(scale, length):
    x, y, words = shots(per_class=4, noise=1.5, word_noise=1.0)
    head = TaskRes(text=words, scale=scale, length=length, lr=0.02, steps=30).fit(x, y)
    expected = oracle(x, y, words, scale, length, 0.02, 30)
    np.testing.assert_allclose(head.prototypes_, expected, atol=1e-3 * length)
    np.testing.assert_allclose(head.prototypes_, length * words + scale * head.residual_, atol=1e-9)
    np.testing.assert_allclose(head.logits(x), 100 * x @ unit(expected).T, atol=0.1)


def test_at_the_start_it_is_zero_shot():
    """Card, fact 3."""
    x, y, words = shots(noise=1.6, word_noise=1.5)
    for settings in ({"steps": 0}, {"scale": 0.0, "steps": 5}, {"lr": 0.0, "steps": 5}):
        head = TaskRes(text=words, **settings).fit(x, y)
        np.testing.assert_allclose(head.logits(x), 100 * x @ words.T, atol=1e-9)
    assert not head.residual_.any()
    moved = TaskRes(text=words, steps=30, lr=0.1).fit(x, y)
    assert nll(moved.logits(x), y) < nll(100 * x @ words.T, y) - 0.1


def test_a_scale_is_chosen_on_images_left_out():
    x, y, words = shots(per_class=6, noise=1.2, word_noise=2.0)
    validation = shots(per_class=6, noise=1.2, word_noise=2.0, draw=1)[:2]
    head = TaskRes(text=words, scale=None, lr=0.02, steps=20).fit(x, y, validation=validation)
    right = [TaskRes(text=words, scale=s, lr=0.02, steps=20).fit(x, y).score(*validation) for s in SCALES]
    assert max(right) > min(right)
    assert head.scale_ == SCALES[int(np.argmax(right))]


def test_there_are_more_steps_from_sixteen_shots_on():
    for per_class, steps in ((15, 100), (16, 200)):
        x, y, words = shots(classes=2, per_class=per_class, dim=4)
        assert TaskRes(text=words).fit(x, y).steps_ == steps


def test_poor_words_are_repaired():
    x, y, words = shots(per_class=10, noise=1.2, word_noise=1.5)
    held, truth, _ = shots(per_class=40, noise=1.2, word_noise=1.5, draw=1)
    head = TaskRes(text=words, lr=0.05).fit(x, y)
    assert head.score(held, truth) > np.mean((held @ words.T).argmax(1) == truth) + 0.1
    assert head.temperature_ != 1


def test_without_text_class_means_stand_in_its_place():
    x, y, _ = shots(per_class=6, noise=1.2)
    means = unit(np.stack([x[y == c].mean(0) for c in range(6)]))
    two = [TaskRes(text=t, steps=20).fit(x, y).logits(x) for t in (None, means)]
    np.testing.assert_allclose(*two, atol=1e-2)


def test_what_cannot_be_used_is_named():
    x, y, words = shots()
    for settings in ({"scale": -1}, {"length": 0}, {"lr": -0.1}, {"steps": -1}, {"folds": 1}):
        with pytest.raises(ClipworksError, match=next(iter(settings))):
            TaskRes(text=words, **settings).fit(x, y)


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(TaskRes(steps=20, folds=2))
