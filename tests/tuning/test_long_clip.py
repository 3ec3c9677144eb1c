"""Long-CLIP: the stretched table, the principal part, the loss, what stays; the checkable facts of the card."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from clipworks.errors import ClipworksError
from clipworks.training.finetune import SentenceRecipe
from clipworks.tuning.long_clip import LongCLIP, LongRecipe, first_sentence, principal_part

from .toys import SHAPES, changed, clip_shaped, coloured, pixels, quick

LONG = "A cat sits on a wall. " + "Behind it stands a very old oak with a red swing and two small birds on it. " * 4
CAPTIONS = [LONG, "A dog. It runs after a ball on the beach.", "an old oak"] * 4


def rows(count, dim=40, seed=0):
    made = np.random.default_rng(seed).normal(size=(count, dim)) * np.linspace(3, 0.1, dim) + 1
    return torch.from_numpy(made)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_table_is_stretched_and_short_texts_read_as_before(shape):
    """Card: 248 rows, the first 20 as they were, every fourth behind them an old one; exact up to 20 tokens."""
    old, encoder = SHAPES[shape](), SHAPES[shape]()
    LongCLIP()._shape(encoder)
    table, before = encoder.text.positions, old.text.positions
    assert len(table) == encoder.context_length == encoder.config.text.context_length == 248
    assert torch.equal(table[:20], before[:20])
    assert torch.equal(table[20::4], before[20:])
    torch.testing.assert_close(table[22], (before[20] + before[21]) / 2)
    torch.testing.assert_close(table[247], before[76] + 0.75 * (before[76] - before[75]))
    short = ["a cat", "a photo of an old oak"]
    assert torch.equal(encoder.texts(short), old.texts(short))
    assert not torch.allclose(encoder.texts([LONG]), old.texts([LONG[:120]]), atol=1e-3)
    assert encoder.truncated == 0


def test_the_principal_part_is_scikit_learns():
    x = rows(60)
    pca = PCA(8).fit(x.numpy())
    found = principal_part(x, 8)
    np.testing.assert_allclose(found, pca.inverse_transform(pca.transform(x.numpy())), atol=1e-9)
    torch.testing.assert_close(principal_part(found, 8), found)
    torch.testing.assert_close(found.mean(0), x.mean(0))
    assert not torch.allclose(found, x, atol=0.1)


def test_with_few_rows_the_principal_part_is_the_rows():
    x = rows(9)
    assert torch.equal(principal_part(x, 8), x)
    assert not torch.equal(principal_part(x, 7), x)


def test_its_gradient_is_that_of_a_fixed_projection():
    x = rows(30).requires_grad_()
    weight = rows(30, seed=1)
    (found,) = torch.autograd.grad((principal_part(x, 4) * weight).sum(), x)
    centred = np.asarray(x.detach() - x.detach().mean(0))
    v = np.linalg.svd(centred, full_matrices=False)[2][:4]
    project = np.eye(30) - 1 / 30
    expected = project @ weight.numpy() @ v.T @ v + weight.numpy().mean(0)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_the_loss_is_two_smoothed_contrasts():
    """By loops in numpy; 8 components of 12 rows in 8 dimensions leave something out only below 8, so 3 here."""
    encoder, (x, _) = clip_shaped().double(), coloured()
    method = quick(LongCLIP, encoder=encoder, components=3, batch_size=12).fit(x, CAPTIONS)
    start = method._shaped(encoder)
    image, long = start.images(x.double()).numpy(), start.texts(CAPTIONS).numpy()
    short = start.texts([first_sentence(t) for t in CAPTIONS]).numpy()
    main = PCA(3).fit(image)
    main = main.inverse_transform(main.transform(image))
    target, scale = 0.9 * np.eye(12) + 0.1 / 12, encoder.logit_scale
    total = 0.0
    for one, two in ((image, long), (main, short)):
        for logits in (scale * one @ two.T, scale * two @ one.T):
            total -= (target * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1).mean() / 2
    assert method.losses_["loss"] == pytest.approx(total, rel=1e-5)
    assert set(method.losses_) == {"loss", "long", "short"}


def test_the_first_positions_stay_and_the_others_learn_up_to_the_longest_text():
    encoder, (x, _) = clip_shaped(), coloured()
    method = quick(LongCLIP, encoder=encoder, lr=1e-2, warmup=0, weight_decay=0.0).fit(x, CAPTIONS)
    before, after = method._shaped(encoder), method.encoder_
    moved = (before.text.positions != after.text.positions).any(1)
    longest = after.tokenize(CAPTIONS).shape[1]
    assert 60 < longest < 120
    assert not moved[:20].any()
    assert moved[20:longest].all()
    assert not moved[longest:].any()
    assert {"log_scale", "visual.projection.weight", "text.tokens.weight"} <= changed(before, after)


def test_decay_does_not_move_the_first_positions():
    encoder, (x, _) = clip_shaped(), coloured()
    method = quick(LongCLIP, encoder=encoder, lr=1e-2, warmup=0, weight_decay=5.0).fit(x, CAPTIONS)
    assert torch.equal(method.encoder_.text.positions[:20], encoder.text.positions[:20])


def test_no_gradient_reaches_the_frozen_table():
    encoder, x = clip_shaped(), pixels(3)
    LongCLIP()._shape(encoder)
    encoder.text.positions.requires_grad_(False)
    recipe = LongRecipe(20, 32, 0.1)
    recipe.bind(encoder, None)
    tokens = encoder.tokenize(CAPTIONS[:3])
    batch = {"pixels": x, "tokens": tokens, "short": tokens}
    sum(recipe.forward(encoder, batch).values()).backward()
    assert encoder.text.positions.grad is None
    assert recipe.rest.grad.abs().sum() > 0


def test_with_one_sentence_each_it_is_the_contrast_counted_twice():
    encoder, x = clip_shaped(), pixels(3)
    recipes = [LongRecipe(20, 32, 0.0), SentenceRecipe(None, ["{}"], None)]
    for recipe in recipes:
        recipe.bind(encoder, None)
    tokens = encoder.tokenize(["a cat", "a dog", "an oak"])
    twice, once = (sum(r.forward(encoder, {"pixels": x, "tokens": tokens, "short": tokens}).values()) for r in recipes)
    torch.testing.assert_close(twice, 2 * once)


def test_towers_that_read_the_last_position_are_refused():
    encoder = clip_shaped()
    encoder.config = encoder.config.from_dict({**encoder.config.to_dict(), "text": {**encoder.config.text.to_dict(),
                                                                                  "pool": "last"}})  # fmt: skip
    with pytest.raises(ClipworksError, match="must not read its texts at the last position"):
        quick(LongCLIP, encoder=encoder).fit(pixels(3), CAPTIONS[:3])
