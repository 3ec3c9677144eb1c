"""TPT: its one step written out from the formula, and the checkable facts of its card."""

import numpy as np
import prompt_toys as toys
import pytest
import torch

import clipworks
from clipworks.errors import ClipworksError
from clipworks.prompts.tpt import TPT, confident


def tpt(shape="clip", **settings):
    return TPT(toys.NAMES, encoder=toys.encoder(shape), **{"views": 20, "share": 0.25, "lr": 0.05, **settings})


def entropy(p):
    return -(p * p.clamp_min(1e-30).log()).sum(-1)


def oracle(method, views):
    """Logits (C,) of one image from its unit view vectors (V, dim): Adam's first step, by hand."""
    model, start = method.encoder, method.start(method.encoder)["context"].clone().requires_grad_()

    def text(context):
        return torch.stack([toys.sentence(model, n, context) for n in toys.NAMES])

    p = (model.logit_scale * views @ text(start).T).softmax(-1)
    order = entropy(p).argsort()[: int(method.share * len(views))]
    (g,) = torch.autograd.grad(entropy(p[order].mean(0)), [start])
    with torch.no_grad():
        context = start * (1 - 0.01 * method.lr) - method.lr * g / (g.abs() + 1e-8)
        return model.logit_scale * text(context) @ views[0]


@pytest.mark.parametrize("settings", [{}, {"shape": "bert"}, {"chunk": 1}])
def test_one_step_is_the_formula(settings):
    x, _ = toys.pixels(3)
    method = tpt(**settings).fit()
    views = method.keep(x, views=20).tensors["image"]
    want = torch.stack([oracle(method, own) for own in views])
    np.testing.assert_allclose(method.logits(x), want, atol=5e-3)
    assert np.abs(method.logits(x) - toys.zero_shot(method.encoder, x)).max() > 0.1
    np.testing.assert_allclose(method.logits(views), method.logits(x), atol=5e-3)


@pytest.mark.parametrize("shape", toys.SHAPES)
@pytest.mark.parametrize("still", [{"lr": 0.0}, {"steps": 0}])
def test_without_a_step_it_is_zero_shot(shape, still):
    x, _ = toys.pixels(3)
    method = tpt(shape, **still).fit()
    np.testing.assert_allclose(method.logits(x), toys.zero_shot(method.encoder, x), atol=1e-3)


def test_the_entropy_of_the_mean_is_at_least_the_mean_of_the_entropies():
    """Card, fact 6; equal for views that are alike."""
    method = tpt().fit()
    views = toys.unit(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
    texts = method.texts(method.learned_, {}, torch.arange(3)).detach()

    def both(views):
        p = (method.encoder.logit_scale * views @ texts.T).softmax(-1)
        return float(method.loss({}, {}, torch.zeros(1), views, texts)), p

    mean, p = both(views)
    assert mean == pytest.approx(float(entropy(p.mean(0))), rel=1e-5)
    assert mean > float(entropy(p).mean())
    same, p = both(views[:1].repeat(5, 1))
    assert same == pytest.approx(float(entropy(p).mean()), rel=1e-4)


def test_views_that_are_alike_keep_the_order_of_the_classes():
    """Card, fact 6."""
    method = tpt(lr=1e-3).fit()
    x = toys.unit(torch.randn(4, 16, generator=torch.Generator().manual_seed(1)))
    tuned, start = method.logits(x[:, None].repeat(1, 8, 1)), tpt(lr=0.0).fit().logits(x)
    np.testing.assert_array_equal(tuned.argsort(1), start.argsort(1))
    assert not np.allclose(tuned, start, atol=1e-3)


def test_nothing_is_left_of_an_image():
    """Card, fact 6: the state after an image is the state before it."""
    x, y = toys.pixels()
    method = tpt().fit(x, y)
    before = method.learned_["context"].clone()
    first = method.logits(x)
    assert torch.equal(method.learned_["context"], before)
    np.testing.assert_array_equal(method.logits(x), first)
    np.testing.assert_allclose(method.logits(x[3:]), first[3:], atol=1e-3)
    assert all(q.grad is None and q.requires_grad for q in method.encoder.parameters())
    assert torch.equal(method.learned_["context"], method.start(method.encoder)["context"])


def test_how_many_views_are_kept():
    logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    kept = confident(logits, 0.1)
    assert len(kept) == 6
    left = entropy(logits.softmax(-1))
    assert left[kept].max() <= np.delete(left.numpy(), kept.numpy()).min()
    assert len(confident(logits[:5], 0.1)) == 1


def test_names_are_needed_and_files_kept(tmp_path):
    x, y = toys.pixels(3)
    with pytest.raises(ClipworksError, match="names must hold the class names"):
        TPT(encoder=toys.encoder()).fit()
    with pytest.raises(ClipworksError, match="share"):
        tpt(share=2.0).fit()
    spoken = TPT(encoder=toys.encoder(), views=4).fit(x, [toys.NAMES[i] for i in y])
    assert spoken.predict(x)[0] in toys.NAMES
    toys.assert_file_round_trip(tpt().fit(x, y), x, tmp_path / "tpt.safetensors")
    assert toys.numbers(TPT()) == 2048


def test_bundled_model():
    images, _, names = toys.drawings()
    model = clipworks.load()
    method = TPT(names, encoder=model, views=10, share=0.3)
    kept = method.fit().keep(images[:2], views=10)
    zero = toys.zero_shot(model, images[:2], names)
    np.testing.assert_allclose(TPT(names, encoder=model, lr=0.0).fit().logits(kept), zero, atol=1e-3)

    def spread(logits):
        p = torch.from_numpy(logits).softmax(-1)
        return float(entropy(p).mean())

    found = method.logits(kept)
    assert not np.allclose(found, zero, atol=1e-3)
    assert spread(found) < spread(zero)
