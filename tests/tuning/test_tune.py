"""`tune` and `clipworks tune`: the draw, what is measured before and after, options of every method, the file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipworks.cli._signature import parameters, united
from clipworks.cli.main import main
from clipworks.cli.tune import settings, targets
from clipworks.data.item import Item
from clipworks.encoders.loading import save
from clipworks.errors import ClipworksError
from clipworks.registry import get_method, methods
from clipworks.tuning.clip_svd import CLIPSVD
from clipworks.tuning.tune import find, tune
from clipworks.tuning.wise_ft import WiseFT
from clipworks.zeroshot.classifier import class_vectors

from .toys import clip_shaped

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 70, 230)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images of each of three colours."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(6):
            noise = rng.integers(-25, 25, (20, 20, 3))
            Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(clip_shaped(), tmp_path_factory.mktemp("model") / "toy.safetensors")


def test_shots_learn_and_the_others_are_measured(folder, model, tmp_path):
    report = tune(folder, "clip-svd", out=tmp_path / "a.safetensors", model=model, shots=2, lr=3e-2, steps_per_shot=20,
                  augment="none", seed=3)  # fmt: skip
    assert (report.method, report.images, report.held_out, report.alpha) == ("clip_svd", 6, 12, 1.0)
    every = sorted(p for name in sorted(COLOURS) for p in (folder / name).iterdir())
    rng = random.Random(3)
    drawn = [p for name in sorted(COLOURS) for p in rng.sample([q for q in every if q.parent.name == name], 2)]
    held = [p for p in every if p not in drawn]
    encoder, names = clip_shaped(), sorted(COLOURS)
    words = class_vectors(names, encoder, templates="a photo of a {}.")
    right = [names[i] == p.parent.name for i, p in zip((encoder.images(held) @ words.T).argmax(1), held, strict=True)]
    assert report.task["zeroshot_accuracy"][0] == pytest.approx(100 * np.mean(right))
    assert report.task["zeroshot_accuracy"][1] > report.task["zeroshot_accuracy"][0]
    again = CLIPSVD.load(tmp_path / "a.safetensors", encoder=str(model))
    found = again.score(held, [p.parent.name for p in held])
    assert report.task["zeroshot_accuracy"][1] == pytest.approx(100 * found)
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(report.as_dict()))
    same = CLIPSVD(names, encoder=encoder, lr=3e-2, steps_per_shot=20, augment="none", seed=3)
    same.fit(drawn, [p.parent.name for p in drawn])
    np.testing.assert_allclose(same.logits(held), again.logits(held), atol=1e-4)


def test_what_was_forgotten_is_read_by_the_words_of_the_probe(folder, model, tmp_path):
    probe = [Item(str(p), p, label=n) for n in ("red", "blue") for p in sorted((folder / n).iterdir())]
    options = {"model": model, "shots": 2, "augment": "none", "probe": probe, "epochs": 1}
    still = tune(folder, "wise_ft", out=tmp_path / "a.safetensors", lr=0.0, **options)
    assert still.forgotten == {"zeroshot_accuracy": 0.0, "zeroshot_mean_per_class": 0.0}
    assert {row["set"] for row in still.as_rows()} == {"task", "probe"}
    moved = tune(folder, "wise_ft", out=tmp_path / "b.safetensors", lr=0.05, **options)
    words = class_vectors(["blue", "red"], clip_shaped(), templates="a photo of a {}.")
    for side, encoder in enumerate((clip_shaped(), moved.fitted.encoder_)):
        best = (encoder.images([item.image for item in probe]) @ words.T).argmax(1)
        right = np.mean([("blue", "red")[i] == item.label for i, item in zip(best, probe, strict=True)])
        assert moved.probe["zeroshot_accuracy"][side] == pytest.approx(100 * right)
    before, after = moved.probe["zeroshot_accuracy"]
    assert moved.forgotten["zeroshot_accuracy"] == before - after


def test_an_image_that_cannot_be_read_is_left_out_and_told(folder, model, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "torn")
    for name in ("red/0.png", "blue/5.png"):
        (tmp_path / "torn" / name).write_bytes(b"no picture")
    options = {"model": model, "shots": 4, "augment": "none", "epochs": 1, "probe": tmp_path / "torn"}
    report = tune(tmp_path / "torn", "wise_ft", out=tmp_path / "a.safetensors", **options)
    assert [Path(e["key"]).name for e in report.left_out] == ["5.png", "0.png"] * 2  # of the data, and of the probe
    assert "not a known image format" in report.left_out[0]["reason"]
    assert (report.images, report.held_out) == (12, 4)
    line = ["tune", str(tmp_path / "torn"), "--method", "wise_ft", "--model", str(model), "--epochs", "1"]
    assert main([*line, "--out", str(tmp_path / "b.safetensors")]) == 0
    assert "5.png': is not a known image format" in capsys.readouterr().err
    assert main([*line, "--out", str(tmp_path)]) == 2
    assert "out must be a file" in capsys.readouterr().err
    for path in (tmp_path / "torn").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ClipworksError, match=r"data must hold images that can be used\. Got none: image"):
        tune(tmp_path / "torn", "wise_ft", out=tmp_path / "c.safetensors", model=model)


def test_alpha_is_chosen_on_half_of_the_held_out_images(folder, model, tmp_path):
    report = tune(folder, "wise_ft", out=tmp_path / "a.safetensors", model=model, shots=2, lr=1e-2, epochs=2,
                  augment="none", choose_alpha=True)  # fmt: skip
    assert report.held_out == 6
    assert report.settings["alpha"] is None
    assert report.alpha in [i / 10 for i in range(11)]
    assert WiseFT.load(tmp_path / "a.safetensors", encoder=str(model)).alpha_ == report.alpha


def test_captions_for_methods_on_pairs(folder, model, tmp_path):
    rows = [(p, f"a {p.parent.name} sheet. It is plain.") for name in COLOURS for p in (folder / name).iterdir()]
    report = tune(rows, "flyp", out=tmp_path / "a.safetensors", model=model, epochs=1, validation=rows, augment="none")
    assert report.images == 18
    assert "image_to_text_recall@1" in report.task
    with pytest.raises(ClipworksError, match="data must give every image a label"):
        tune(rows, "clip_svd", out=tmp_path / "b.safetensors", model=model)


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ("clip_svf", {}, "Did you mean 'clip_svd'"),
        ("clip_svd", {"rank": 3}, "clip_svd has no setting 'rank'"),
        ("clip_svd", {"names": ["red", "green", "bleu"]}, "Missing: 'blue'.*Did you mean 'bleu'"),
        ("clip_svd", {"names": ["red", "red", "green", "blue"]}, "names must be distinct"),
        ("clip_refine", {"choose_alpha": True}, "choose_alpha needs a method with alpha"),
        ("wise_ft", {"choose_alpha": True, "shots": 0}, "choose_alpha needs held-out images"),
    ],
)
def test_what_cannot_be_done_is_said(folder, model, tmp_path, method, changes, says):
    with pytest.raises(ClipworksError, match=says):
        tune(folder, method, out=tmp_path / "a.safetensors", model=model, **changes)


# -- the command -------------------------------------------------------------------------------------------------------


def test_every_method_is_there_and_every_setting_a_shell_can_write_is_an_option():
    names = [m.name for area in ("prompts", "tuning") for m in methods(area) if m.object[0].isupper()]
    assert sorted(targets()) == sorted(names)
    options = settings()
    for target in targets().values():
        own = {k: p for k, p in parameters(target).items() if p.type is not None}
        assert set(own) - {"names", "encoder", "seed"} <= set(options), target
    assert "lora: 2" in options["rank"].help
    assert options["rank"].type is int


def test_parameters_that_disagree_are_text():
    found = united({"small": "tuning.lora.LoRA", "run": "training.loop.train"}, leave=["data"])
    assert found["augment"].type is str
    assert found["lr"].help.startswith("of AdamW [small: 0.0002; run: 0.0005]")
    assert "data" not in found


def test_from_a_shell(folder, model, tmp_path, capsys):
    out = tmp_path / "tuned.safetensors"
    words = ["tune", str(folder), "--method", "clip-svd", "--out", str(out), "--model", str(model), "--shots", "2"]
    code = main([*words, "--parts", "q,v", "--steps-per-shot", "1", "--augment", "none", "--lr", "0.01", "--json"])
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["parts"] == ["q", "v"]
    assert found["settings"]["lr"] == 0.01
    assert (found["images"], found["held_out"]) == (6, 12)
    assert CLIPSVD.load(out, encoder=str(model)).names_ == ["blue", "green", "red"]
    assert main([*words, "--steps-per-shot", "1", "--augment", "none"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split() == ["set", "measure", "before", "after", "change"]
    assert "6 images learned, 12 held out" in printed.err
    assert main([*words, "--rank", "3"]) == 2
    assert "clip_svd has no setting 'rank'" in capsys.readouterr().err


def test_names_of_methods_are_found_with_or_without_their_room():
    assert find("tuning/clip-svd").name == "clip_svd"
    assert get_method("tuning/clip_svd") is CLIPSVD
