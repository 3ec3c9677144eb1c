"""`clipworks classify` with labelled images and named methods, through the shell's entry point."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipworks.cli.main import main
from clipworks.encoders.loading import save
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder

SHARED = Path(__file__).parents[3] / "shared" / "data"
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 210)}


def paint(path, color, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.array(color) + rng.integers(-20, 20, (4, 4, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).resize((24, 20)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights, photos of three colours and a damaged one, four labelled photos of each colour and two that fail."""
    folder, rng = tmp_path_factory.mktemp("classify"), np.random.default_rng(0)
    save(toy_encoder(tokenizer=CLIPTokenizer()), folder / "toy.safetensors")
    for name, color in COLORS.items():
        for i in range(4):
            paint(folder / "photos" / f"{name}-{i}.png", color, rng)
            paint(folder / "labelled" / name / f"{i}.png", color, rng)
    (folder / "photos" / "broken.jpg").write_bytes(b"not a picture")
    (folder / "labelled" / "red" / "torn.jpg").write_bytes(b"not a picture")
    rows = [f"labelled/{name}/{i}.png,{name}" for name in COLORS for i in range(4)]
    (folder / "shots.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    told = {"red": ["a warm colour"], "green": ["a colour of leaves"], "blue": ["a cold colour", "a colour of the sky"]}
    (folder / "told.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    capsys.readouterr()


def run(capsys, *words, code=0):
    given = main(["classify", *map(str, words), "--encoder", "toy.safetensors"])
    out, err = capsys.readouterr()
    assert given == code, err
    assert "Traceback" not in err
    return out, err


NAMED = ("photos", "--names", "red,green,blue", "--shots", "labelled")


def right(rows):
    return [row["label"] == row["key"].split("-")[0] for row in rows]


@pytest.mark.parametrize("method", ["ridge", "Nearest-Mean", "few_shot_inspection", "knn"])
def test_a_head_by_its_name_learns_from_the_labelled_images(capsys, method):
    out, err = run(capsys, *NAMED, "--method", method, "--json")
    rows = json.loads(out)
    assert len(rows) == 12
    assert all(right(rows))
    assert "left out of the shots: image 'red/torn.jpg'" in err
    assert "left out: image 'broken.jpg'" in err


def test_a_table_of_shots_without_names_gives_the_same(capsys):
    out = run(capsys, "photos", "--shots", "shots.csv", "--method", "ridge", "--csv")[0]
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 12
    assert all(right(rows))
    folder = list(csv.DictReader(io.StringIO(run(capsys, *NAMED, "--method", "ridge", "--csv")[0])))
    assert [r["key"] for r in folder] == [r["key"] for r in rows]
    one, two = ([float(r["probability"]) for r in table] for table in (folder, rows))
    np.testing.assert_allclose(one, two, atol=1e-4)


def test_auto_prints_its_leaderboard_its_reason_and_the_nearest_shots(capsys):
    out = run(capsys, *NAMED, "--method", "auto", "--explain", "--budget", 10)[0]
    board, rows = out.split("\n\n")
    assert board.split()[:4] == ["method", "accuracy", "error", "behind"]
    assert {"zero_shot", "ridge", "gda", "linear_probe"} <= {line.split()[0] for line in board.splitlines()[2:-1]}
    assert sum("chosen" in line for line in board.splitlines()) == 1
    assert "shots held out" in board.splitlines()[-1]
    for color in COLORS:
        (line,) = [line for line in rows.splitlines() if line.startswith(f"{color}-0.png")]
        assert f"like {color}/" in line


def test_auto_is_what_shots_without_a_method_mean(capsys):
    out, _ = run(capsys, *NAMED, "--explain", "--budget", 10, "--json")
    found = json.loads(out)
    assert found["method"].startswith("auto: ")
    line = {row["method"]: row for row in found["leaderboard"]}
    chosen = line[found["method"].removeprefix("auto: ")]
    assert chosen["note"] == "chosen"
    assert chosen["accuracy"] >= line["zero_shot"]["accuracy"]
    assert len(found["images"]) == 12
    assert all(right(found["images"]))
    assert [e["key"] for e in found["left_out"]] == ["broken.jpg"]
    assert [e["key"] for e in found["shots_left_out"]] == ["red/torn.jpg"]
    counted = json.loads(run(capsys, *NAMED, "--budget", 10, "--counts", "--json")[0])
    assert {row["label"]: row["images"] for row in counted} == dict.fromkeys(COLORS, 4)


def test_of_csv_the_leaderboard_goes_to_stderr(capsys):
    out, err = run(capsys, *NAMED, "--explain", "--budget", 0, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["key", "label", "probability", "why"]
    assert "method zero_shot, accuracy " in err
    assert "not begun: the budget of 0 s was spent" in err


def test_descriptions_explain_themselves(capsys):
    words = ["photos", "--names", "red,green,blue", "--method", "classify_by_description"]
    found = json.loads(run(capsys, *words, "--descriptions", "told.json", "--explain", "--json")[0])
    whys = " ".join(row["why"] for row in found["images"])
    assert "colour" in whys
    assert found["leaderboard"] == []
    plain = json.loads(run(capsys, *words, "--descriptions", "told.json", "--json")[0])
    assert [r["label"] for r in plain] == [r["label"] for r in found["images"]]


def test_names_alone_can_be_explained(capsys):
    out = run(capsys, "photos", "--names", "red,green", "--explain")[0]
    assert out.count("words: ") == 12
    alone = run(capsys, "photos", "--names", "red,green")[0]
    assert [line.split()[1] for line in alone.splitlines()] == [line.split()[1] for line in out.splitlines()]


def test_a_collection_is_sorted_like_its_folder(capsys):
    assert main(["embed", "photos", "--out", "c", "--encoder", "toy.safetensors", "--dtype", "float32"]) == 0
    capsys.readouterr()
    of_folder = json.loads(run(capsys, *NAMED, "--method", "ridge", "--json")[0])
    found = json.loads(run(capsys, "c", *NAMED[1:], "--method", "ridge", "--json")[0])
    assert [(r["key"], r["label"]) for r in found] == [(r["key"], r["label"]) for r in of_folder]
    some = json.loads(run(capsys, "c", *NAMED[1:], "--method", "ridge", "--where", "key = 'red-1.png'", "--json")[0])
    assert [r["key"] for r in some] == ["red-1.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos"], "names must be given, or shots"),
        (["photos", "--names", "red"], "at least 2 classes to choose between. Got 'red' alone"),
        (["photos", "--names", "red,red", "--shots", "labelled"], "distinct"),
        (["photos", "--names", "red,,green", "--shots", "labelled"], "names must be words"),
        (["photos", "--names", "red,green", "--shots", "labelled"], "'blue/0.png' is of 'blue'"),
        (["photos", "--names", "red,green,blu", "--shots", "labelled"], "Did you mean 'blu'"),
        (["photos", "--names", "red,green,blue,pink", "--shots", "labelled", "--method", "ridge"], "none of 'pink'"),
        (["photos", "--shots", "labelled/red"], "at least 2 labelled images that can be used. Got 0"),
        (["photos", "--names", "red,green,blue", "--shots", "nowhere"], "shots: source not found"),
        (["photos", "--shots", "labeled"], "shots: source not found: 'labeled'. Did you mean 'labelled'?"),
        (["photos", "--shots", "photos"], "Got 0; left out: image 'broken.jpg': "),
        (["photos", "--shots", "photos"], "Labels are the names of subfolders, or a table's column."),
        (["photos", "--names", "nams.txt"], "names must be in a text file that can be read. Got 'nams.txt': No such"),
        (["photos", "--names", "red,green", "--templates", "a photo"], "or a sentence with {} where the name goes"),
        (["photos", "--names", "red,green", "--templates", "nams.txt"], "templates must be in a text file"),
        (["photos", "--names", "red,green,blue", "--method", "ridge"], "give shots"),
        (["photos", "--names", "red,green,blue", "--method", "ridgee"], "Did you mean 'ridge'"),
        (["photos", "--names", "red,green,blue", "--method", "fudd"], "give descriptions"),
        (["photos", "--names", "red,green,blue", "--budget", "3"], "budget must be left out"),
        (["photos", "--shots", "labelled", "--budget", "-3"], "budget must lie in [0, inf]. Got -3.0"),
        (["nowhere", "--names", "red,green", "--method", "ridge"], "give shots"),  # before any image is looked for
        (["nowhere", "--names", "red,green", "--method", "fudd"], "give descriptions"),
        (["nowhere", "--names", "red,green", "--method", "waffleclip", "--templates", "imagenet"], "Got 80"),
        (["nowhere", "--shots", "labelled", "--names", "red,green,blue,pink", "--method", "gda"], "none of 'pink'"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, message):
    out, err = run(capsys, *words, code=2)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_one_class_and_one_sample_are_refused(capsys, tmp_path, folder):
    shutil.copytree(folder / "labelled" / "green", tmp_path / "one" / "green")
    said = run(capsys, "photos", "--shots", tmp_path / "one", code=2)[1]
    assert "shots must be of at least 2 classes where names are not given. Got 'green' alone" in said
    (tmp_path / "single" / "green").mkdir(parents=True)
    shutil.copy(folder / "labelled" / "green" / "0.png", tmp_path / "single" / "green")
    words = ["photos", "--names", "red,green", "--shots", tmp_path / "single"]
    assert "at least 2 labelled images that can be used. Got 1" in run(capsys, *words, code=2)[1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data is not beside the checkout")
@pytest.mark.shared_data
def test_real_photos_with_the_bundled_model(capsys, tmp_path):
    """PACS, four shots per class: auto is about as good as zero-shot or better on photos that it has not seen."""
    for kind in sorted((SHARED / "pacs-128" / "photo").iterdir()):
        files = sorted(kind.iterdir())
        for part, some in (("labelled", files[:4]), ("photos", files[50:55])):
            (tmp_path / part / kind.name).mkdir(parents=True)
            for file in some:
                shutil.copy(file, tmp_path / part / kind.name)
    (tmp_path / "photos" / "torn.jpg").write_bytes(b"no picture")
    words = ["classify", str(tmp_path / "photos"), "--shots", str(tmp_path / "labelled"), "--json", "--explain"]
    accuracy, found = {}, {}
    for name, more in (("auto", ["--budget", "20"]), ("ridge", ["--method", "ridge"])):
        assert main([*words, *more]) == 0
        found[name] = json.loads(capsys.readouterr().out)
        accuracy[name] = np.mean([row["label"] == row["key"].split("/")[0] for row in found[name]["images"]])
    names = ",".join(sorted(p.name for p in (SHARED / "pacs-128" / "photo").iterdir()))
    assert main(["classify", str(tmp_path / "photos"), "--names", names, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    accuracy["zero_shot"] = np.mean([row["label"] == row["key"].split("/")[0] for row in rows])
    assert accuracy["auto"] >= accuracy["zero_shot"] - 0.1
    assert accuracy["ridge"] > 3 / 7
    assert [e["key"] for e in found["auto"]["left_out"]] == ["torn.jpg"]
    like = [row["why"].split("(")[1].split(",")[0] == row["label"] for row in found["auto"]["images"]]
    assert np.mean(like) > 0.5  # the nearest shot is mostly of the class that was given
