"""`inspect` on folders, and its command: defects found, pictures written, JSON, messages."""

import json

import numpy as np
import pytest
from parts import SIDE, flawed, good, toy
from PIL import Image

from clipworks.anomaly.inspection import inspect
from clipworks.cli.main import main
from clipworks.encoders.formats.native import save
from clipworks.errors import ClipworksError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    lots = {"good": good(12), "new/a": good(3, 7), "new/b": flawed(3)[0]}
    for name, pixels in lots.items():
        (folder / name).mkdir(parents=True)
        for i, p in enumerate(pixels):
            array = np.uint8((p.permute(1, 2, 0).numpy() * 60 + 90).clip(0, 255))
            Image.fromarray(array).save(folder / name / f"{i}.png")
    (folder / "new/a/broken.png").write_bytes(b"\x89PNG nothing")
    return folder


def test_defects_are_found_and_pictures_written(place, tmp_path):
    found = inspect(place / "new", place / "good", encoder=toy(), layers=["0"], out=tmp_path / "maps")
    assert set(found.defective) >= {"b/0.png", "b/1.png", "b/2.png"}
    best = sorted(found.rows, key=lambda r: -r["score"])[:3]
    assert {row["key"][0] for row in best} == {"b"}
    assert [e.key for e in found.errors] == ["a/broken.png"]
    files = sorted(f.name for f in (tmp_path / "maps").iterdir())
    assert files == ["a-0.png", "a-1.png", "a-2.png", "b-0.png", "b-1.png", "b-2.png"]
    assert Image.open(found.rows[0]["map"]).size == (SIDE, SIDE)


def test_the_command(place, tmp_path, capsys):
    encoder, model = toy(), tmp_path / "toy.safetensors"
    encoder.tokenizer = None  # no words are read, and the toy's tokenizer has no file form
    save(encoder, model)
    run = ["inspect", str(place / "new"), "--normal", str(place / "good"), "--encoder", str(model)]
    assert main([*run, "--layers", "0", "--json", "--bad-only"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert {row["key"] for row in rows} >= {"b/0.png", "b/1.png", "b/2.png"}
    assert all(row["defective"] and row["regions"] for row in rows)
    assert "left out: image 'a/broken.png'" in err
    assert f"{len(rows)} of 6 images score above" in err
    assert main([*run, "--out", str(tmp_path / "maps"), "--form", "npz"]) == 0
    assert len(list((tmp_path / "maps").glob("*.npz"))) == 6
    assert main(["inspect", str(place / "new"), "--method", "winclp"]) == 2
    assert "Did you mean 'winclip'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "normal must be images of good parts for 'patch_memory'"),
        ({"method": "winclip", "layers": ["0"]}, "layers are read by 'patch_memory' only"),
        ({"form": "bmp"}, "form must be one of"),
    ],
)
def test_mistakes_are_named(place, settings, message):
    with pytest.raises(ClipworksError, match=message):
        inspect(place / "new", encoder=toy(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"batch_size must lie in \[1, inf\]. Got 0"),
        ({"out": "{place}/good/0.png"}, r"out must be a folder that can be written to. Got .*: it is a file"),
        ({"images": "{place}/nothing"}, r"source not found: .*nothing"),
    ],
)
def test_mistakes_are_told_before_anything_is_learned(place, settings, message):
    given = {key: value.format(place=place) if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(ClipworksError, match=message):
        inspect(**{"images": place / "new", "normal": place / "not read", "encoder": toy(), **given})
