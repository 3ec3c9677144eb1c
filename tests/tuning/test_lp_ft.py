"""LP-FT: two stages, each written out by hand, and the head it begins with."""

from __future__ import annotations

import numpy as np
import torch

from clipworks.tuning.lp_ft import LPFT
from clipworks.zeroshot.classifier import class_vectors

from .toys import NAMES, TEMPLATE, changed, clip_shaped, coloured, quick


def adamw(parameters, losses, lr, decay=0.0, warm=0, clip=1.0):
    """Loss by loss: clipping, then torch's AdamW on matrices with decay and the rest without, cosine, no warm-up."""
    matrices, rest = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.98), eps=1e-6)
    for step in range(losses["count"]):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + np.cos(np.pi * step / losses["count"]))
        optimizer.zero_grad()
        losses["at"]().backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()


def test_both_stages_are_the_loops_written_out():
    """All images in one batch, so that the order does not matter; 2 + 3 steps (one of warm-up is none at 10 %)."""
    x, y = coloured(9)
    encoder = clip_shaped().double()
    got = quick(LPFT, encoder=encoder, lr=1e-3, head_lr=5e-2, head_epochs=2, epochs=3, batch_size=9).fit(x, y)
    model = clip_shaped().double()
    head = torch.nn.Parameter(class_vectors(NAMES, model, templates=TEMPLATE).double())
    target = torch.from_numpy(y)

    def loss():
        rows = torch.nn.functional.normalize(model.visual(x.double()), dim=-1)
        return torch.nn.functional.cross_entropy(model.log_scale.exp().detach() * rows @ head.T, target)

    adamw([head], {"count": 2, "at": loss}, 5e-2)
    adamw([head, *model.visual.parameters()], {"count": 3, "at": loss}, 1e-3, decay=0.1)
    torch.testing.assert_close(got.classifier_.double(), head.detach(), atol=1e-6, rtol=1e-5)
    for name, value in model.visual.state_dict().items():
        torch.testing.assert_close(got.encoder_.visual.state_dict()[name], value, atol=1e-7, rtol=1e-6)


def test_without_the_probe_it_is_full_fine_tuning_and_the_text_tower_stays():
    x, y = coloured()
    encoder = clip_shaped()
    full = quick(LPFT, encoder=encoder, head_epochs=0, lr=1e-2).fit(x, y)
    both = quick(LPFT, encoder=encoder, head_epochs=1, lr=1e-2).fit(x, y)
    for method in (full, both):
        assert {n.split(".")[0] for n in changed(encoder, method.encoder_)} == {"visual"}
    assert not torch.equal(full.classifier_, both.classifier_)


def test_the_first_stage_moves_the_head_alone():
    x, y = coloured()
    encoder = clip_shaped()
    method = quick(LPFT, encoder=encoder, lr=0.0, head_lr=5e-2, head_epochs=20, batch_size=12).fit(x, y)
    assert not changed(encoder, method.encoder_)
    before = (encoder.images(x) @ class_vectors(NAMES, encoder, templates=TEMPLATE).T).argmax(1).numpy()
    assert method.score(x, y) > np.mean(before == y)


def test_the_head_is_saved_and_averaged(tmp_path):
    x, y = coloured()
    settings = {"encoder": clip_shaped(), "lr": 1e-2}
    words = class_vectors(NAMES, settings["encoder"], templates=TEMPLATE)
    full, half = (quick(LPFT, alpha=a, **settings).fit(x, y) for a in (1.0, 0.5))
    torch.testing.assert_close(half.classifier_, (full.classifier_ + words) / 2)
    again = LPFT.load(half.save(tmp_path / "a.safetensors"), encoder=settings["encoder"])
    assert torch.equal(again.classifier_, half.classifier_)
