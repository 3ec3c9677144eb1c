"""MaPLe against the seams of both towers, and the checkable facts of its card."""

import numpy as np
import prompt_toys as toys
import pytest
import torch
import torch.nn.functional as F

from clipworks.errors import ClipworksError
from clipworks.prompts.maple import BRANCHES, MaPLe


def maple(shape="clip", **settings):
    return MaPLe(toys.NAMES, encoder=toys.encoder(shape), **{"epochs": 3, "lr": 0.05, **settings})


def oracle(method, p, x):
    """Logits by the towers' seams, on pixels and on token ids."""
    model, depth = method.encoder, sum(name.startswith("words") for name in p)
    deep = {j: p[f"words.{j}"] for j in range(depth)}
    rows = model.tokenize([f"of a {n.replace('_', ' ')}." for n in toys.NAMES])
    text = model.encode_text(rows[:, : model.context_length - 2], prompts=deep)
    patches = {}
    for j in range(depth):
        if f"map.{j}.weight" in p:
            patches[j] = p[f"words.{j}"] @ p[f"map.{j}.weight"].T + p[f"map.{j}.bias"]
        elif f"patches.{j}" in p:
            patches[j] = p[f"patches.{j}"]
    if 0 in patches:
        patches[0] = model.visual.norm_pre(patches[0])
    return model.logit_scale * model.encode_image(x, prompts=patches) @ text.T


@pytest.mark.parametrize("settings", [{"branches": b} for b in BRANCHES] + [{"depth": 1}, {"shape": "bert"},
                                                                          {"shape": "siglip"}])  # fmt: skip
def test_logits_are_those_of_the_seams(settings):
    x, y = toys.pixels()
    method = maple(**settings).fit(x, y)
    np.testing.assert_allclose(method.logits(x), oracle(method, method.learned_, x).detach(), atol=2e-3)


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_step_is_that_of_the_formula_and_reaches_every_map(chunk):
    """Card, fact 5."""
    x, y = toys.pixels(4)
    method = maple(epochs=1, chunk=chunk)
    p = {name: value.requires_grad_() for name, value in method.start(method.encoder).items()}
    value = F.cross_entropy(oracle(method, p, x), torch.tensor(y))
    gradients = torch.autograd.grad(value, list(p.values()))
    assert all(g.abs().max() > 0 for g in gradients)
    method.fit(x, y)
    np.testing.assert_allclose(method.losses_, [value.item()], rtol=1e-4)
    for (name, old), gradient in zip(p.items(), gradients, strict=True):
        want = old.detach() - method.lr * (gradient + 5e-4 * old.detach())
        torch.testing.assert_close(method.learned_[name], want, atol=1e-5, rtol=1e-3, msg=name)


def test_as_many_numbers_as_published():
    """Card, fact 1."""
    assert toys.numbers(MaPLe()) == 3_555_072
    for depth, tokens in ((1, 2), (3, 2), (9, 4)):
        assert toys.numbers(MaPLe(depth=depth, tokens=tokens)) == depth * (512 * 768 + 768) + depth * tokens * 512


@pytest.mark.parametrize("shape", toys.SHAPES)
@pytest.mark.parametrize("neutral", [{"depth": 0}, {"depth": 1, "branches": "text", "lr": 0.0}])
def test_neutral_it_is_zero_shot(shape, neutral):
    """Card, fact 2."""
    x, y = toys.pixels()
    method = maple(shape, **neutral).fit(x, y)
    np.testing.assert_allclose(method.logits(x), toys.zero_shot(method.encoder, x), atol=1e-3)


def test_silent_maps_are_not_the_same_as_no_tokens():
    """Card, fact 6."""
    x, y = toys.pixels()
    method = maple(depth=1, lr=0.0).fit(x, y)
    for name in ("map.0.weight", "map.0.bias"):
        method.learned_[name] = torch.zeros_like(method.learned_[name])
    assert not np.allclose(method.logits(x), toys.zero_shot(method.encoder, x), atol=1e-2)


def test_order_matters_among_words_and_not_among_patches():
    """Card, fact 4."""
    x, y = toys.pixels()
    method = maple(branches="independent").fit(x, y)
    before = method.logits(x)
    kept = dict(method.learned_)
    flipped = {name: value.flip(0) if name.startswith("patches") else value for name, value in kept.items()}
    method._learn(flipped)
    np.testing.assert_allclose(method.logits(x), before, atol=1e-3)
    method._learn({name: value if name.startswith("patches") else value.flip(0) for name, value in kept.items()})
    assert not np.allclose(method.logits(x), before, atol=1e-2)


def test_text_alone_leaves_image_vectors_bit_for_bit():
    """Card, fact 7."""
    x, y = toys.pixels()
    text, both = maple(branches="text").fit(x, y), maple().fit(x, y)
    kept = text.keep(x).take(np.arange(6), np.zeros(6, int), "cpu")
    plain = toys.encoder().encode_image(x)
    assert torch.equal(text.images(text.learned_, kept), plain)
    assert (both.images(both.learned_, kept) - plain).abs().max() > 1e-3


def test_it_learns_and_only_its_own_moves(tmp_path):
    """Card, fact 7."""
    x, y = toys.pixels(12)
    method = maple(epochs=30, depth=2, lr=0.1, batch_size=12)
    toys.assert_only_the_learned_moves(method, x, y)
    assert method.losses_[-1] < min(method.losses_[0], np.log(3)) - 0.05  # better than before, and than knowing nothing
    toys.assert_file_round_trip(method, x, tmp_path / "maple.safetensors")
    new = method.to_new(["bird", "fish"])
    assert new.class_vectors().shape == (2, 16)


def test_what_cannot_be_used_is_named():
    x, y = toys.pixels()
    for settings, message in (
        ({"tokens": 5}, r"tokens must lie in \[1, 4\]"),
        ({"branches": "txt"}, "Did you mean 'text'"),
        ({"depth": -1}, "depth"),
    ):
        with pytest.raises(ClipworksError, match=message):
            maple(**settings).fit(x, y)


def test_bundled_model():
    method = toys.assert_works_on_the_bundled_model(
        lambda names, **settings: MaPLe(names, epochs=3, lr=0.01, **settings)
    )
    assert len([name for name in method.learned_ if name.endswith("weight")]) == 3  # its image tower has three blocks
