"""GOPro from its formula, and the checkable facts of its card."""

import math

import numpy as np
import prompt_toys as toys
import pytest
import torch
import torch.nn.functional as F

from clipworks.errors import ClipworksError
from clipworks.losses.simclr import simclr
from clipworks.prompts.coop import CoOp
from clipworks.prompts.gopro import GOPro, projected
from clipworks.prompts.parts import frozen


def gopro(shape="clip", **settings):
    return GOPro(toys.NAMES, encoder=toys.encoder(shape), **{"epochs": 2, "lr": 0.02, **settings})


def shift(model, p, pixels):
    """b(x) of one image, by loops over the blocks' outputs."""
    layers = model.visual.run(pixels[None], output_layers=(0, 1, 2)).layers
    total = p["combine.bias"]
    for layer, tokens in layers.items():
        mean = tokens[0].mean(0)
        deviation = (tokens[0] - mean).square().mean(0).sqrt()
        style = p[f"style.{layer}.weight"] @ ((mean + deviation) / 2) + p[f"style.{layer}.bias"]
        content = p[f"content.{layer}.weight"] @ mean + p[f"content.{layer}.bias"]
        total = total + p["combine.weight"][0, layer] * (style + content) / 2
    return total


def class_vectors(model, p, pixels):
    """(C, dim) of one image."""
    context = p["context"] + shift(model, p, pixels)
    return torch.stack([toys.sentence(model, n, context) for n in toys.NAMES])


@pytest.mark.parametrize("shape", toys.SHAPES)
def test_logits_are_the_formula_image_by_image(shape):
    x, y = toys.pixels(3)
    method = gopro(shape).fit(x, y)
    model, p = method.encoder, method.learned_
    images = model.images(x)
    want = [model.logit_scale * class_vectors(model, p, v) @ i for v, i in zip(x, images, strict=True)]
    np.testing.assert_allclose(method.logits(x), torch.stack(want).detach(), atol=2e-3)


def test_a_step_is_that_of_the_formula():
    x, y = toys.pixels(4)
    method = gopro(epochs=1)
    model = method.encoder
    p = {name: value.requires_grad_() for name, value in method.start(model).items()}
    views = [x, *(x.flip(-1) * s for s in (0.9, 1.1))]  # given ones in the place of random ones
    looked = [method.look(model, v) for v in views]
    batch = {name: torch.cat([one[name] for one in looked]).detach() for name in looked[0]}
    t = [torch.stack([class_vectors(model, p, one) for one in v]) for v in views]  # (B, C, dim) each
    images = [model.images(v) for v in views]
    logits = model.logit_scale * (t[0] * images[0][:, None]).sum(-1)
    z = []
    for view in images[:2]:
        mapped = view @ p["head.weight"].T + p["head.bias"]
        mapped = (mapped - mapped.mean(0)) / (mapped.var(0, correction=0) + 1e-5).sqrt()
        z.append(mapped * p["norm.weight"] + p["norm.bias"])
    rows = toys.unit(torch.cat(z))
    e = (rows @ rows.T / 0.1).exp()
    away = e.sum(1) - e.diagonal()
    partner = torch.cat([torch.arange(4, 8), torch.arange(4)])
    contrast = -(e[torch.arange(8), partner] / away).log().mean()
    steady = (t[0] - t[1]).square().mean() + (t[0] - t[2]).square().mean()
    value = F.cross_entropy(logits, torch.tensor(y)) + steady + 0.1 * contrast
    want = torch.autograd.grad(value, list(p.values()))
    method._open(y, None)
    method._remake()
    q = {name: v.detach().clone().requires_grad_() for name, v in p.items()}
    with frozen(model):
        found = method.backward(q, batch, torch.tensor(y))
    assert found == pytest.approx(value.item(), rel=1e-4)
    for (name, tensor), gradient in zip(q.items(), want, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_silent_combination_is_coop():
    """Card, fact 1."""
    x, y = toys.pixels()
    method = gopro().fit(x, y)
    for name in ("combine.weight", "combine.bias"):
        method.learned_[name] = torch.zeros_like(method.learned_[name])
    other = CoOp(toys.NAMES, encoder=method.encoder, init="a photo of a", epochs=1).fit(x, y)
    other._learn({"context": method.learned_["context"]})
    np.testing.assert_allclose(method.logits(x), other.logits(x), atol=1e-3)


def test_statistics():
    """Card, facts 2 and 5: without gradient; the vector is the encoder's."""
    x, _ = toys.pixels(2)
    method = gopro()
    found = method.look(method.encoder, x)
    tokens = method.encoder.visual.run(x, output_layers=(1,)).layers[1].detach().numpy()
    np.testing.assert_allclose(found["mean"][:, 1].detach(), tokens.mean(1), atol=1e-5)
    np.testing.assert_allclose(found["deviation"][:, 1].detach(), tokens.std(1), atol=1e-5)
    kept = method.keep(x)
    assert not any(value.requires_grad for value in kept.tensors.values())
    torch.testing.assert_close(kept.tensors["image"][:, 0], method.encoder.images(x), atol=1e-5, rtol=0)


def test_contrast_of_views_that_are_alike():
    """Card, fact 4."""
    assert float(simclr(torch.ones(5, 3), torch.ones(5, 3), 0.1)) == pytest.approx(math.log(9), rel=1e-5)
    p = gopro().start(toys.encoder())
    one = torch.randn(1, 16)
    assert float(simclr(projected(p, one), projected(p, one), 0.1)) == pytest.approx(0, abs=1e-6)


def test_the_same_view_thrice_has_nothing_to_agree_on():
    """Card, fact 3: one view kept, so that x' = x'' = x."""
    x, y = toys.pixels()
    with_it, without = (gopro(views=1, consistency=c).fit(x, y) for c in (1.0, 0.0))
    np.testing.assert_allclose(with_it.losses_, without.losses_, rtol=1e-5)


def test_more_weight_on_agreement_brings_the_views_together():
    """Card, fact 7."""
    x, y = toys.pixels(6)

    def spread(method):
        kept = method.keep(x, views=3)
        looked = [kept.take(np.arange(6), np.full(6, v), "cpu") for v in range(3)]
        moved = torch.stack([method.shift(method.learned_, one) for one in looked])
        return float(moved.var(0).mean())

    loose, tight = (gopro(epochs=6, consistency=c).fit(x, y) for c in (0.0, 300.0))
    assert spread(tight) < spread(loose)


def test_no_image_depends_on_its_batch_and_only_its_own_moves(tmp_path):
    """Card, facts 5 and 6."""
    x, y = toys.pixels()
    method = gopro()
    toys.assert_only_the_learned_moves(method, x, y)
    np.testing.assert_allclose(method.logits(x[2:3]), method.logits(x)[2:3], atol=1e-3)
    toys.assert_file_round_trip(method, x, tmp_path / "gopro.safetensors")
    with pytest.raises(ClipworksError, match="reaches into the image tower"):
        method.fit(method.encoder.images(x), y)
    assert toys.numbers(GOPro()) == 2048 + 12 * 2 * (768 * 512 + 512) + 13 + 512 * 512 + 512 + 1024


def test_bundled_model():
    toys.assert_works_on_the_bundled_model(lambda names, **settings: GOPro(names, epochs=4, lr=0.01, **settings))
