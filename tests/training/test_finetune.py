"""Fine-tuning presets: what moves, what stays, what is reported."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from clipworks.data.item import Item
from clipworks.errors import ClipworksError
from clipworks.training.finetune import finetune
from clipworks.training.presets import PRESETS
from clipworks.zeroshot.classifier import class_vectors

from .toy import CLASSES, drawings, tiny, weights

QUICK = {"epochs": 2, "batch_size": 16, "lr": 1e-3, "templates": "a photo of a {}", "device": "cpu", "workers": 1}


def _labelled(count, seed=0):
    return [Item(str(i), image, label=CLASSES[i % 8]) for i, (image, _) in enumerate(drawings(count, seed))]


def _captioned(count, seed=0):
    return [Item(str(i), image, caption=words) for i, (image, words) in enumerate(drawings(count, seed))]


def _moved(encoder):
    before, after = weights(tiny()), weights(encoder)
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_move_what_they_say(tmp_path, preset):
    start = tiny()
    sets = {"probe": _captioned(8, 1), "validation": _labelled(16, 2)}
    report = finetune(_labelled(32), start, preset, out=tmp_path, **sets, **QUICK)
    assert not _moved(start)
    moved = _moved(report.encoder)
    assert "log_scale" not in moved
    assert bool(moved) == (preset != "head")
    assert any(n.startswith("text.") for n in moved) == (preset == "flyp")
    assert report.alpha == (0.5 if preset == "wise-ft" else 1.0)
    assert len(report.stages) == (2 if preset == "lp-ft" else 1)
    saved = json.loads((tmp_path / "forgetting.json").read_text())
    assert saved == json.loads(json.dumps(report.as_dict()))
    assert set(saved["forgotten"]) == set(report.probe) >= {"image_to_text_recall@1"}
    assert {row["set"] for row in report.as_rows()} == {"task", "probe"}
    if preset == "head":
        assert set(report.forgotten.values()) == {0.0}
    if preset != "flyp":
        assert load_file(report.head)["weight"].shape == (8, 32)
        assert report.names == sorted(CLASSES)
        assert "head_accuracy" in report.task


def test_the_head_begins_as_the_class_words(tmp_path):
    report = finetune(_labelled(16), tiny(), "full", out=tmp_path, validation=_labelled(24, 2), alpha=0.0, **QUICK)
    assert not _moved(report.encoder)  # alpha 0 is the start
    expected = class_vectors(sorted(CLASSES), tiny(), templates="a photo of a {}")
    assert torch.equal(load_file(report.head)["weight"], expected)
    assert report.task["head_accuracy"][1] == report.task["zeroshot_accuracy"][0]


def test_a_head_learns_and_wise_ft_is_the_middle(tmp_path):
    options = {**QUICK, "epochs": 6, "lr": 5e-2, "validation": _labelled(80, 2)}
    head = finetune(_labelled(160), tiny(), "head", out=tmp_path / "h", **options)
    assert head.task["head_accuracy"][1] > head.task["head_accuracy"][0] + 20
    full = finetune(_labelled(32), tiny(), "full", out=tmp_path / "f", **QUICK)
    middle = finetune(_labelled(32), tiny(), "wise-ft", out=tmp_path / "w", **QUICK)
    for name, start in weights(tiny()).items():
        tuned = weights(full.encoder)[name]
        assert torch.allclose(weights(middle.encoder)[name], (start + tuned) / 2, atol=1e-6), name


def test_captions_are_contrasted(tmp_path):
    both = finetune(_captioned(32), tiny(), "full", out=tmp_path / "full", **QUICK)
    assert any(n.startswith("text.") for n in _moved(both.encoder))
    assert both.head is None
    ends = finetune(_captioned(32), tiny(), "head", out=tmp_path / "head", **QUICK)
    assert _moved(ends.encoder) == {"visual.projection.weight", "text.projection.weight"}


def test_names_translate_labels(tmp_path):
    items = [Item(str(i), image, label=f"n{i % 2}") for i, (image, _) in enumerate(drawings(8))]
    names = {"n0": "red square", "n1": "red cross"}
    report = finetune(items, tiny(), "head", out=tmp_path, names=names, validation=items, **QUICK)
    assert report.names == ["red square", "red cross"]


@pytest.mark.parametrize(
    ("items", "changes", "says"),
    [
        ([Item("a"), Item("b")], {}, "caption"),
        (_labelled(4), {"preset": "wiseft"}, "Did you mean 'wise-ft'"),
        (_labelled(4), {"names": ["red sqare"]}, "Missing: 'green cross'|Missing: 'green square'"),
        (_captioned(4), {"names": ["cat"]}, "names need labels, and data has none"),
        ([*_labelled(4), Item("z", drawings(1)[0][0])], {}, "1 have none, for example 'z'"),
        (_labelled(4), {"alpha": 2}, r"alpha must lie in \[0, 1\]"),
    ],
)
def test_mistakes_are_named(tmp_path, items, changes, says):
    with pytest.raises(ClipworksError, match=says):
        finetune(items, tiny(), **{**QUICK, "out": tmp_path, **changes})
