"""Hugging Face datasets, made in memory and on disk: nothing is downloaded."""

import pytest
from made_images import corners, encoded

from clipworks.data.sources import open_source
from clipworks.errors import BadImage, ClipworksError, MissingExtra, UnknownName

datasets = pytest.importorskip("datasets")
PNG = encoded(corners())


@pytest.fixture
def data():
    features = datasets.Features({
        "picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]),
        "caption": [datasets.Value("string")], "year": datasets.Value("int64"),
    })  # fmt: skip
    rows = {"picture": [{"bytes": PNG, "path": None}] * 3, "label": [0, 1, 1], "caption": [["a", "b"], [], ["c"]],
            "year": [1, 2, 3]}  # fmt: skip
    return datasets.Dataset.from_dict(rows, features=features)


def row(item):
    return item.key, item.caption, item.label, item.columns


EXPECTED = [
    ("train#0", "a", "cat", {"year": 1}), ("train#1", None, "dog", {"year": 2}), ("train#2", "c", "dog", {"year": 3}),
]  # fmt: skip


def test_a_dataset_in_memory(data):
    source = open_source(data)
    assert [row(item) for item in source] == EXPECTED
    assert len(source) == 3
    assert all(isinstance(item.image, bytes) and item.decode().size == (12, 8) for item in source)


def test_saved_and_with_splits(data, tmp_path):
    data.save_to_disk(tmp_path / "one")
    assert [row(item) for item in open_source(tmp_path / "one")] == EXPECTED
    both = datasets.DatasetDict({"train": data, "test": data.select([2])})
    both.save_to_disk(tmp_path / "two")
    for spec in (both, tmp_path / "two"):
        assert len(open_source(spec)) == 3
        assert [item.caption for item in open_source(spec, split="test")] == ["c"]
        with pytest.raises(UnknownName, match=r"split must be one of 'train', 'test'.*Did you mean 'test'"):
            open_source(spec, split="tests")


def test_a_stream_has_no_length_but_the_same_items(data):
    source = open_source(data.to_iterable_dataset())
    assert [row(item) for item in source] == EXPECTED
    with pytest.raises(TypeError):
        len(source)


def test_keys_and_columns(data):
    assert [item.key for item in open_source(data, key_column="year")] == ["1", "2", "3"]
    with pytest.raises(ClipworksError, match=r"duplicate key '1' .*row 1 and row 2"):
        open_source(data, key_column="label")
    with pytest.raises(UnknownName, match="image_column must be one of"):
        open_source(data, image_column="pictures")
    with pytest.raises(ClipworksError, match="no column that looks like an image"):
        open_source(data.remove_columns("picture"))
    empty = data.remove_columns("year").add_column("id", ["x", None, ""])
    assert [item.key for item in open_source(empty, key_column="id")] == ["x", "train#1", "train#2"]


def test_several_image_columns(data):
    more = data.add_column("image2", [{"bytes": b"x", "path": None}] * 3).cast_column("image2", datasets.Image())
    items = list(open_source(more))
    assert [row(item) for item in items] == EXPECTED
    assert items[0].image == PNG


def test_bad_rows_are_reported(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    paths = [str(tmp_path / "a.png"), None, str(tmp_path / "absent.png"), "http://127.0.0.1/a.png"]
    data = datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": datasets.Image()}))
    good, *bad = open_source(data)
    assert good.decode().size == (12, 8)
    assert good.mtime == (tmp_path / "a.png").stat().st_mtime
    for item, reason in zip(bad, ["neither bytes nor a path", "no such file", "is a URL"], strict=True):
        with pytest.raises(BadImage, match=reason):
            item.decode()


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(ClipworksError, match="cannot be opened"):
        open_source(tmp_path, kind="huggingface")


def test_the_library_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'clipworks\[datasets\]'"):
        open_source("hf:org/name")
