"""CLIP-LoRA: its formula against numpy and against peft's own merge, its published size, its neutral point."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import clipworks
from clipworks.errors import ClipworksError, MissingExtra
from clipworks.tuning.common import learning, linears

from .toys import clip_shaped, coloured, pixels, quick, vit_b16, zero_shot

pytest.importorskip("peft")
from clipworks.tuning.lora import LoRA


def test_as_many_weights_learn_as_published():
    """Card: 12 blocks x 3 maps x 2 matrices x rank 2 x (768 + 512)."""
    encoder = vit_b16()
    LoRA()._shape(encoder)
    assert sum(p.numel() for p in learning(encoder, LoRA.frozen).values()) == 184_320


def test_it_reaches_every_linear_map_of_the_blocks():
    encoder = clip_shaped()
    LoRA(parts=["q", "k", "v", "o", "up", "down"])._shape(encoder)
    reached = {n for n, m in encoder.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")}
    assert reached == set(linears(clip_shaped()))
    assert not {n for n in learning(encoder, LoRA.frozen) if "lora_" not in n}


@pytest.mark.slow
def test_the_bundled_model_is_reached_everywhere_and_merged():
    encoder, parts = clipworks.load(), ["q", "k", "v", "o", "up", "down"]
    linear = {n for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear) and ".blocks." in n}
    assert len(linear) == 6 * (3 + 6)  # q, k, v, o and the two of the feed-forward part, in 3 and 6 blocks
    method = LoRA(["cat", "dog"], encoder=encoder, parts=parts, dropout=0.0)
    method.encoder_ = method._shaped(encoder)
    reached = {n for n, m in method.encoder_.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")}
    assert reached == linear
    draw = torch.Generator().manual_seed(0)
    for name, value in method.encoder_.named_parameters():
        if "lora_" in name:
            value.data = 0.05 * torch.randn(value.shape, generator=draw)
    merged, x, texts = method.merge(), torch.randn(2, 3, 224, 224, generator=draw), ["a photo of a cat.", "an oak"]
    for one, other, plain in ((merged.images(x), method.encoder_.images(x), encoder.images(x)),
                              (merged.texts(texts), method.encoder_.texts(texts), encoder.texts(texts))):  # fmt: skip
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert (one - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("stabilised", "factor"), [(True, 3 / 4**0.5), (False, 3 / 4)])
def test_the_map_is_the_formula(stabilised, factor):
    encoder = clip_shaped()
    LoRA(rank=4, lora_alpha=3.0, stabilised=stabilised)._shape(encoder)
    part = encoder.get_submodule("visual.blocks.0.attention.q").eval()
    rng = np.random.default_rng(0)
    a, b, x = rng.normal(size=(4, 16)), rng.normal(size=(16, 4)), rng.normal(size=(5, 16))
    with torch.no_grad():
        part.lora_A["default"].weight.copy_(torch.from_numpy(a))
        part.lora_B["default"].weight.copy_(torch.from_numpy(b))
    plain = part.get_base_layer()
    weight, bias = plain.weight.detach().numpy(), plain.bias.detach().numpy()
    expected = x @ weight.T + bias + factor * x @ a.T @ b.T
    np.testing.assert_allclose(part(torch.from_numpy(x).float()).detach(), expected, atol=1e-4)


def test_with_b_zero_it_is_zero_shot_clip_whatever_a_is():
    x, encoder = pixels(), clip_shaped()
    shaped = LoRA(seed=5)._shaped(encoder)
    assert shaped.state_dict()["text.blocks.0.attention.k.lora_A.default.weight"].abs().max() > 0
    assert torch.equal(shaped.images(x), encoder.images(x))
    assert not np.allclose(
        quick(LoRA, encoder=encoder, lr=1e-2).fit(x, ["cat", "dog"] * 3).logits(x), zero_shot(encoder, x), atol=1e-3
    )


def test_merged_equals_unmerged_and_pefts_own_merge():
    method = quick(LoRA, encoder=clip_shaped(), lr=2e-2, steps_per_shot=2, parts=["q", "v", "o", "up", "down"])
    x, y = coloured()
    method.fit(x, y)
    merged = method.merge()
    assert "lora" not in str(merged.state_dict().keys())
    torch.testing.assert_close(merged.images(x), method.encoder_.images(x), atol=1e-5, rtol=0)
    own = method._shaped(clip_shaped())
    own.load_state_dict(method.encoder_.state_dict())
    for path in linears(own, method.parts):
        own.get_submodule(path).merge()
        torch.testing.assert_close(own.get_submodule(path).get_base_layer().weight, merged.get_submodule(path).weight)


def test_dropout_is_for_training_alone():
    x, y = coloured()
    method = quick(LoRA, encoder=clip_shaped(), dropout=0.9, lr=1e-2).fit(x, y)
    np.testing.assert_array_equal(method.logits(x), method.logits(x))
    calm = quick(LoRA, encoder=clip_shaped(), dropout=0.0, lr=1e-2, seed=0).fit(x, y)
    assert abs(method.logits(x) - calm.logits(x)).max() > 1e-4


def test_it_learns():
    x, y = coloured()
    settings = {"encoder": clip_shaped(), "batch_size": 12, "dropout": 0.0}
    once = quick(LoRA, lr=0.0, steps_per_shot=0.25, **settings).fit(x, y)
    long = quick(LoRA, lr=3e-2, steps_per_shot=10, **settings).fit(x, y)
    assert long.losses_["loss"] < once.losses_["loss"] - 0.3
    assert long.score(x, y) > once.score(x, y)


def test_without_peft_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"clipworks\[adapt\]"):
        quick(LoRA, encoder=clip_shaped()).fit(*coloured())
    with pytest.raises(ClipworksError, match="rank must lie"):
        quick(LoRA, encoder=clip_shaped(), rank=0).fit(*coloured())
