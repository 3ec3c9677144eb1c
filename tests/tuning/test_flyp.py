"""FLYP: the contrastive loss on labels that speak, and on captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.tuning.flyp import FLYP
from clipworks.zeroshot.classifier import class_vectors

from .toys import NAMES, TEMPLATE, changed, clip_shaped, coloured, quick

CAPTIONS = ["a grey cat", "two dogs at play", "an oak"] * 4


def test_a_step_is_the_contrastive_loss_of_images_and_class_sentences():
    """All images in one batch; one step at the full rate, so AdamW moves every weight by lr against its gradient."""
    x, y = coloured(9)
    encoder = clip_shaped().double()
    got = quick(FLYP, encoder=encoder, lr=1e-3, weight_decay=0.0, batch_size=9).fit(x, y)
    image = torch.nn.functional.normalize(encoder.visual(x.double()), dim=-1)
    tokens = encoder.tokenize([TEMPLATE.format(NAMES[i]) for i in y])
    text = torch.nn.functional.normalize(encoder.text(tokens), dim=-1)
    logits, own = encoder.log_scale.exp() * image @ text.T, torch.arange(9)
    loss = sum(torch.nn.functional.cross_entropy(z, own) for z in (logits, logits.T)) / 2
    assert got.losses_["loss"] == pytest.approx(loss.item(), abs=1e-6)
    parameters = {n: p for n, p in encoder.named_parameters() if n != "log_scale"}
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    norm = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
    for name, gradient in gradients.items():
        g = gradient * min(1.0, 1.0 / (norm.item() + 1e-6))
        expected = -1e-3 * g / (g.abs() + 1e-6)
        torch.testing.assert_close(got.encoder_.state_dict()[name] - parameters[name].detach(), expected,
                                   atol=1e-8, rtol=1e-4, msg=name)  # fmt: skip


def test_both_towers_learn_and_the_classes_are_words_of_the_new_text_tower():
    x, y = coloured()
    encoder = clip_shaped()
    method = quick(FLYP, encoder=encoder, lr=1e-2).fit(x, y)
    moved = changed(encoder, method.encoder_)
    assert {n.split(".")[0] for n in moved} == {"visual", "text"}
    assert "log_scale" not in moved
    expected = class_vectors(NAMES, method.encoder_, templates=TEMPLATE)
    assert torch.equal(method.classifier_, expected)


def test_labels_and_their_sentences_as_captions_are_the_same_training():
    x, y = coloured()
    settings = {"encoder": clip_shaped(), "lr": 1e-2}
    spoken = quick(FLYP, **settings).fit(x, [TEMPLATE.format(NAMES[i]) for i in y])
    for labels in (y, [NAMES[i] for i in y]):
        assert not changed(spoken.encoder_, quick(FLYP, **settings).fit(x, labels).encoder_)


def test_captions_need_no_names_until_something_is_to_be_named():
    x, _ = coloured()
    method = quick(FLYP, encoder=clip_shaped(), names=None).fit(x, CAPTIONS)
    assert method.classifier_ is None
    with pytest.raises(ClipworksError, match="names must be given to classify"):
        method.predict(x)
    with pytest.raises(ClipworksError, match=r"text for every image. Number 1 is '  '"):
        quick(FLYP, encoder=clip_shaped(), names=None).fit(x, ["a cat", "  ", *CAPTIONS[2:]])


def test_it_learns():
    x, y = coloured()
    settings = {"encoder": clip_shaped(), "batch_size": 12}
    once = quick(FLYP, lr=0.0, **settings).fit(x, y)
    long = quick(FLYP, lr=3e-3, epochs=25, **settings).fit(x, y)
    assert long.losses_["loss"] < once.losses_["loss"] - 0.3
    assert long.score(x, y) > once.score(x, y)
    assert np.isfinite(long.logits(x)).all()
