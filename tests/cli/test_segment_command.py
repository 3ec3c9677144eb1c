"""`clipworks segment` with a toy encoder: files, forms, bad images, messages."""

import json

import numpy as np
import pytest
from PIL import Image

from clipworks.cli.main import main
from clipworks.encoders.formats.native import save
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.segment.mask import Mask


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segment")
    save(toy_encoder(tokenizer=CLIPTokenizer()), folder / "toy.safetensors")
    (folder / "photos" / "deep").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "deep/b.png"):
        Image.fromarray(draw.integers(0, 255, (20, 30, 3)).astype(np.uint8)).save(folder / "photos" / name)
    return folder


def run(place, *options, names="sky,tree"):
    model = str(place / "toy.safetensors")
    return main(["segment", str(place / "photos"), "--names", names, "--encoder", model, *options])


def test_a_folder(place, tmp_path, capsys):
    assert run(place, "--out", str(tmp_path / "masks"), "--overlay", "--json", "--method", "naclip") == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    assert {row["key"] for row in rows} == {"a.png", "a.jpg", "deep/b.png"}
    for key in ("a.png", "a.jpg", "deep/b.png"):
        assert sum(row["share"] for row in rows if row["key"] == key) == pytest.approx(1, abs=1e-5)
    made = sorted(str(p.relative_to(tmp_path / "masks")) for p in (tmp_path / "masks").rglob("*.png"))
    assert made == ["a-overlay.png", "a.png", "a.png-overlay.png", "a.png.png", "deep/b-overlay.png", "deep/b.png"]
    labels = np.array(Image.open(tmp_path / "masks" / "deep" / "b.png"))
    share = next(row["share"] for row in rows if row["key"] == "deep/b.png" and row["name"] == "tree")
    assert (labels == 1).mean() == pytest.approx(share, abs=1e-5)
    assert "3 in" in printed.err
    assert "sky, tree" in printed.err


def test_one_image_in_other_forms(place, tmp_path, capsys):
    image = str(place / "photos" / "a.jpg")
    options = ["segment", image, "--names", "sky,tree", "--encoder", str(place / "toy.safetensors")]
    for form in ("npz", "json"):
        assert main([*options, "--out", str(tmp_path), "--format", form, "--background", "0.5", "--csv"]) == 0
    assert Mask.load(tmp_path / "a.npz").names == ["background", "sky", "tree"]
    assert isinstance(json.loads((tmp_path / "a.json").read_text()), list)
    assert capsys.readouterr().out.startswith("key,name,share,mean,largest\n")


def test_a_bad_image_is_left_out(place, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    model = str(place / "toy.safetensors")
    assert main(["segment", str(tmp_path), "--names", "sky,tree", "--encoder", model]) == 1
    assert "left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--format", "gif"], "--format must be one of"), (["--overlay"], "--overlay needs --out"),
     (["--method", "nacli"], "Did you mean 'naclip'"), (["--refine", "crv"], "Did you mean 'crf'")],
)  # fmt: skip
def test_messages(place, options, message, capsys):
    assert run(place, *options) == 2
    assert message in capsys.readouterr().err


def test_one_name_needs_a_background(place, tmp_path, capsys):
    assert run(place, names="sky") == 2
    assert "names must hold two names or more where there is no --background" in capsys.readouterr().err
    assert run(place, "--background", "0.5", "--json", names="sky") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{file}"], "out must be a folder that can be written to. Got '{file}': it is a file."),
        (["--out", "{file}/x"], "out must be a folder that can be written to. Got '{file}/x': "),
        (["--json", "--csv"], "give one of --json and --csv, not both"),
        (["--side", "100000"], "side must lie in [4, 4096]. Got 100000."),
        (["--background", "nan"], "must be a number from 0 to 1, 'words', 'objects' or several words. Got 'nan'."),
        (["--method", "no.safetensors"], "a name or a .safetensors file. Nothing is at 'no.safetensors'."),
    ],
)
def test_mistakes_are_told_before_any_image_is_read(place, tmp_path, capsys, monkeypatch, options, message):
    from clipworks.data import sources

    monkeypatch.setattr(sources, "open_source", lambda *_: pytest.fail("an image was read"))
    file = tmp_path / "file"
    file.write_text("a file")
    assert run(place, *(option.format(file=file) for option in options)) == 2
    assert message.format(file=file) in capsys.readouterr().err
