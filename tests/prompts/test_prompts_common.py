"""What the prompt methods share: labels and names, images in every form, views, schedule, files."""

import pickle

import numpy as np
import prompt_toys as toys
import pytest
import torch
from sklearn.base import clone

from clipworks.data.item import Item
from clipworks.errors import BadWeights, ClipworksError
from clipworks.prompts.coop import CoOp
from clipworks.prompts.files import load_learned
from clipworks.prompts.parts import frozen
from clipworks.prompts.vpt import VPT


def coop(names=toys.NAMES, **settings):
    return CoOp(names, encoder=toys.encoder(), **{"context": 2, "epochs": 2, **settings})


def test_labels_are_numbers_or_names():
    x, y = toys.pixels()
    spoken = [toys.NAMES[i] for i in y]
    one, two = coop().fit(x, y), coop().fit(x, np.array(spoken, object))
    np.testing.assert_array_equal(one.logits(x), two.logits(x))
    assert [toys.NAMES[i] for i in one.predict(x)] == two.predict(x).tolist()
    assert one.score(x, y) == one.score(x, spoken) == two.score(x, torch.tensor(y))
    without = coop(None).fit(x, spoken)
    assert without.classes_.tolist() == sorted(toys.NAMES)
    assert coop(None).fit(x, y, names=toys.NAMES).names_ == toys.NAMES
    np.testing.assert_allclose(one.predict_proba(x).sum(1), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": None}, "names must hold the class names where labels are numbers"),
        ({"names": ["cat"]}, "y must hold only labels|at least 2 classes"),
        ({"names": ["cat", "cat", "dog"]}, "distinct"),
        ({"y": [0, 1, 2, 0, 1, 5]}, "y must hold only labels of the 3 classes, numbers from 0 to 2. Got 5"),
        ({"y": ["cat", "dgo"] * 3, "names": ["cat", "dog"]}, "Did you mean 'dog'"),
        ({"y": [0.5] * 6}, "class numbers or names"),
        ({"y": [0, 1]}, r"one label per image \(6\). Got 2"),
        ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"context": 0}, "context"),
        ({"init": " "}, "init must hold words"),
        ({"x": []}, "at least one image"),
    ],
)
def test_what_cannot_be_used_is_named(change, message):
    x, y = toys.pixels()
    x, y = change.pop("x", x), change.pop("y", y)
    with pytest.raises(ClipworksError, match=message):
        coop(change.pop("names", toys.NAMES), **change).fit(x, y)


def test_a_loss_that_is_not_finite_ends_the_run():
    x, y = toys.pixels()
    with pytest.raises(ClipworksError, match="Lower lr"):
        coop(lr=1e30, epochs=4).fit(x, y)


def test_pictures_in_every_form(tmp_path):
    pictures, *_ = toys.drawings()
    paths = []
    for number, picture in enumerate(pictures[:3]):
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1])
    method = coop()
    want = toys.encoder().images(paths)
    forms = (paths, [str(p) for p in paths], pictures[:3], [np.asarray(p) for p in pictures[:3]],
             np.stack([np.asarray(p) for p in pictures[:3]]), [Item(str(p), p) for p in paths])  # fmt: skip
    for form in forms:
        torch.testing.assert_close(method.keep(form).tensors["image"][:, 0], want, atol=1e-5, rtol=0)
    assert len(method.keep(pictures[0])) == 1


def test_views_are_the_image_and_crops_that_do_not_depend_on_the_others():
    method = coop(seed=5)
    x, _ = toys.pixels()
    pictures, *_ = toys.drawings()
    for images in (x, pictures):
        kept = method.keep(images, views=4).tensors["image"]
        assert kept.shape[:2] == (len(images), 4)
        torch.testing.assert_close(kept[:, 0], toys.encoder().images(images), atol=1e-5, rtol=0)
        assert (kept[:, 1:] - kept[:, :1]).abs().amax(-1).min() > 1e-4
        torch.testing.assert_close(method.keep(images[2:3], views=4).tensors["image"][0], kept[2], atol=1e-5, rtol=0)
        assert not torch.equal(coop(seed=6).keep(images, views=4).tensors["image"][:, 1:], kept[:, 1:])
    kept, y = method.keep(x, views=4), [0, 1, 2] * 2
    seen = [method.draw(kept, np.arange(6), np.random.default_rng(s))["image"] for s in range(20)]
    assert len({tuple(s[0].tolist()) for s in seen}) == 4
    assert np.isfinite(coop(views=3).fit(x, y).losses_).all()


def test_the_rate_is_that_of_the_released_code():
    """A first epoch at 1e-5, then the cosine from its beginning, over all epochs."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.002)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    rates = [1e-5]
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    method = coop(epochs=5, lr=0.002)
    np.testing.assert_allclose([method.rate(e) for e in range(5)], rates, rtol=1e-12)
    assert coop(epochs=1, lr=0.002).rate(0) == 0.002  # a single epoch does learn


def test_frozen_puts_everything_back():
    model = toys.encoder(seed=4)
    first, *_ = model.parameters()
    first.requires_grad_(False)
    model.visual.train()
    with frozen(model):
        assert not any(q.requires_grad for q in model.parameters())
        assert not any(m.training for m in model.modules())
    assert [q.requires_grad for q in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert model.visual.training
    assert not model.text.training


def test_copies_and_pickles():
    x, y = toys.pixels()
    method = coop().fit(x, y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(method)).logits(x), method.logits(x))
    again = clone(method)
    assert not hasattr(again, "learned_")
    np.testing.assert_array_equal(again.fit(x, y).losses_, method.losses_)


def test_files_are_checked(tmp_path):
    x, y = toys.pixels()
    path, other = tmp_path / "coop.safetensors", tmp_path / "other.safetensors"
    method = coop().fit(x, [toys.NAMES[i] for i in y])
    method.save(path)
    again = load_learned(path, toys.encoder())
    assert isinstance(again, CoOp)
    assert again.context == 2
    np.testing.assert_array_equal(again.predict(x), method.predict(x))
    other.write_bytes(b"nothing")
    for call, kind, message in (
        (lambda: CoOp.load(other, toys.encoder()), BadWeights, "cannot be read"),
        (lambda: CoOp.load(path, toys.encoder("bert")), ClipworksError, "encoder must be the one"),
        (lambda: VPT.load(path, toys.encoder()), ClipworksError, "must hold prompts/vpt"),
    ):
        with pytest.raises(kind, match=message):
            call()
