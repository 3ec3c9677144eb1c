"""Every command that works on images, through the shell's entry point, with a tiny encoder of random weights."""

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.cli.main import main
from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.loading import save
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.store.collection import Collection
from clipworks.types import Features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A weights file, photos in two folders with a damaged one among them, and a collection of them."""
    folder = tmp_path_factory.mktemp("cli")
    vision = VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=16)
    config = EncoderConfig("tiny", 8, vision, TextConfig(width=16, layers=1, heads=2, mlp_width=16),
                           PreprocessConfig(size=16))  # fmt: skip
    save(Encoder(config, CLIPTokenizer(), seed=0), folder / "tiny.safetensors")
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 255, (4, 4, 3), np.uint8)
        place = folder / "photos" / ("a" if i < 3 else "b") / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((40, 30)).save(place)
    shutil.copy(folder / "photos" / "a" / "0.png", folder / "photos" / "b" / "copy.png")
    (folder / "photos" / "a" / "0.txt").write_text("the first one")
    (folder / "photos" / "broken.jpg").write_bytes(b"not a picture")
    words = ["embed", "photos", "--out", "c", "--encoder", str(folder / "tiny.safetensors"), "--label-from", "folder"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(words) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    capsys.readouterr()


def run(capsys, *words, code=0):
    """Run a command, check its exit code and return what it printed."""
    given = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert given == code, err
    assert "Traceback" not in err
    return out, err


def read(capsys, *words, code=0):
    return json.loads(run(capsys, *words, "--json", code=code)[0])


def test_embed_again_does_nothing_and_names_the_damaged_image(capsys):
    found = read(capsys, "embed", "photos", "--out", "c", "--label-from", "folder")
    assert (found["n_added"], found["n_skipped"], found["n_rows"], found["n_left_out"]) == (0, 7, 7, 1)
    assert found["left_out"][0]["key"] == "broken.jpg"
    out, _ = run(capsys, "embed", "photos", "--out", "c", "--label-from", "folder")
    assert "7 unchanged" in out
    assert "broken.jpg" in out


def test_embed_takes_several_files_as_the_shell_gives_them(capsys, tmp_path):
    files = ["photos/a/0.png", "photos/b/3.png"]
    options = ["--out", tmp_path / "c", "--encoder", "tiny.safetensors", "--dtype", "float32"]
    found = read(capsys, "embed", *files, *options)
    assert found["n_added"] == 2
    assert Collection.open(tmp_path / "c").keys == files


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_embed_keeps_what_it_has_and_says_how_to_go_on(folder, tmp_path, sent):
    (tmp_path / "many").mkdir()
    for i in range(400):
        Image.new("RGB", (8, 8), (i % 256, i // 256, 7)).save(tmp_path / "many" / f"{i:04}.png")
    words = ["embed", tmp_path / "many", "--out", tmp_path / "c", "--encoder", folder / "tiny.safetensors"]
    words, small = [sys.executable, "-m", "clipworks", *map(str, words)], ["--batch-size", "4", "--commit-every", "8"]
    running = subprocess.Popen([*words, *small], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    data = tmp_path / "c" / "items.lance" / "data"
    while running.poll() is None and not (data.exists() and len(list(data.iterdir())) > 3):
        time.sleep(0.01)
    running.send_signal(sent)
    err = running.communicate(timeout=120)[1]
    assert running.returncode == 130, err
    assert err.splitlines()[-1] == "clipworks: stopped. The same command goes on where it stopped."
    assert "Traceback" not in err
    kept = len(Collection.open(tmp_path / "c"))
    assert 24 <= kept < 400
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["n_added"] == 400 - kept


def test_embed_of_nothing_usable_is_exit_code_1(capsys, tmp_path):
    out, _ = run(capsys, "embed", "photos/broken.jpg", "--out", tmp_path / "c", "--encoder", "tiny.safetensors", code=1)
    assert "broken.jpg" in out


def test_search_is_what_the_library_finds(capsys):
    from clipworks.store.search import search

    rows = read(capsys, "search", "c", "a red car", "-k", 3, "--columns", "caption,label")
    expected = search("c", "a red car", k=3)
    assert [r["key"] for r in rows] == expected.keys
    np.testing.assert_allclose([r["score"] for r in rows], expected.scores, atol=1e-6)
    assert set(rows[0]) == {"rank", "key", "score", "caption", "label"}
    parts = ["--image", "photos/a/1.png", "--negative", "rain", "--weights", "0,1,-0"]
    both = read(capsys, "search", "c", "a car", *parts)
    assert both[0]["key"] == "a/1.png"
    assert both[0]["score"] > 0.999
    assert {r["key"].split("/")[0] for r in read(capsys, "search", "c", "x", "--where", "label = 'b'")} == {"b"}


def test_search_as_csv_and_as_table(capsys):
    out, _ = run(capsys, "search", "c", "a red car", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [int(r["rank"]) for r in rows] == list(range(1, 8))
    out, _ = run(capsys, "search", "c", "a red car")
    assert out.splitlines()[0].split() == ["rank", "key", "score"]
    assert len(out.splitlines()) == 9


def test_similar_leaves_the_image_itself_out(capsys):
    rows = read(capsys, "similar", "c", "a/0.png", "-k", 2)
    assert rows[0]["key"] == "b/copy.png"
    assert len(rows) == 2


@pytest.mark.parametrize("source", ["c", "photos"])
def test_classify_a_collection_and_a_folder_alike(capsys, source):
    more = [] if source == "c" else ["--encoder", "tiny.safetensors"]
    rows = read(capsys, "classify", source, "--names", "cat, dog", "--top", 2, *more)
    assert {r["key"] for r in rows} == {f"a/{i}.png" for i in range(3)} | {f"b/{i}.png" for i in (3, 4, 5, "copy")}
    for r in rows:
        assert sum(r["top"].values()) == pytest.approx(1, abs=1e-5)
        assert r["label"] == max(r["top"], key=r["top"].get)
    counted = read(capsys, "classify", source, "--names", "cat,dog", "--counts", *more)
    labels = [r["label"] for r in rows]
    assert {r["label"]: r["images"] for r in counted} == {name: labels.count(name) for name in ("cat", "dog")}


def test_classify_with_names_and_templates_from_files(capsys, tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\ndog, large\n", encoding="utf-8")
    (tmp_path / "sentences.txt").write_text("a {}.\nthe {}.\n", encoding="utf-8")
    options = ["--names", tmp_path / "names.txt", "--top", 2]
    together = read(capsys, "classify", "c", *options, "--templates", tmp_path / "sentences.txt")
    apart = read(capsys, "classify", "c", *options, "--templates", "a {}.", "--templates", "the {}.")
    assert together == apart
    assert set(together[0]["top"]) == {"cat", "dog, large"}
    assert together != read(capsys, "classify", "c", *options, "--templates", "name")


def test_classify_reports_the_damaged_image_and_of_only_damaged_ones_is_exit_code_1(capsys):
    words = ["--names", "cat,dog", "--encoder", "tiny.safetensors"]
    assert "left out: image 'broken.jpg'" in run(capsys, "classify", "photos", *words)[1]
    run(capsys, "classify", "photos/broken.jpg", *words, code=1)


def test_dedupe_finds_the_copy(capsys):
    rows = read(capsys, "dedupe", "c", "--threshold", "0.99999")
    assert [r["key"] for r in rows] == ["a/0.png", "b/copy.png"]
    assert all(r["identical"] for r in rows)
    assert run(capsys, "dedupe", "c", "--threshold", "0.99999", "--extras")[0] == "b/copy.png\n"


def test_info_and_verify(capsys, tmp_path):
    found = read(capsys, "info", "c")
    assert (found["rows"], found["dim"], found["labels"], found["captions"]) == (7, 8, 7, 1)
    assert "rows" in run(capsys, "info", "c")[0]
    assert read(capsys, "verify", "c")["ok"]
    shutil.copytree("c", tmp_path / "c")
    data = max((tmp_path / "c" / "items.lance" / "data").iterdir(), key=lambda f: f.stat().st_size)
    spoiled = bytearray(data.read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    data.write_bytes(spoiled)
    assert data.name in run(capsys, "verify", tmp_path / "c", code=1)[0]
    run(capsys, "verify", tmp_path / "c", "--repair")
    run(capsys, "verify", tmp_path / "c")


@pytest.mark.parametrize(
    "words",
    [
        ["search", "c", "a car"],
        ["similar", "c", "a/0.png"],
        ["dedupe", "c", "--threshold", "0.9"],
        ["classify", "c", "--names", "cat,dog"],
        ["classify", "photos", "--names", "cat,dog", "--encoder", "tiny.safetensors"],
    ],
)
def test_sheets_show_the_photos(capsys, tmp_path, words):
    _, err = run(capsys, *words, "--sheet", tmp_path / "sheet.png")
    assert str(tmp_path / "sheet.png") in err
    with Image.open(tmp_path / "sheet.png") as page:
        colors = page.convert("RGB").getcolors(1 << 24)
    assert len(colors) > 2000  # photographs, not placeholders


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "d", "x"], "no collection at 'd'"),
        (["search", "photos", "x"], "is no collection"),
        (["search", "c"], "query must be"),
        (["search", "c", " "], "empty words"),
        (["search", "c", "x", "-k", "0"], "k must lie in"),
        (["search", "c", "x", "--weights", "1,b"], "numbers separated by commas"),
        (["search", "c", "x", "--columns", "captoin"], "Did you mean 'caption'"),
        (["search", "c", "x", "--sheet", "x.pgn"], "Did you mean '.png'"),
        (["search", "c", "x", "--sheet", "no/x.png"], "folder of a sheet must exist"),
        (["similar", "c", "a/0.pgn"], "Did you mean 'a/0.png'"),
        (["classify", "c", "--names", "cat,cat"], "distinct"),
        (["classify", "c", "--names", "no.txt"], "no.txt"),
        (["classify", "c", "--names", "a,b", "--templates", "a photo"], "templates must be one of"),
        (["classify", "nowhere", "--names", "a,b"], "source not found"),
        (["embed", "nowhere", "--out", "e"], "source not found"),
        (["embed", "photos"], "--out"),
        (["embed", "photos", "--out", "photos", "--encoder", "tiny.safetensors"], "no collection and not empty"),
        (["dedupe", "c", "--threshold", "2"], "threshold must lie in"),
        (["dedupe", "c", "--json", "--extras"], "--extras"),
        (["info", "d"], "no collection"),
        (["verify", "d"], "no collection"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, message):
    given = main(words)
    out, err = capsys.readouterr()
    assert given in (1, 2)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_another_encoder_is_refused_with_what_differs(capsys, tmp_path):
    vectors = torch.nn.functional.normalize(torch.randn(3, 8), dim=1).numpy()
    Collection.create(tmp_path / "c", features=Features(vectors, fingerprint="0" * 64))
    words = ["search", tmp_path / "c", "x", "--encoder", "tiny.safetensors"]
    assert "fingerprint 000000000000" in run(capsys, *words, code=1)[1]
