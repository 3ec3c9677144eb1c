"""MoCoOp image by image from its formula, and the checkable facts of its card."""

import math

import numpy as np
import prompt_toys as toys
import pytest
import torch
import torch.nn.functional as F

from clipworks.errors import ClipworksError
from clipworks.prompts.coop import CoOp
from clipworks.prompts.mocoop import MoCoOp, router_target, text_loss
from clipworks.prompts.parts import frozen

TEMPLATES = ["a photo of a {}.", "a picture of the {}.", "of a {} by night.", "{} seen from above."]
GROUPS, LAYOUT = [2, 1, 1], ("end", "middle", "front")


def mocoop(shape="clip", **settings):
    given = {"templates": TEMPLATES, "groups": GROUPS, "epochs": 2, "lr": 0.05, "noise": 0.0, **settings}
    return MoCoOp(toys.NAMES, encoder=toys.encoder(shape), **given)


def opened(method, y):
    method._open(y, None)
    method._remake()
    return method


def own_vectors(model, p):
    """t (G, C, dim), sentence by sentence."""
    return torch.stack([
        torch.stack([toys.sentence(model, n, p[f"context.{g}"], position) for n in toys.NAMES])
        for g, position in enumerate(LAYOUT)
    ])  # fmt: skip


def mixed(model, p, t, image):
    """Logits (C,) of one image."""
    routed = p["router.weight"] @ image + p["router.bias"]
    first, second = routed.argsort(descending=True)[:2].tolist()
    share = torch.sigmoid(routed[first] - routed[second])
    mixture = share * toys.unit(t[first] + p["correction"]) + (1 - share) * toys.unit(t[second] + p["correction"])
    return model.logit_scale * mixture @ image


def hard_vectors(model):
    """T (G, C, dim), template by template."""
    every = [model.texts([t.format(n.replace("_", " ")) for n in toys.NAMES]) for t in TEMPLATES]
    return toys.unit(torch.stack([(every[0] + every[1]) / 2, every[2], every[3]]))


@pytest.mark.parametrize("shape", ["clip", "bert"])
def test_logits_are_the_formula_image_by_image(shape):
    x, y = toys.pixels()
    method = mocoop(shape).fit(x, y)
    p, model = method.learned_, method.encoder
    t = own_vectors(model, p)
    want = torch.stack([mixed(model, p, t, image) for image in model.images(x)])
    np.testing.assert_allclose(method.logits(x), want.detach(), atol=1e-3)
    np.testing.assert_allclose(method.logits(x[2:3]), method.logits(x)[2:3], atol=1e-3)


@pytest.mark.parametrize(("chunk", "clip_norm"), [(None, 0.3), (2, 1e6)])
def test_a_step_is_that_of_the_formula(chunk, clip_norm):
    x, y = toys.pixels()
    method = mocoop(epochs=1, chunk=chunk, clip_norm=clip_norm, text_scale=2.0)
    model, images = method.encoder, method.encoder.images(x)
    p = {name: value.clone().requires_grad_() for name, value in method.start(model).items()}
    t, hard = own_vectors(model, p), hard_vectors(model)
    value = F.cross_entropy(torch.stack([mixed(model, p, t, image) for image in images]), torch.tensor(y))
    of_text = [-(2 * hard[g] @ t[g][c]).log_softmax(0)[c] for g in range(3) for c in range(3)]
    value = value + 5 * torch.stack(of_text).mean()
    of_router = []
    for image, label in zip(images, y, strict=True):
        h = hard[:, label] @ image
        h[h.argsort(descending=True)[:2]] += 10
        routed = p["router.weight"] @ image + p["router.bias"]
        of_router.append(-(h.softmax(0) * routed.log_softmax(0)).sum())
    value = value + torch.stack(of_router).mean()
    gradients = torch.autograd.grad(value, list(p.values()))
    length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert length > 0.3  # else the cut would not be seen
    cut = min(1, clip_norm / length)
    method.fit(x, y)
    np.testing.assert_allclose(method.losses_, [value.item()], rtol=1e-4)
    for (name, old), gradient in zip(p.items(), gradients, strict=True):
        want = old.detach() - 0.05 * (cut * gradient + 5e-4 * old.detach())
        torch.testing.assert_close(method.learned_[name], want, atol=1e-5, rtol=2e-3, msg=name)


def test_one_group_is_coop():
    """Card, fact 1."""
    x, y = toys.pixels()
    other = CoOp(toys.NAMES, encoder=toys.encoder(), init="a photo of a", epochs=2, lr=0.05).fit(x, y)
    method = mocoop(templates=TEMPLATES[:1], groups=None, lr=0.0).fit(x, y)
    method._learn({**method.learned_, "context.0": other.learned_["context"]})
    np.testing.assert_allclose(method.logits(x), other.logits(x), atol=1e-3)


def test_two_contexts_that_are_alike_are_one():
    """Card, fact 3."""
    x, y = toys.pixels()
    method = mocoop(templates=TEMPLATES[:2], groups=None).fit(x, y)
    one = CoOp(toys.NAMES, encoder=method.encoder, init="a photo of a", epochs=1).fit(x, y)
    one._learn({"context": method.learned_["context.0"]})
    before = method.logits(x)
    method._learn({**method.learned_, "context.1": method.learned_["context.0"], "correction": torch.zeros(16)})
    np.testing.assert_allclose(method.logits(x), one.logits(x), atol=1e-3)
    assert not np.allclose(before, one.logits(x), atol=1e-2)


def test_weights():
    """Card, facts 2 and 3."""
    x, y = toys.pixels()
    method = mocoop().fit(x, y)
    p, kept = method.learned_, {"image": method.encoder.images(x)}
    weights = method.weights(p, kept["image"])
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert ((weights > 0).sum(1) == 2).all()
    shifted = {**p, "router.bias": p["router.bias"] + 7}
    torch.testing.assert_close(method.weights(shifted, kept["image"]), weights)
    texts = method.texts(p, kept, torch.arange(3))[:, 1]
    lengths = torch.einsum("bg,cgd->bcd", weights, texts).norm(dim=-1)
    assert lengths.max() <= 1 + 1e-6
    assert lengths.min() < 0.999  # not made length 1 again


def test_contexts_start_at_their_templates():
    """Card, fact 4; with it, groups of one are zero-shot CLIP when the router has one choice."""
    x, y = toys.pixels()
    method = opened(mocoop(groups=None), y)
    found = method.texts(method.start(method.encoder), {}, torch.arange(3))
    torch.testing.assert_close(found[:, 0].transpose(0, 1), method.targets(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 1], found[:, 0], atol=1e-6, rtol=0)
    one = mocoop(templates=TEMPLATES[:1], groups=None, lr=0.0).fit(x, y)
    np.testing.assert_allclose(one.logits(x), toys.zero_shot(one.encoder, x), atol=1e-3)


def test_losses_in_closed_form():
    """Card, facts 5 and 6."""
    for classes in (2, 5):
        rows = torch.eye(classes, 8)
        found = text_loss(rows[:, None].expand(-1, 3, -1), rows.expand(3, -1, -1))
        assert float(found) == pytest.approx(math.log(1 + (classes - 1) / math.e), rel=1e-5)
    near = toys.unit(torch.randn(6, 40, 8, generator=torch.Generator().manual_seed(0)))
    shares = router_target(near[0], near, 2)
    torch.testing.assert_close(shares.sum(1), torch.ones(40))
    assert (shares.topk(2).values.sum(1) > 1 - 4 * math.exp(-8)).all()


def gradients(y, **settings):
    """Gradients of one image's loss."""
    method = opened(mocoop(clip_norm=1e6, **settings), [0, 1, 2])
    image = method.encoder.images(toys.pixels()[0][:1])
    p = {name: value.requires_grad_() for name, value in method.start(method.encoder).items()}
    with frozen(method.encoder):
        method.backward(p, {"image": image, "targets": method.targets()}, torch.tensor([y]))
    idle = int(method.weights(p, image)[0].argmin())
    return p, idle


def test_who_learns_from_what():
    """Card, fact 7."""
    alone, idle = gradients(1, text_weight=0, router_weight=0)
    assert not alone[f"context.{idle}"].grad.any()
    assert alone[f"context.{(idle + 1) % 3}"].grad.any()
    held, idle = gradients(1, text_weight=5, router_weight=0)
    assert held[f"context.{idle}"].grad.any()
    torch.testing.assert_close(held["router.weight"].grad, alone["router.weight"].grad)


def test_noise_leaves_the_targets():
    """Card, fact 8."""
    x, y = toys.pixels()
    quiet, noisy = (mocoop(noise=n, epochs=6).fit(x, y) for n in (0.0, 0.5))
    assert torch.equal(noisy.targets(), quiet.targets())
    torch.testing.assert_close(noisy.targets(), hard_vectors(noisy.encoder), atol=1e-5, rtol=0)
    assert not np.allclose(noisy.losses_, quiet.losses_)


def test_only_its_own_moves_and_is_saved(tmp_path):
    x, y = toys.pixels()
    method = mocoop(epochs=7)
    toys.assert_only_the_learned_moves(method, x, y)
    toys.assert_file_round_trip(method, x, tmp_path / "mocoop.safetensors")
    assert method.to_new(["bird", "fish"]).logits(x).shape == (6, 2)
    assert [method.rate(e) for e in (0, 4)] == [1e-5, 1e-5]
    assert method.rate(5) == 0.05
    assert toys.numbers(MoCoOp(templates=TEMPLATES, groups=GROUPS)) == (4 + 4 + 3) * 512 + 512 * 3 + 3 + 512


def test_what_cannot_be_used_is_named():
    for groups in ([2, 1], [2, 2, 0], [5]):
        with pytest.raises(ClipworksError, match="groups must share out the 4 templates"):
            mocoop(groups=groups).start(toys.encoder())
    with pytest.raises(ClipworksError, match="active"):
        mocoop(active=0).start(toys.encoder())
    x, y = toys.pixels()
    with pytest.raises(ClipworksError, match="other class vectors for every image"):
        mocoop(epochs=1).fit(x, y).class_vectors()


def test_bundled_model():
    toys.assert_works_on_the_bundled_model(
        lambda names, **settings: MoCoOp(
            names, templates=TEMPLATES, groups=GROUPS, epochs=8, warmup=1, batch_size=4, lr=0.02, **settings
        )
    )
