"""VPT against the image tower's own seams, and its limits."""

import numpy as np
import prompt_toys as toys
import pytest
import torch
import torch.nn.functional as F

from clipworks.encoders.config import VisionConfig
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.prompts.vpt import VPT


def vpt(shape="clip", **settings):
    return VPT(toys.NAMES, encoder=toys.encoder(shape), **{"tokens": 2, "epochs": 3, "lr": 0.05, **settings})


def oracle(method, p, x):
    """Logits by the tower's seams on pixels."""
    model = method.encoder
    prompts = {int(name[7:]): value for name, value in p.items()}
    if 0 in prompts:
        prompts[0] = model.visual.norm_pre(prompts[0])
    words = model.texts([f"a photo of a {n.replace('_', ' ')}." for n in toys.NAMES])
    return model.logit_scale * model.encode_image(x, prompts=prompts) @ words.T


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_logits_are_those_of_the_seams(depth):
    x, y = toys.pixels()
    method = vpt(depth=depth).fit(x, y)
    assert sorted(method.learned_) == [f"tokens.{j}" for j in range(min(depth, 3))]
    np.testing.assert_allclose(method.logits(x), oracle(method, method.learned_, x).detach(), atol=1e-3)


def test_a_step_is_that_of_the_formula():
    x, y = toys.pixels(4)
    method = vpt(epochs=1)
    p = {name: value.requires_grad_() for name, value in method.start(method.encoder).items()}
    value = F.cross_entropy(oracle(method, p, x), torch.tensor(y))
    gradients = torch.autograd.grad(value, list(p.values()))
    method.fit(x, y)
    np.testing.assert_allclose(method.losses_, [value.item()], rtol=1e-4)
    for (name, old), gradient in zip(p.items(), gradients, strict=True):
        want = old.detach() - method.lr * (gradient + 5e-4 * old.detach())
        torch.testing.assert_close(method.learned_[name], want, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("shape", toys.SHAPES)
def test_depth_zero_is_zero_shot(shape):
    x, y = toys.pixels()
    method = vpt(shape, depth=0).fit(x, y)
    assert method.learned_ == {}
    np.testing.assert_allclose(method.logits(x), toys.zero_shot(method.encoder, x), atol=1e-3)


def test_tokens_have_no_order():
    x, y = toys.pixels()
    method = vpt(tokens=4).fit(x, y)
    before = method.logits(x)
    method.learned_ = {name: value.flip(0) for name, value in method.learned_.items()}
    np.testing.assert_allclose(method.logits(x), before, atol=1e-3)
    method.learned_["tokens.1"] = method.learned_["tokens.1"].flip(1)
    assert not np.allclose(method.logits(x), before, atol=1e-2)


def test_it_learns_and_only_its_tokens_move(tmp_path):
    x, y = toys.pixels(12)
    method = vpt(epochs=30, lr=0.1, batch_size=12)
    toys.assert_only_the_learned_moves(method, x, y)
    assert method.losses_[-1] < min(method.losses_[0], np.log(3)) - 0.05  # better than before, and than knowing nothing
    toys.assert_file_round_trip(method, x, tmp_path / "vpt.safetensors")
    assert method.to_new(["bird", "fish"]).logits(x).shape == (12, 2)


def test_as_many_numbers_as_tokens_layers_and_channels():
    assert toys.numbers(VPT(tokens=10, depth=12)) == 10 * 12 * 768
    assert toys.numbers(VPT(tokens=50, depth=1)) == 50 * 768


def test_what_it_needs():
    x, y = toys.pixels()
    with pytest.raises(ClipworksError, match="reaches into the image tower"):
        vpt().fit(toys.encoder().images(x), y)
    with pytest.raises(ClipworksError, match="tokens must lie"):
        vpt(tokens=0).fit(x, y)
    resnet = VisionConfig(kind="resnet", layers=(1, 1, 1, 1), width=8, heads=4, image_size=32)
    model = toy_encoder(tokenizer=CLIPTokenizer())
    model.config = type(model.config)(vision=resnet)
    with pytest.raises(ClipworksError, match=r"needs an image tower with tokens\. Got a resnet"):
        VPT(toys.NAMES, encoder=model).fit(x, y)


def test_bundled_model():
    toys.assert_works_on_the_bundled_model(lambda names, **settings: VPT(names, epochs=4, lr=0.05, **settings))
