"""Visual inversion: AdamW written out, no cross-talk, how tokens are repeated, and towers without tokens."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inversion_checks import adamw, encoder, rows, state, unchanged

from clipworks.encoders.config import EncoderConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.errors import ClipworksError
from clipworks.retrieval.ovi import repeated, visual_inversion


def test_the_loss_falls_within_its_bounds_and_the_encoder_is_as_before():
    model = encoder()
    before = state(model)
    found = visual_inversion(rows(3), model, steps=60, tokens=4)
    assert (found.losses >= 0).all()
    assert (found.losses <= 2).all()
    assert (found.losses[:, -5:].mean(1) < found.losses[:, :5].mean(1)).all()
    assert unchanged(before, model)
    assert found.tokens.shape == (3, 4, 16)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_against_adamw_written_out(count):
    model, goal = encoder(), rows(1)

    def image(tokens):
        cells = F.interpolate(tokens.T[None], 16, mode="nearest")[0]  # along the patches, as the release does it
        return F.normalize(model.visual.run(embeddings=cells.reshape(1, -1, 4, 4)).pooled, dim=-1)[0]

    def gradient(x):
        tokens = torch.tensor(x, dtype=torch.float32, requires_grad=True)
        (1 - image(tokens) @ torch.from_numpy(goal[0])).backward()
        return tokens.grad.numpy().astype(float)

    start = visual_inversion(goal, model, tokens=count, steps=0).tokens[0].astype(float)
    found = visual_inversion(goal, model, tokens=count, steps=5)
    np.testing.assert_allclose(found.tokens[0], adamw(start, gradient, 5), atol=2e-4)


def test_how_tokens_are_repeated():
    tokens = torch.arange(3.0)[None, :, None]
    assert (repeated(tokens[:, :1], 5) == 0).all()
    assert repeated(tokens, 3)[0, :, 0].tolist() == [0, 1, 2]
    assert repeated(tokens, 7)[0, :, 0].tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_a_batch_is_as_many_single_ones():
    model, goals = encoder(), rows(4)
    together = visual_inversion(goals, model, steps=20).vectors
    alone = np.concatenate([visual_inversion(g[None], model, steps=20).vectors for g in goals])
    assert np.abs(together - alone).max() < 1e-4
    assert np.abs(together - visual_inversion(goals, model, steps=20, batch_size=3).vectors).max() < 1e-4


def test_without_steps_it_does_not_depend_on_the_vector():
    assert np.ptp(visual_inversion(rows(4), encoder(), steps=0).vectors, axis=0).max() < 1e-6


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match=r"tokens must lie in \[1, 16\]"):
        visual_inversion(rows(1), encoder(), tokens=17)
    vision = VisionConfig(kind="resnet", image_size=32, width=8, layers=(1, 1, 1, 1), heads=4, activation="relu",
                          pool="attention")  # fmt: skip
    text = TextConfig(vocab_size=64, eot_id=63, width=16, layers=1, heads=2, mlp_width=32)
    resnet = Encoder(EncoderConfig("rn", 8, vision, text))
    with pytest.raises(ClipworksError, match="visual_inversion needs an image tower with tokens"):
        visual_inversion(rows(1), resnet)
    assert visual_inversion(rows(2)[:0], encoder()).vectors.shape == (0, 8)
