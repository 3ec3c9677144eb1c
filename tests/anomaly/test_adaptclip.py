"""AdaptCLIP: the facts of its card, its sums by hand, and training on one thing for the defects of another."""

import numpy as np
import pytest
import torch
from parts import flawed, good, toy

from clipworks.anomaly.adaptclip import AdaptCLIP, Adapters, Residual, fuse, harmonic
from clipworks.anomaly.adapters import dice, focal, map_loss, spread_layers, states
from clipworks.anomaly.value_path import value_layers, value_patches
from clipworks.errors import ClipworksError
from clipworks.metrics.anomaly import pixel_auroc

TEXT = np.eye(2, 8)


def lot(seed=1, n=8):
    images, masks = flawed(n, seed)
    return torch.cat([good(n, seed + 50), images]), np.concatenate([np.zeros_like(masks), masks])


@pytest.fixture(scope="module")
def trained():
    images, masks = lot()
    return AdaptCLIP(toy(), text=TEXT, tokens=4, epochs=12, lr=3e-3).train(images, masks)


def test_published_sizes():
    """Card, fact 1: for ViT-L, 768 dimensions of image and text."""
    both = sum(p.numel() for module in (Residual(768), Residual(768)) for p in module.parameters())
    assert both == 590_592
    from types import SimpleNamespace

    wide = SimpleNamespace(dim=16, config=SimpleNamespace(text=SimpleNamespace(width=768)))
    found = Adapters(wide, 12, 4, 0)
    assert found.words.context.numel() == 18_432
    assert len({id(m) for m in found.decoder}) == 7  # one decoder, whatever the number of layers
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in found.norms) == 4
    assert spread_layers(24) == [5, 11, 17, 23]


def test_layers_of_the_second_path():
    encoder, x = toy(layers=4), good(2)
    with torch.no_grad():
        maps, _ = value_layers(encoder, x, 2, [0, 1, 3])
        plain = encoder.visual.run(x, output_layers=(0, 1)).layers
        for number in (0, 1):  # before the second path begins, it is the usual one
            usual = torch.nn.functional.normalize(encoder.visual.project(plain[number][:, 1:]), dim=-1)
            torch.testing.assert_close(maps[number].flatten(1, 2), usual, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(maps[2], value_patches(encoder, x, 2)[0])


def test_untrained_it_is_the_static_map():
    """Card, fact 3: W2 starts at zero."""
    encoder, x = toy(), good(3)
    z, g = value_layers(encoder, x, 2)[0][0].detach(), encoder.images(x)
    torch.testing.assert_close(Residual(8).eval()(z), z)
    found = list(AdaptCLIP(encoder, text=TEXT, blocks=2).fit(None).score_maps(x))
    p = [1 / (1 + np.exp((v[..., 0] - v[..., 1]) / 0.07)) for v in (z.numpy(), g.numpy())]
    np.testing.assert_allclose([m.score for m in found], (p[1] + p[0].max((1, 2))) / 2, atol=1e-5)


def test_gradients_do_not_cross():
    """Card, fact 2."""
    encoder = toy()
    own = Adapters(encoder, 3, 2, 0)
    z, text = value_patches(encoder, good(2))[0].detach(), torch.from_numpy(TEXT).float()
    mask = torch.zeros(2, 6, 6)
    by_words = torch.autograd.grad(map_loss(states(z, own.words(encoder, [".", "."])), mask), list(own.parameters()),
                                   allow_unused=True)  # fmt: skip
    by_image = torch.autograd.grad(map_loss(states(own.local(z), text), mask), list(own.parameters()),
                                   allow_unused=True)  # fmt: skip
    names = [n for n, _ in own.named_parameters()]
    assert {n.split(".")[0] for n, g in zip(names, by_words, strict=True) if g is not None} == {"words"}
    assert {n.split(".")[0] for n, g in zip(names, by_image, strict=True) if g is not None} == {"local"}


def test_query_against_references():
    """Card, facts 4, 5 and 9."""
    q = torch.nn.functional.normalize(torch.randn(2, 3, 3, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    same, apart = fuse(q, q)
    torch.testing.assert_close(same, q)
    assert apart.abs().max() < 1e-6
    memory = torch.nn.functional.normalize(torch.randn(20, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    with_context, some = fuse(q, memory[:10])
    residual, _ = fuse(q, memory[:10], context=False)
    torch.testing.assert_close(with_context - q, residual)
    best = memory[:10][int((memory[:10] @ q[1, 2, 0]).argmax())]
    torch.testing.assert_close(residual[1, 2, 0], (q[1, 2, 0] - best).abs())
    assert (fuse(q, memory)[1] <= some + 1e-6).all()
    torch.testing.assert_close(fuse(q, memory.flip(0))[1], fuse(q, memory)[1])


def test_harmonic_mean():
    """Card, fact 6."""
    a, b = torch.tensor([0.2, 0.5, 0.0]), torch.tensor([0.6, 0.5, 0.9])
    torch.testing.assert_close(harmonic([a, b]), torch.tensor([0.3, 0.5, 0.0]))


def test_losses():
    m = (torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.6).float()
    p = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1))
    assert float(dice(m, m)) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(focal(p, m, 0.0), torch.nn.functional.binary_cross_entropy(p, m))
    right = np.where(m > 0, p, 1 - p)
    assert float(focal(p, m)) == pytest.approx(np.mean(-((1 - right) ** 2) * np.log(right)), rel=1e-5)


def test_training_learns_and_leaves_the_encoder_alone(trained):
    assert trained.history_[-1] < 0.8 * trained.history_[0]
    assert trained._model.refresh() == toy().fingerprint


def test_defects_of_another_thing_are_found(trained):
    """Card, fact 8: trained on stripes across, used on stripes along, with one reference."""
    images, masks = flawed(6, 77)
    images, masks = images.transpose(2, 3), masks.transpose(0, 2, 1)
    detector = trained.fit(good(1, 90).transpose(2, 3))
    heats = [m.heat for m in detector.score_maps(images)]
    assert pixel_auroc(heats, masks) > 0.9


def test_batches_do_not_matter(trained):
    """Card, fact 7."""
    images = lot(5, 3)[0]
    trained.fit(good(3, 90))
    whole = trained.score(images)
    np.testing.assert_allclose([trained.score(x[None])[0] for x in images], whole, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, m: (i, m[:3]), r"masks must have the shape \(16, H, W\)"),
        (lambda i, m: (i, m * 0), "Got 0 defective of 16"),
        (lambda i, m: (i, m, good(3)), r"one per image \(16\). Got 3"),
        (lambda i, m: (i[:0], m), r"images must hold at least one image\. Got none"),
        (lambda i, m: (i, m, good(0)), r"references must hold at least one image\. Got none"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ClipworksError, match=message):
        AdaptCLIP(toy(), text=TEXT).train(*change(*lot()))
