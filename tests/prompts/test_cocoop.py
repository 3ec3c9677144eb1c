"""CoCoOp image by image from its formula, and the checkable facts of its card."""

import numpy as np
import prompt_toys as toys
import pytest
import torch
import torch.nn.functional as F

from clipworks.errors import ClipworksError
from clipworks.prompts.cocoop import CoCoOp
from clipworks.prompts.coop import CoOp


def cocoop(shape="clip", **settings):
    return CoCoOp(toys.NAMES, encoder=toys.encoder(shape), **{"epochs": 2, "lr": 0.05, **settings})


def oracle(model, p, image):
    """Logits (C,) of one unit image vector."""
    hidden = torch.relu(p["down.weight"] @ image + p["down.bias"])
    context = p["context"] + (p["up.weight"] @ hidden + p["up.bias"])
    return model.logit_scale * torch.stack([toys.sentence(model, n, context) for n in toys.NAMES]) @ image


@pytest.mark.parametrize("shape", toys.SHAPES)
def test_logits_are_the_formula_image_by_image(shape):
    x, y = toys.pixels()
    method = cocoop(shape).fit(x, y)
    want = [oracle(method.encoder, method.learned_, image) for image in method.encoder.images(x)]
    np.testing.assert_allclose(method.logits(x), torch.stack(want).detach(), atol=1e-3)


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_step_is_that_of_the_formula(chunk):
    x, y = toys.pixels(4)
    method = cocoop(epochs=1, batch_size=4, chunk=chunk)
    model, images = method.encoder, method.encoder.images(x)
    p = {name: value.clone().requires_grad_() for name, value in method.start(model).items()}
    logits = torch.stack([oracle(model, p, image) for image in images])
    value = F.cross_entropy(logits, torch.tensor(y))
    gradients = torch.autograd.grad(value, list(p.values()))
    method.fit(x, y)
    np.testing.assert_allclose(method.losses_, [value.item()], rtol=1e-4)
    for (name, old), gradient in zip(p.items(), gradients, strict=True):
        want = old.detach() - method.lr * (gradient + 5e-4 * old.detach())
        torch.testing.assert_close(method.learned_[name], want, atol=1e-5, rtol=1e-3, msg=name)


def test_a_silent_network_is_coop():
    """Card, fact 4."""
    x, y = toys.pixels()
    method = cocoop().fit(x, y)
    other = CoOp(toys.NAMES, encoder=method.encoder, init="a photo of a", epochs=1).fit(x, y)
    for name in ("up.weight", "up.bias"):
        method.learned_[name] = torch.zeros_like(method.learned_[name])
    other._learn({"context": method.learned_["context"]})
    np.testing.assert_allclose(method.logits(x), other.logits(x), atol=1e-3)


def test_no_image_depends_on_its_batch():
    """Card, fact 4."""
    x, y = toys.pixels()
    method = cocoop().fit(x, y)
    np.testing.assert_allclose(method.logits(x[2:3]), method.logits(x)[2:3], atol=1e-3)
    changed = torch.cat([x[:3], x[3:] * 2])
    np.testing.assert_allclose(method.logits(changed)[:3], method.logits(x)[:3], atol=1e-3)
    with pytest.raises(ClipworksError, match="other class vectors for every image"):
        method.class_vectors()


def test_as_many_numbers_as_published():
    assert toys.numbers(CoCoOp()) == 2048 + 33312


def test_only_context_and_network_move_and_are_saved(tmp_path):
    x, y = toys.pixels()
    method = cocoop()
    toys.assert_only_the_learned_moves(method, x, y)
    toys.assert_file_round_trip(method, x, tmp_path / "cocoop.safetensors")
    assert method.to_new(["bird", "fish"]).logits(x).shape == (6, 2)


def test_bundled_model():
    toys.assert_works_on_the_bundled_model(
        lambda names, **settings: CoCoOp(names, epochs=3, batch_size=4, lr=0.02, **settings)
    )
