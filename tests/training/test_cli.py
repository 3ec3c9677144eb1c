"""The commands, from the shell's words to the files they leave."""

from __future__ import annotations

import json

import pytest

from clipworks.cli.main import main

from .toy import drawings

MODEL = {
    "name": "tiny", "dim": 16,
    "vision": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "heads": 1, "mlp_width": 32},
    "text": {"context_length": 16, "width": 16, "layers": 1, "heads": 1, "mlp_width": 32},
    "preprocess": {"size": 32},
}  # fmt: skip
QUICK = ["--device", "cpu", "--batch-size", "4", "--epochs", "1", "--workers", "1"]


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder with captioned pictures, one with labelled pictures, and a configuration."""
    for name in ("pairs", "classes/red", "classes/blue"):
        (tmp_path / name).mkdir(parents=True)
    for number, (image, words) in enumerate(drawings(8)):
        image.save(tmp_path / "pairs" / f"{number}.png")
        (tmp_path / "pairs" / f"{number}.txt").write_text(words)
        image.save(tmp_path / "classes" / ("red" if number % 2 else "blue") / f"{number}.png")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_and_go_on(room, capsys):
    words = ["train", "pairs", "--model", "model.json", "--out", "run", "--validation", "pairs", "--json", *QUICK]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2
    assert found["metrics"]["image_to_text_recall@10"] == 100.0
    assert (room / "run" / "model.safetensors").exists()
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["resumed_from"] == 2


def test_finetune_shows_what_was_forgotten(room, capsys):
    words = ["finetune", "classes", "--model", "model.json", "--preset", "head", "--out", "run", "--probe", "pairs",
             "--validation", "classes", "--templates", "a {}", *QUICK]  # fmt: skip
    assert main(words) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["set", "measure", "before", "after", "change"]
    assert any(line.split()[:2] == ["task", "head_accuracy"] for line in table)
    assert any(line.startswith("probe") and line.endswith("0.000") for line in table)
    assert json.loads((room / "run" / "forgetting.json").read_text())["names"] == ["blue", "red"]


def test_distil_and_go_on(room, capsys):
    assert main(["train", "pairs", "--model", "model.json", "--out", "teacher", *QUICK]) == 0
    words = ["distill", "pairs", "teacher/model.safetensors", "--student", "model.json", "--out", "run", "--losses",
             "fd=2000,clip=1", "--views", "2", "--json", *QUICK]  # fmt: skip
    capsys.readouterr()
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["losses"]) == {"loss", "fd", "clip"}
    assert list((room / "run" / "teacher").rglob("rows-*.safetensors"))
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["resumed_from"] == 2


def test_a_recipe_by_name_with_arguments(room, capsys):
    words = ["train", "pairs", "--model", "model.json", "--out", "run", "--json", *QUICK, "--recipe"]
    assert main([*words, "slip(hidden=8, out=4, strong='standard')"]) == 0
    assert set(json.loads(capsys.readouterr().out)["losses"]) == {"loss", "infonce", "simclr"}
    assert main([*words, "flip"]) == 2  # the folder holds another run
    assert "recipe differs from the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "pairs", "--model", "model.json", "--out", "run", "--recipe", "slp"], "Did you mean 'slip'?"),
        (["train", "pairs", "--model", "model.json", "--out", "run", "--schedule", "cosin"], "Did you mean 'cosine'?"),
        (["train", "classes", "--model", "model.json", "--out", "run"], "must give every image a caption"),
        (["train", "pairs", "--model", "absent.json", "--out", "run", *QUICK], "absent.json"),
        (["finetune", "classes", "--model", "model.json", "--out", "run", "--names", "red,bleu"], "Missing: 'blue'"),
        (["train", "pairs"], "--out"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(room, capsys, words, says):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
