"""Labelled sets in layouts that are told by looking: folders, CoOp's split under any name, tables, Hugging Face."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from replicas import coop, picture, words

from clipworks.data.labelled import LabelledSet, Row, read_labelled
from clipworks.errors import ClipworksError


def by_part(data):
    parts = data.parts or {None: np.arange(len(data))}
    return {part: [(data.items[row].key, data.classes[data.y[row]]) for row in rows] for part, rows in parts.items()}


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_folders_per_class(tmp_path):
    for path in ("sea_horse/b.jpg", "sea_horse/a.jpg", "ox/deep/er/1.png", "ox/notes.txt", ".cache/x/1.jpg"):
        picture(tmp_path / path) if path.endswith(("jpg", "png")) else words(tmp_path / path, "-")
    assert by_part(read_labelled("mine", tmp_path)) == {
        None: [("ox/deep/er/1.png", "ox"), ("sea_horse/a.jpg", "sea horse"), ("sea_horse/b.jpg", "sea horse")]
    }


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_folders_of_parts(tmp_path, validation):
    for path in ("train/ox/1.jpg", f"{validation}/cat/1.jpg", "test/ox/1.jpg"):
        picture(tmp_path / path)
    data = read_labelled("mine", tmp_path)
    assert by_part(data) == {
        "train": [("train/ox/1.jpg", "ox")],
        "validation": [(f"{validation}/cat/1.jpg", "cat")],
        "test": [("test/ox/1.jpg", "ox")],
    }
    assert data.classes == ["cat", "ox"]


def test_a_split_of_coop_under_any_name(tmp_path):
    rows = {"train": [["ox/1.jpg", 1, "an_ox"]], "val": [], "test": [["cat/2.jpg", 0, "cat"]]}
    coop(tmp_path, "split_zhou_Mine.json", "pictures", rows)
    data = read_labelled("mine", tmp_path)
    assert by_part(data) == {"train": [("ox/1.jpg", "an ox")], "test": [("cat/2.jpg", "cat")]}
    assert data.classes == ["cat", "an ox"], "numbered as the file numbers them"


@pytest.mark.parametrize("inside", [True, False])
def test_a_table(tmp_path, inside):
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        picture(tmp_path / name)
    words(tmp_path / "labels.csv", "file,class,Split", "1.jpg,sea_horse,train", "2.jpg,ox,test", "3.jpg,ox,train")
    data = read_labelled("mine", tmp_path if inside else tmp_path / "labels.csv")
    assert by_part(data) == {"train": [("1.jpg", "sea horse"), ("3.jpg", "ox")], "test": [("2.jpg", "ox")]}


def test_a_table_without_a_label_somewhere(tmp_path):
    picture(tmp_path / "1.jpg")
    words(tmp_path / "t.csv", "file,label", "1.jpg,")
    with pytest.raises(ClipworksError, match=r"'1.jpg' has no label.*'label' or 'class'"):
        read_labelled("mine", tmp_path / "t.csv")


def test_parquet_as_the_hub_has_it(tmp_path):
    """Files per part; class numbers, whose names are in the schema's metadata."""
    kinds = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["ox", "sea_horse"]}}
    features = {"info": {"features": kinds}}
    (tmp_path / "data").mkdir()
    for file, labels in (("train-00000-of-00002", [1, 0]), ("train-00001-of-00002", [1]), ("test-00000-of-00001", [0])):
        images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(len(labels))]
        table = pa.table({"image": images, "label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, tmp_path / "data" / f"{file}.parquet")
    data = read_labelled("mine", tmp_path)
    assert [data.classes[data.y[row]] for row in data.parts["train"]] == ["sea horse", "ox", "sea horse"]
    assert [data.classes[data.y[row]] for row in data.parts["test"]] == ["ox"]
    assert data.items[0].decode().size == (8, 8)


def test_parquet_with_words_for_labels(tmp_path):
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": ["ox", "cat"]}), tmp_path / "t.parquet")
    data = read_labelled("mine", tmp_path / "t.parquet")
    assert [data.classes[i] for i in data.y] == ["ox", "cat"]


def test_a_folder_made_by_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ox", "cat"])})
    made = datasets.Dataset.from_dict({"image": [{"bytes": png(1), "path": None}] * 2, "label": [1, 0]}, features=kinds)
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "d"))
    data = read_labelled("mine", tmp_path / "d")
    assert {part: [data.classes[data.y[r]] for r in rows] for part, rows in data.parts.items()} == {
        "train": ["cat", "ox"], "test": ["cat", "ox"]}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda place: None, "there is no such folder or file"),
        (lambda place: place.mkdir(), "there are no folders with images. Expected one of: split_zhou_"),
        (lambda place: picture(place / "only.jpg"), "there are no folders with images"),
        (lambda place: words(place / "split_zhou_X.json", '{"train": [["a/1.jpg", 0, "a"]]}'), "names a/1.jpg"),
        (lambda place: words(place / "split_zhou_X.json", "[]"), "is not a split file of CoOp"),
    ],
)
def test_what_is_no_labelled_set(tmp_path, make, says):
    make(tmp_path / "set")
    with pytest.raises(ClipworksError, match=says):
        read_labelled("mine", tmp_path / "set")


def rows(labels, part=None):
    from clipworks.data.item import Item

    return [Row(Item(str(i), np.zeros((4, 4, 3), np.uint8)), label, part) for i, label in enumerate(labels)]


def test_some_rows_are_a_set_of_their_own():
    data = LabelledSet.of("mine", rows("abcab", "train"))
    data.noisy["who"] = np.array([0, 2, 2, 1, 1])
    some = data.only(np.array([4, 1, 2]))
    assert ([i.key for i in some.items], some.y.tolist(), some.classes) == (["4", "1", "2"], [0, 0, 1], ["b", "c"])
    assert some.parts["train"].tolist() == [1, 2, 0], "in the order of the part"
    assert some.noisy["who"].tolist() == [0, 1, 1]


def test_other_annotators(tmp_path):
    data = LabelledSet.of("mine", rows("ab", "train") + [Row(r.item, r.label, "test") for r in rows("aabb")[2:]])
    np.savez(tmp_path / "n.npz", clean=np.array([0, 1]), worse=np.array([1, 1], np.int16))
    assert {k: v.tolist() for k, v in data.with_noisy(tmp_path / "n.npz").noisy.items()} == {"worse": [1, 1, -1, -1]}
    for wrong, says in (
        ([0, 1, 1], "must be 2 class numbers"),
        ([0, 2], r"must lie in 0 ... 1"),
        ([0.5, 1], "float64"),
    ):
        np.savez(tmp_path / "n.npz", worse=np.array(wrong))
        with pytest.raises(ClipworksError, match=says):
            data.with_noisy(tmp_path / "n.npz")
    np.savez(tmp_path / "n.npz", worse=np.array([{}, {}]))
    with pytest.raises(ClipworksError, match="noisy labels"):
        data.with_noisy(tmp_path / "n.npz")


def test_faults_of_a_set_are_named():
    with pytest.raises(ClipworksError, match="must hold labelled images"):
        LabelledSet.of("mine", [])
    with pytest.raises(ClipworksError, match=r"distinct class names\. Twice: a"):
        LabelledSet.of("mine", rows("a"), ["a", "a"])
    with pytest.raises(ClipworksError, match=r"unique keys\. Got 4 images with 2 keys"):
        LabelledSet.of("mine", rows("ab") + rows("ab"))
    with pytest.raises(ClipworksError, match="in another part too"):
        LabelledSet("mine", [r.item for r in rows("ab")], np.array([0, 1]), ["a", "b"],
                    {"train": np.array([0, 1]), "test": np.array([1])})  # fmt: skip
