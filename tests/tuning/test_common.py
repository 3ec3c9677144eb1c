"""What holds of every method of the room: its neutral point, what it may change, what it writes."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import clipworks
from clipworks.encoders.loading import save
from clipworks.errors import BadWeights, ClipworksError
from clipworks.registry import get_method, methods
from clipworks.tuning.class_words import ClassRecipe, class_rows
from clipworks.tuning.clip_svd import CLIPSVD
from clipworks.tuning.common import Tuner, learning, linears, only
from clipworks.zeroshot.classifier import class_vectors

from .toys import NAMES, SHAPES, clip_shaped, coloured, pixels, quick, vit_b16, zero_shot

TUNERS = [m.name for m in methods("tuning") if issubclass(get_method(f"tuning/{m.name}"), Tuner)]

every_tuner = pytest.mark.parametrize("name", TUNERS)
neutral = pytest.mark.parametrize("name", [n for n in TUNERS if get_method(f"tuning/{n}").neutral])
merging = pytest.mark.parametrize("name", [n for n in TUNERS if get_method(f"tuning/{n}").merges])
unmerged = pytest.mark.parametrize("name", [n for n in TUNERS if not get_method(f"tuning/{n}").merges])
both_shapes = pytest.mark.parametrize("shape", SHAPES)


def tuner(name, **settings):
    return quick(get_method(f"tuning/{name}"), **settings)


CAPTIONS = ["a grey cat", "a dog", "the old oak. It stands alone.", "a cat", "two dogs", "an oak"]


def targets(name):
    """Six labels, or captions for a method whose `fit` takes pairs."""
    return CAPTIONS if get_method(f"tuning/{name}").pairs else ["cat", "dog", "old oak"] * 2


@neutral
@both_shapes
def test_with_a_step_of_size_zero_it_is_zero_shot_clip(name, shape):
    encoder, x = SHAPES[shape](), pixels()
    method = tuner(name, encoder=encoder, lr=0.0).fit(x, targets(name))
    np.testing.assert_allclose(method.logits(x), zero_shot(encoder, x), atol=2e-5)
    expected = np.exp(zero_shot(encoder, x))
    np.testing.assert_allclose(method.predict_proba(x), expected / expected.sum(1, keepdims=True), atol=1e-5)
    assert list(method.predict(x)) == [NAMES[i] for i in expected.argmax(1)]


@every_tuner
@both_shapes
def test_what_is_frozen_stays_and_what_changed_is_all_that_is_written(name, shape, tmp_path):
    encoder, x = SHAPES[shape](), pixels()
    before = {n: v.clone() for n, v in encoder.state_dict().items()}
    method = tuner(name, encoder=encoder, lr=1e-2).fit(x, targets(name))
    assert all(torch.equal(v, before[n]) for n, v in encoder.state_dict().items()), "the encoder given is not changed"
    start = method._shaped(encoder)
    may = set(learning(start, method.frozen)) | method.also_changed
    moved = {n for n, v in method.encoder_.state_dict().items() if not torch.equal(v, start.state_dict()[n])}
    assert moved
    assert moved <= may
    assert abs(method.logits(x) - zero_shot(encoder, x)).max() > 1e-4
    written = load_file(method.save(tmp_path / "deep" / "tuned.safetensors"))
    assert set(written) - {"classifier"} == moved | method.also_written
    again = type(method).load(tmp_path / "deep" / "tuned.safetensors", encoder=encoder)
    np.testing.assert_array_equal(again.logits(x), method.logits(x))
    assert list(again.predict(x)) == list(method.predict(x))
    assert again.get_params().keys() == method.get_params().keys()


@merging
def test_merged_it_is_an_ordinary_encoder_of_the_same_vectors(name, tmp_path):
    encoder, x = clip_shaped(), pixels()
    method = tuner(name, encoder=encoder, lr=1e-2).fit(x, targets(name))
    merged = method.merge()
    torch.testing.assert_close(merged.images(x), method.encoder_.images(x), atol=1e-5, rtol=0)
    texts = ["a photo of a cat.", "an oak"]
    torch.testing.assert_close(merged.texts(texts), method.encoder_.texts(texts), atol=1e-5, rtol=0)
    again = clipworks.load(save(merged, tmp_path / "merged.safetensors"))
    torch.testing.assert_close(again.images(x), merged.images(x), atol=1e-6, rtol=0)


@unmerged
def test_what_cannot_be_merged_says_so(name):
    method = tuner(name, encoder=clip_shaped()).fit(pixels(), targets(name))
    with pytest.raises(ClipworksError, match=f"{type(method).__name__} cannot: use encoder_"):
        method.merge()


@pytest.mark.slow
@every_tuner
def test_it_runs_on_the_bundled_model_and_on_files(name, tmp_path):
    paths = []
    for i, colour in enumerate(((200, 30, 30), (30, 200, 30), (30, 30, 200))):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (48, 32), colour).save(paths[-1])
    method = tuner(name, batch_size=3)
    encoder = clipworks.load()
    texts = ["a red sheet", "a green sheet", "a blue sheet"]
    method.set_params(names=texts).fit(paths, texts)
    assert method.predict_proba(paths).shape == (3, 3)
    assert all(np.isfinite(v) for v in method.losses_.values())
    assert method.encoder_.fingerprint != encoder.fingerprint


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_linears_of_both_towers():
    encoder = clip_shaped()  # two blocks and one
    assert len(linears(encoder)) == 6 * 3
    assert linears(encoder, ["q", "down"], "text") == ["text.blocks.0.attention.q", "text.blocks.0.mlp.down"]
    assert all(isinstance(encoder.get_submodule(path), torch.nn.Linear) for path in linears(encoder))
    assert len(linears(vit_b16(), ["v"])) == 24
    with pytest.raises(ClipworksError, match=r"parts must be one of .* Got 'values'"):
        linears(encoder, ["values"])
    with pytest.raises(ClipworksError, match="parts must be a list"):
        linears(encoder, "q")


def test_class_rows_are_class_vectors_in_pieces_too():
    encoder = clip_shaped()
    templates = ["a {}", "a photo of a {}.", "{} on a table, seen from above"]
    recipe = ClassRecipe(dict(zip("abc", NAMES, strict=True)), templates)
    recipe.bind(encoder, None)
    whole = class_rows(encoder, recipe.tokens, 3)
    torch.testing.assert_close(whole, class_vectors(NAMES, encoder, templates=templates))
    encoder.double()
    weight = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for chunk in (99, 2):
        rows = class_rows(encoder, recipe.tokens, 3, chunk=chunk)
        found.append([rows, *torch.autograd.grad((rows * weight).sum(), list(encoder.text.parameters()))])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-9)


def test_class_words_are_encoded_once_where_the_text_tower_is_still():
    encoder = clip_shaped()
    recipe = ClassRecipe(dict(zip("abc", NAMES, strict=True)), "a {}")
    recipe.bind(encoder, None)
    assert recipe.classes(encoder) is not recipe.classes(encoder)
    encoder.text.requires_grad_(False)
    assert recipe.classes(encoder) is recipe.classes(encoder)


def test_labels_are_numbers_or_names_and_the_answers_are_alike():
    x, y = coloured()
    settings = {"encoder": clip_shaped(), "lr": 1e-2}
    by_number = quick(CLIPSVD, **settings).fit(x, y)
    by_name = quick(CLIPSVD, **settings).fit(x, [NAMES[i] for i in y])
    np.testing.assert_array_equal(by_number.logits(x), by_name.logits(x))
    assert [NAMES[i] for i in by_number.predict(x)] == list(by_name.predict(x))
    bare = quick(CLIPSVD, **settings, names=None).fit(x, [NAMES[i] for i in y])
    assert bare.names_ == NAMES


def test_alpha_is_the_line_from_the_start_and_validation_chooses_it():
    x, y = coloured()
    settings = {"encoder": clip_shaped(), "lr": 1e-2}
    start = CLIPSVD()._shaped(settings["encoder"]).state_dict()
    full, third = (quick(CLIPSVD, alpha=a, **settings).fit(x, y).encoder_.state_dict() for a in (1.0, 0.3))
    for name, value in third.items():
        torch.testing.assert_close(value, 0.7 * start[name] + 0.3 * full[name])
    held = coloured(9, seed=1)
    chosen = quick(CLIPSVD, alpha=None, **settings).fit(x, y, validation=held)
    each = {a / 10: quick(CLIPSVD, alpha=a / 10, **settings).fit(x, y).score(*held) for a in range(11)}
    assert chosen.score(*held) == max(each.values())
    assert chosen.alpha_ == min(a for a, v in each.items() if v == max(each.values()))


@pytest.mark.parametrize(
    ("images", "y", "settings", "says"),
    [
        (pixels(2), None, {}, "y must have one entry per image"),
        (pixels(2), [0], {}, "one entry per image .2.. Got shape .1,."),
        (pixels(2), [0, 3], {}, "y must hold only labels of the 3 classes, numbers from 0 to 2. Got 3"),
        (pixels(2), ["cat", "dgo"], {}, "Did you mean 'dog'"),
        (pixels(2), [0, 1], {"names": None}, "names must be given"),
        (pixels(2), ["cat", "cat"], {"names": None}, "names must hold at least 2 classes. Got .'cat'."),
        (pixels(2)[:, :2], [0, 1], {}, "shape .n, 3, H, W."),
        ("a.jpg", [0], {}, "images must be a list"),
        ([], [], {}, "at least one image"),
        (pixels(2), [0, 1], {"alpha": None}, "validation and alpha=None go together"),
        (pixels(2), [0, 1], {"alpha": 1.5}, "alpha must lie in"),
        (pixels(2), [0, 1], {"augment": "corp"}, "Did you mean 'crop'"),
        (pixels(2), [0, 1], {"batch_size": 0}, "batch_size must lie"),
    ],
)
def test_what_cannot_be_used_is_named(images, y, settings, says):
    with pytest.raises(ClipworksError, match=says):
        quick(CLIPSVD, encoder=clip_shaped(), **settings).fit(images, y)


def test_a_score_needs_a_known_label_for_every_image():
    x, y = coloured()
    fitted = quick(CLIPSVD, encoder=clip_shaped()).fit(x, y)
    for wrong, says in ((y[:2], "one entry per image"), ([9] * len(x), "Got 9"), (["cat"] * len(x), "Got 'cat'")):
        with pytest.raises(ClipworksError, match=says):
            fitted.score(x, wrong)


def test_files_of_another_encoder_or_method_are_refused(tmp_path):
    x, y = coloured()
    path = quick(CLIPSVD, encoder=clip_shaped()).fit(x, y).save(tmp_path / "a.safetensors")
    with pytest.raises(ClipworksError, match="encoder must be the one"):
        CLIPSVD.load(path, encoder=clip_shaped(seed=1))

    class Other(CLIPSVD):
        pass

    with pytest.raises(ClipworksError, match="is one of CLIPSVD"):
        Other.load(path)
    with pytest.raises(ClipworksError, match="There is none"):
        CLIPSVD.load(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BadWeights, match="not a file of a tuned encoder"):
        CLIPSVD.load(tmp_path / "c.safetensors")


def test_only_is_all_but_these():
    found = learning(clip_shaped(), only("*.norm1.weight"))
    assert set(found) == {"visual.blocks.0.norm1.weight", "visual.blocks.1.norm1.weight", "text.blocks.0.norm1.weight"}


@every_tuner
def test_the_constructor_follows_the_convention(name):
    known = inspect.signature(get_method(f"tuning/{name}")).parameters
    assert next(iter(known)) == "names"
    assert known["names"].default is None
    assert {"encoder": None, "seed": 0}.items() <= {k: p.default for k, p in known.items()}.items()
    assert all(p.kind == p.KEYWORD_ONLY for k, p in known.items() if k != "names")
