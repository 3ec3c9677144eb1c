"""CLIP-Refine as an estimator: its loss at the start, no change from a teacher alone, the gap that shrinks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipworks.tuning.clip_refine import CLIPRefine

from .toys import changed, clip_shaped, coloured, quick

CAPTIONS = ["a grey cat", "two dogs at play", "an oak"] * 4


def test_the_loss_of_the_first_step_is_that_of_the_formula():
    """Student = teacher: HyCD is KL((I + P) / 2 || P) of raw products; alignment is off."""
    x, _ = coloured()
    encoder = clip_shaped()
    method = quick(CLIPRefine, encoder=encoder, alignment=0.0, batch_size=12).fit(x, CAPTIONS)
    image, text = encoder.images(x, normalize=False).numpy(), encoder.texts(CAPTIONS, normalize=False).numpy()
    total = 0.0
    for logits in (image @ text.T, text @ image.T):
        p = np.exp(logits.astype(float))
        p /= p.sum(1, keepdims=True)
        target = (np.eye(12) + p) / 2
        total += (target * (np.log(target) - np.log(p))).sum(1).mean() / 2
    assert method.losses_["loss"] == pytest.approx(total, rel=1e-4)


def test_the_teacher_alone_changes_nothing():
    """Card: without true pairs and alignment, student = teacher has no gradient; nor does decay move anything."""
    x, _ = coloured()
    settings = {"encoder": clip_shaped(), "alignment": 0.0, "true_share": 0.0, "weight_decay": 0.0, "epochs": 2}
    method = quick(CLIPRefine, lr=1e-9, **settings).fit(x, CAPTIONS)
    assert method.losses_["loss"] == pytest.approx(0.0, abs=1e-6)


def test_the_gap_between_images_and_texts_shrinks():
    x, _ = coloured()
    encoder = clip_shaped()
    method = quick(CLIPRefine, encoder=encoder, lr=3e-3, epochs=20, batch_size=12).fit(x, CAPTIONS)

    def gap(model):
        return (model.images(x).mean(0) - model.texts(CAPTIONS).mean(0)).norm()

    assert gap(method.encoder_) < 0.8 * gap(encoder)
    assert "log_scale" not in changed(encoder, method.encoder_)


def test_the_rate_is_constant():
    """Of two steps the second is as large as the first: the sizes of AdamW's steps do not depend on the gradient's."""
    x, _ = coloured()
    settings = {"encoder": clip_shaped(), "lr": 1e-3, "weight_decay": 0.0, "batch_size": 12, "distillation": 0.0}
    one, two = (quick(CLIPRefine, epochs=n, **settings).fit(x, CAPTIONS) for n in (1, 2))
    name, start = "visual.projection.weight", clip_shaped()
    first = (one.encoder_.state_dict()[name] - start.state_dict()[name]).abs().median()
    second = (two.encoder_.state_dict()[name] - one.encoder_.state_dict()[name]).abs().median()
    assert first == pytest.approx(1e-3, rel=0.05)
    assert second > 0.5 * first
    assert torch.isfinite(second)
