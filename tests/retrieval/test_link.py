"""`link` and its command: a table of records, tuned on another, against the functions themselves."""

import csv
import json

import numpy as np
import pytest
from inversion_checks import encoder
from PIL import Image

from clipworks.cli.main import main
from clipworks.encoders.loading import save
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.retrieval.clippings import link_records, tune_links
from clipworks.retrieval.link import link


@pytest.fixture(scope="module")
def model():
    return encoder()


def table(path, groups, seed):
    """Records of groups: an image with little noise, and a text of the group's own words."""
    rng = np.random.default_rng(seed)
    path.mkdir()
    with (path / "records.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "text", "label"])
        for g in groups:
            base = rng.integers(0, 256, (16, 16, 3))
            for i in range(3):
                noisy = (base + rng.integers(-10, 11, base.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(path / f"{g}{i}.png")
                writer.writerow([f"{g}{i}.png", f"firm {g} works {i}", g])
    return path / "records.csv"


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    root = tmp_path_factory.mktemp("link")
    return table(root / "one", "abcde", 0), table(root / "two", "vwxyz", 1)


def test_groups_are_those_of_the_functions(model, tables):
    found = link(tables[0], encoder=model, validation=tables[1])
    with tables[1].open() as stream:
        rows = list(csv.DictReader(stream))
    image = model.images([tables[1].parent / r["image"] for r in rows])
    text = model.texts([r["text"] for r in rows])
    tuned = tune_links(image, text, [r["label"] for r in rows])
    assert (found.weight, found.threshold) == (tuned.weight, tuned.threshold)
    with tables[0].open() as stream:
        rows = list(csv.DictReader(stream))
    image = model.images([tables[0].parent / r["image"] for r in rows])
    text = model.texts([r["text"] for r in rows])
    expected = link_records(image, text, weight=tuned.weight, threshold=tuned.threshold)
    assert np.array_equal(found.groups, expected)
    assert found.keys == [r["image"] for r in rows]
    assert set(found.scores) >= {"ari", "precision", "recall"}


def test_all_apart_and_all_together(model, tables):
    apart = link(tables[0], encoder=model, threshold=0.0)
    assert apart.as_rows() == []
    assert len(apart.as_rows(alone=True)) == 15
    together = link(tables[0], encoder=model, threshold=2.0)
    assert {row["group"] for row in together.as_rows()} == {1}
    assert all(row["nearest"] <= 1 for row in together.as_rows())


def test_the_command(tables, tmp_path, capsys):
    save(toy_encoder(tokenizer=CLIPTokenizer()), tmp_path / "tiny.safetensors")
    words = ["link", str(tables[0]), "--encoder", str(tmp_path / "tiny.safetensors"), "--threshold", "2", "--json"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 15
    assert "ari 0.000" in err


def test_mistakes_are_named(model, tables, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "bare.csv").write_text("image\na.png\n")
    with pytest.raises(ClipworksError, match=r"every image a text\. 1 of 1 have none"):
        link(tmp_path / "bare.csv", encoder=model)
    (tmp_path / "plain.csv").write_text("image,text\na.png,words\n")
    with pytest.raises(ClipworksError, match="a label for every record"):
        link(tables[0], encoder=model, validation=tmp_path / "plain.csv")


def test_images_outside_the_folder_of_the_table(model, tables, tmp_path):
    absolute = tables[0].read_text().splitlines()
    lines = [absolute[0], *(f"{tables[0].parent}/{line}" for line in absolute[1:])]
    (tmp_path / "moved.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ClipworksError, match="allow_outside=True"):
        link(tmp_path / "moved.csv", encoder=model)
    moved = link(tmp_path / "moved.csv", encoder=model, allow_outside=True)
    assert np.array_equal(moved.groups, link(tables[0], encoder=model).groups)
    with pytest.raises(ClipworksError, match=r"linkage must be one of 'single', 'average'\. Got 'complete'"):
        link(tables[0], encoder=model, linkage="complete")
