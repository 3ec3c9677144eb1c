"""CoOp against its training loop written out with whole sentences, and the checkable facts of its card."""

import numpy as np
import prompt_toys as toys
import pytest
import torch
import torch.nn.functional as F

from clipworks.errors import ClipworksError
from clipworks.prompts.coop import CoOp
from clipworks.types import Features

SHAPES = list(toys.SHAPES)


def coop(names=toys.NAMES, shape="clip", **settings):
    return CoOp(names, encoder=toys.encoder(shape), **{"context": 3, "epochs": 3, "lr": 0.1, **settings})


def upstream(method, pixels, y):
    """The released loop: image tower and all sentences in full at every step; SGD, cosine, one slow first epoch."""
    model, rng = method.encoder, np.random.default_rng(method.seed)
    context = method.start(model)["context"].clone().requires_grad_()
    optimizer = torch.optim.SGD([context], lr=method.lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, method.epochs)
    losses = []
    for epoch in range(method.epochs):
        if epoch == 0:
            optimizer.param_groups[0]["lr"] = 1e-5
        elif epoch == 1:
            optimizer.param_groups[0]["lr"] = method.lr
        else:
            scheduler.step()
        order = rng.permutation(len(y))
        for start in range(0, len(y), method.batch_size):
            rows = order[start : start + method.batch_size]
            rng.integers(1, size=len(rows))
            x = model.encode_image(pixels[rows])
            own = context if context.ndim == 3 else [context] * len(method.names)
            text = [toys.sentence(model, n, c, method.position) for n, c in zip(method.names, own, strict=True)]
            logits = model.log_scale.exp().detach() * x @ torch.stack(text).T
            value = F.cross_entropy(logits, torch.tensor(y)[rows])
            (context.grad,) = torch.autograd.grad(value, [context])
            optimizer.step()
            losses.append(value.item())
    return losses, context.detach()


@pytest.mark.parametrize(
    "settings",
    [{}, {"shape": "bert"}, {"position": "middle", "chunk": 2}, {"class_specific": True, "position": "front"},
     {"chunk": 1, "batch_size": 4, "epochs": 4}],
)  # fmt: skip
def test_the_same_loss_curve_as_the_released_loop(settings):
    x, y = toys.pixels()
    method = coop(**settings).fit(x, y)
    losses, context = upstream(method, x, y)
    np.testing.assert_allclose(method.losses_, losses, rtol=2e-4)
    torch.testing.assert_close(method.learned_["context"], context, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_started_from_words_it_is_zero_shot(shape):
    """Card, fact 1."""
    x, y = toys.pixels()
    method = coop(shape=shape, init="a photo of a", lr=0.0).fit(x, y)
    found = method.class_vectors()
    want = method.encoder.texts([f"a photo of a {n.replace('_', ' ')}." for n in toys.NAMES])
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    np.testing.assert_allclose(method.logits(x), toys.zero_shot(method.encoder, x), atol=2e-4)
    np.testing.assert_allclose(method.losses_, method.losses_[0], rtol=1e-6)  # card, fact 7: lr 0 changes nothing


@pytest.mark.parametrize("class_specific", [False, True])
def test_only_the_context_moves(class_specific):
    """Card, fact 2."""
    x, y = toys.pixels()
    toys.assert_only_the_learned_moves(coop(epochs=1, class_specific=class_specific), x, y)


def test_positions_differ():
    """Card, fact 3; their layout is tested with the sentences."""
    x, y = toys.pixels()
    vectors = [coop(["cat", "dog"], position=p, lr=0.0).fit(x, [v % 2 for v in y]).class_vectors()
               for p in ("end", "middle", "front")]  # fmt: skip
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert (vectors[one] - vectors[two]).abs().max() > 1e-3


def test_class_specific_contexts_that_are_equal_give_the_unified_result():
    """Card, fact 5."""
    x, y = toys.pixels()
    one = coop(init="a photo of a", lr=0.0).fit(x, y)
    own = coop(init="a photo of a", lr=0.0, class_specific=True).fit(x, y)
    np.testing.assert_allclose(own.logits(x), one.logits(x), atol=1e-4)
    assert own.learned_["context"].shape == (3, 4, 20)
    assert not torch.equal(*coop(class_specific=True).fit(x, y).learned_["context"][:2])
    with pytest.raises(ClipworksError, match="belong to their classes"):
        own.to_new(["bird", "fish"])


def test_as_many_numbers_as_published():
    assert toys.numbers(CoOp()) == 8192
    assert toys.numbers(CoOp(init="a photo of a")) == 2048


def test_it_learns_and_transfers():
    """Card, fact 7: images that lie where another context would put the classes."""
    torch.manual_seed(0)
    other = 2 * torch.randn(3, 20)
    x = torch.stack([toys.sentence(toys.encoder(), n, other) for n in toys.NAMES * 4]).detach()
    method = coop(epochs=50, batch_size=12).fit(x, list(range(3)) * 4)
    assert len(method.losses_) == 50
    assert method.losses_[-1] < 0.8 * method.losses_[0]
    new = method.to_new(["bird", "fish"])
    want = torch.stack([toys.sentence(method.encoder, n, method.learned_["context"]) for n in ("bird", "fish")])
    torch.testing.assert_close(new.class_vectors(), want.detach(), atol=1e-5, rtol=0)
    assert set(new.predict(x)) <= {0, 1}
    assert method.names_ == toys.NAMES


def test_vectors_stand_for_images():
    x, y = toys.pixels()
    method = coop().fit(x, y)
    vectors = method.encoder.images(x)
    for given in (vectors, vectors.numpy(), 7 * vectors, Features(vectors.numpy()), vectors[:, None]):
        again = coop().fit(given, y)
        np.testing.assert_allclose(again.losses_, method.losses_, rtol=1e-4)
        np.testing.assert_allclose(again.logits(given), method.logits(x), atol=1e-3)
    kept = method.keep(x)
    np.testing.assert_array_equal(coop().fit(kept, y).losses_, method.losses_)
    for wrong in (Features(vectors.numpy(), fingerprint="another"), vectors[:, 1:], coop(shape="bert").keep(x)):
        with pytest.raises(ClipworksError, match="images"):
            coop().fit(wrong, y)


def test_file(tmp_path):
    x, y = toys.pixels()
    toys.assert_file_round_trip(coop(class_specific=True).fit(x, y), x, tmp_path / "coop.safetensors")


def test_bundled_model():
    def make(names, encoder, **settings):
        return CoOp(names, encoder=encoder, init="a photo of a", epochs=6, batch_size=4, lr=0.02, **settings)

    method = toys.assert_works_on_the_bundled_model(make)
    images, y, names = toys.drawings()
    start = make(names, method.encoder)
    start.lr = 0.0
    found = start.fit(method.keep(images), y).logits(images)
    np.testing.assert_allclose(found, toys.zero_shot(method.encoder, images, names), atol=1e-3)
