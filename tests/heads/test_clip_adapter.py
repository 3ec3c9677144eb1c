"""CLIP-Adapter against torch's layers and Adam, the checkable facts of its card, and what it chooses."""

import numpy as np
import pytest
import torch
from few_shots import assert_sklearn_accepts, nll, shots, unit
from torch import nn

from clipworks.errors import ClipworksError
from clipworks.heads.clip_adapter import RATIOS, ClipAdapter, first_weights


def network(down, up):
    made = nn.Sequential(nn.Linear(24, 6, bias=False), nn.ReLU(), nn.Linear(6, 24, bias=False), nn.ReLU()).double()
    made[0].weight.data, made[2].weight.data = torch.tensor(down), torch.tensor(up)
    return made


def logits(made, x, words, ratio):
    x = torch.as_tensor(x)
    moved = ratio * made(x) + (1 - ratio) * x
    return 100 * moved / moved.norm(dim=1, keepdim=True) @ torch.tensor(words).T


def test_training_is_the_formula():
    x, y, words = shots(per_class=4, noise=1.5, word_noise=1.0)
    start = ClipAdapter(text=words, steps=0, seed=3).fit(x, y)
    made = network(start.down_, start.up_)
    optimizer = torch.optim.Adam(made.parameters(), 0.01)
    for step in range(25):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + np.cos(np.pi * step / 25)) / 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(made, x, words, 0.4), torch.tensor(y)).backward()
        optimizer.step()
    head = ClipAdapter(text=words, ratio=0.4, lr=0.01, steps=25, seed=3).fit(x, y)
    np.testing.assert_allclose(head.down_, made[0].weight.detach(), atol=1e-3)
    np.testing.assert_allclose(head.up_, made[2].weight.detach(), atol=1e-3)
    np.testing.assert_allclose(head.logits(x), logits(made, x, words, 0.4).detach(), atol=0.1)
    assert np.abs(head.logits(x) - start.logits(x)).max() > 5


def test_with_ratio_0_or_an_outer_layer_of_zeros_it_is_zero_shot():
    """Card, fact 3."""
    x, y, words = shots(noise=1.6, word_noise=1.5)
    head = ClipAdapter(text=words, ratio=0.0, steps=5).fit(x, y)
    np.testing.assert_allclose(head.logits(x), 100 * x @ words.T, atol=1e-9)
    head = ClipAdapter(text=words, steps=5).fit(x, y)
    head.up_ = np.zeros_like(head.up_)
    np.testing.assert_allclose(head.logits(x), 100 * x @ words.T, atol=1e-9)


def test_it_has_as_many_weights_as_the_card_says():
    """Card: 524,288 at 1024 dimensions with reduction 4."""
    x, y = np.random.default_rng(0).normal(size=(4, 1024)), [0, 0, 1, 1]
    head = ClipAdapter(steps=0, folds=2).fit(x, y)
    assert head.down_.size + head.up_.size == 524_288
    assert head.down_.shape == (256, 1024)


def test_the_length_of_the_rows_does_not_matter():
    x, y, words = shots(per_class=4, noise=1.5)
    two = [ClipAdapter(text=words, steps=20).fit(k * x, y).logits(x) for k in (1, 10)]
    np.testing.assert_allclose(*two, atol=1e-2)


def test_first_weights_are_those_of_a_linear_layer():
    """Uniform in +-1 / sqrt(into): its bound and its variance."""
    w = first_weights(300, 64, torch.Generator().manual_seed(0)).detach()
    assert w.abs().max() <= 1 / 8
    assert float(w.var()) == pytest.approx(1 / 64 / 3, rel=0.02)
    layer = nn.Linear(64, 3000, bias=False).weight.detach()
    assert float(layer.var()) == pytest.approx(float(w.var()), rel=0.05)


def test_the_seed_decides_and_torchs_own_dice_are_left_alone():
    x, y, words = shots(per_class=2)
    before = torch.get_rng_state()
    one, same, other = (ClipAdapter(text=words, steps=3, seed=s).fit(x, y).up_ for s in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_ratio_is_chosen_on_images_left_out():
    x, y, words = shots(per_class=6, noise=1.4, word_noise=2.0)
    validation = shots(per_class=6, noise=1.4, word_noise=2.0, draw=1)[:2]
    settings = {"text": words, "steps": 40, "lr": 0.01}
    head = ClipAdapter(ratio=None, **settings).fit(x, y, validation=validation)
    right = [ClipAdapter(ratio=r, **settings).fit(x, y).score(*validation) for r in RATIOS]
    assert max(right) > min(right)
    assert head.ratio_ == RATIOS[int(np.argmax(right))]


def test_poor_words_are_repaired():
    x, y, words = shots(per_class=10, noise=1.2, word_noise=1.5)
    held, truth, _ = shots(per_class=40, noise=1.2, word_noise=1.5, draw=1)
    head = ClipAdapter(text=words, ratio=0.6, lr=0.01).fit(x, y)
    assert head.score(held, truth) > np.mean((held @ words.T).argmax(1) == truth) + 0.05
    assert nll(head.logits(held) / head.temperature_, truth) < nll(head.logits(held), truth)


def test_without_text_class_means_stand_in_its_place():
    x, y, _ = shots(per_class=6, noise=1.2)
    means = unit(np.stack([x[y == c].mean(0) for c in range(6)]))
    two = [ClipAdapter(text=t, steps=20).fit(x, y).logits(x) for t in (None, means)]
    np.testing.assert_allclose(*two, atol=1e-2)


def test_what_cannot_be_used_is_named():
    x, y, words = shots()
    for settings in ({"ratio": 1.1}, {"reduction": 0}, {"lr": -0.1}, {"steps": -1}, {"folds": 1}):
        with pytest.raises(ClipworksError, match=next(iter(settings))):
            ClipAdapter(text=words, **settings).fit(x, y)


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(ClipAdapter(steps=20, folds=2))
