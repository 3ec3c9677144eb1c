"""What the trained heads share: Adam against torch's, the starting vectors, what folds choose from."""

import numpy as np
import torch
from few_shots import shots, unit

from clipworks.heads.clap import CLAP
from clipworks.heads.common import fold_numbers
from clipworks.heads.descent import adam, anchors, cosine_rate, train_and_choose


def test_adam_is_that_of_torch_with_a_falling_rate():
    rng = np.random.default_rng(0)
    start = [torch.tensor(rng.normal(size=s)) for s in ((3, 4), (5,))]
    target = torch.tensor(rng.normal(size=(3, 5)))

    def loss(w, b):
        return ((w @ torch.ones(4, 5, dtype=torch.double) + b - target) ** 4).mean()

    ours, theirs = ([w.clone().requires_grad_() for w in start] for _ in range(2))
    adam(lambda: loss(*ours), ours, 0.05, 40)
    optimizer = torch.optim.Adam(theirs, 0.05)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_rate(step, 40))
    for _ in range(40):
        optimizer.zero_grad()
        loss(*theirs).backward()
        optimizer.step(), falling.step()
    for one, two, first in zip(ours, theirs, start, strict=True):
        np.testing.assert_allclose(one.detach(), two.detach(), rtol=1e-9)
        assert (one.detach() - first).abs().min() > 1e-3


def test_words_are_where_training_starts_else_the_means_of_unit_rows():
    x, y, words = shots()
    assert anchors(words, x, y, 6) is words
    means = unit(np.stack([x[y == c].mean(0) for c in range(6)]))
    np.testing.assert_allclose(anchors(None, 7 * x, y, 6), means, atol=1e-12)


def trained(settings, per_class=4, text=True, **given):
    """Settings that `train_and_choose` trained with, each with its rows; a head that answers by its setting alone."""
    x, y, words = shots(per_class=per_class)
    head = CLAP(text=words if text else None)
    head._scores = lambda rows: rows @ (words if head.setting == "right" else -words).T
    seen = []

    def train(rows, labels, start, setting):
        head.setting = setting
        seen.append((setting, rows, labels, start))

    found = head._open(x, y, None, given.get("validation"))
    choice = train_and_choose(head, found, 2, settings, train)
    return seen, choice, x, y, words, head


def test_each_setting_is_tried_on_folds_and_the_best_is_taken():
    seen, choice, x, y, words, head = trained(["wrong", "right", "worse"])
    assert [s for s, *_ in seen] == ["wrong", "wrong", "right", "right", "worse", "worse", "right"]
    fold = fold_numbers(y, np.arange(len(y)), 2)
    for (_, rows, labels, start), k in zip(seen, [0, 1] * 3, strict=False):
        np.testing.assert_allclose(rows, x[fold != k])
        np.testing.assert_array_equal(labels, y[fold != k])
        np.testing.assert_allclose(start, words)
    assert len(seen[-1][1]) == len(x)
    assert choice.setting == "right"
    assert head.text_ is None


def test_without_words_no_held_out_image_is_in_the_start():
    seen, _, x, y, *_ = trained(["right"], text=False)
    fold = fold_numbers(y, np.arange(len(y)), 2)
    for k in (0, 1):
        np.testing.assert_allclose(seen[k][3], anchors(None, x[fold != k], y[fold != k], 6))


def test_one_shot_takes_the_first_setting_and_validation_images_choose_instead_of_folds():
    seen, choice, *_ = trained(["right", "wrong"], per_class=1)
    assert [s for s, *_ in seen] == ["right"]
    assert choice.logits is None
    held, truth, _ = shots(draw=1)
    seen, choice, x, *_ = trained(["wrong", "right"], validation=(held, truth))
    assert [(s, len(rows)) for s, rows, *_ in seen] == [("wrong", len(x)), ("right", len(x)), ("right", len(x))]
    assert len(choice.y) == len(held)
