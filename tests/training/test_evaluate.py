"""Zero-shot accuracy and recall against plain counting."""

from __future__ import annotations

import numpy as np
import pytest

from clipworks.data.item import Item
from clipworks.errors import ClipworksError
from clipworks.training.evaluate import Probe, evaluate, recalls, zeroshot
from clipworks.training.recipe import ContrastiveRecipe
from clipworks.training.towers import Towers

from .toy import CLASSES, drawings, infonce, tiny


def _unit(rows, dim, seed):
    x = np.random.default_rng(seed).normal(size=(rows, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_recall_by_counting():
    image, text = _unit(40, 6, 0), _unit(25, 6, 1)
    owner = np.random.default_rng(2).integers(0, 25, 40)
    owner[:25] = np.arange(25)
    got = recalls(image, text, owner, cutoffs=(1, 3, 10))
    for k in (1, 3, 10):
        hits = [owner[i] in np.argsort(-(text @ image[i]))[:k] for i in range(40)]
        assert got[f"image_to_text_recall@{k}"] == pytest.approx(100 * np.mean(hits))
        hits = [any(owner[i] == c for i in np.argsort(-(image @ text[c]))[:k]) for c in range(25)]
        assert got[f"text_to_image_recall@{k}"] == pytest.approx(100 * np.mean(hits))
    assert got["image_to_text_recall@1"] <= got["image_to_text_recall@3"] <= got["image_to_text_recall@10"]


def test_perfect_features_have_full_recall_both_ways():
    rows = _unit(12, 8, 0)
    assert set(recalls(rows, rows, np.arange(12)).values()) == {100.0}
    shared = recalls(np.repeat(rows, 5, axis=0), rows, np.repeat(np.arange(12), 5))
    assert set(shared.values()) == {100.0}


def test_zero_shot_by_counting():
    image, classes = _unit(30, 5, 0), _unit(4, 5, 1)
    target = np.array([0] * 20 + [1] * 5 + [2] * 5)
    hit = (image @ classes.T).argmax(1) == target
    got = zeroshot(image, classes, target)
    assert got["zeroshot_accuracy"] == pytest.approx(100 * hit.mean())
    by_class = [hit[:20].mean(), hit[20:25].mean(), hit[25:].mean()]
    assert got["zeroshot_mean_per_class"] == pytest.approx(100 * np.mean(by_class))


def test_evaluation_equals_the_encoder_by_hand():
    encoder = tiny(3)
    items = [Item(str(i), image, words, CLASSES[i % 8]) for i, (image, words) in enumerate(drawings(19))]
    towers = Towers(encoder, ContrastiveRecipe(infonce)).train()
    got = evaluate(towers, encoder, Probe.open(items, None, ["a {}", "photo of {}"]), batch_size=4)
    image = encoder.images([item.image for item in items]).numpy()
    rows = [encoder.texts([t.format(c) for t in ("a {}", "photo of {}")]).numpy().mean(0) for c in sorted(CLASSES)]
    guess = (image @ np.array([r / np.linalg.norm(r) for r in rows]).T).argmax(1)
    hit = [sorted(CLASSES)[g] == item.label for g, item in zip(guess, items, strict=True)]
    assert got["zeroshot_accuracy"] == pytest.approx(100 * np.mean(hit))
    captions = list(dict.fromkeys(i.caption for i in items))
    owner = np.array([captions.index(i.caption) for i in items])
    assert got.items() >= recalls(image, encoder.texts(captions).numpy(), owner).items()
    assert towers.training


@pytest.mark.parametrize(
    ("items", "names", "says"),
    [
        ([Item("a", caption="x"), Item("b")], None, "a label, or every image a caption"),
        ([Item("a", label="cat"), Item("b", label="dog")], ["cat", "dgo"], "Missing: 'dog'. Did you mean 'dgo'"),
        ([Item("a", caption="x")], ["cat"], "names need labels"),
        ([], None, "validation holds no images"),
    ],
)
def test_what_a_probe_refuses(items, names, says):
    with pytest.raises(ClipworksError, match=says):
        Probe.open(items, names)
