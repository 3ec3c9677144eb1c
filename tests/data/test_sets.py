"""Published sets by their names, on tiny replicas of their layouts; real ones where they lie beside the checkout."""

from pathlib import Path

import numpy as np
import pytest
from replicas import REPLICAS, caltech101, cifar10, cifar_record, dtd, fashion_mnist, oxford_pets, picture

from clipworks.data.labelled import read_labelled
from clipworks.data.sets import describe, known_set, set_names
from clipworks.errors import ClipworksError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
COOP = ["imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft",
        "sun397", "dtd", "eurosat", "ucf101"]  # fmt: skip


def set_of(replica):
    """The set that a replica is of: the longest name that it begins with."""
    return max((name for name in set_names() if replica.startswith(name)), key=len)


def by_part(data):
    parts = data.parts or {None: np.arange(len(data))}
    return {part: [data.classes[data.y[row]] for row in rows] for part, rows in parts.items()}


def test_the_eleven_sets_of_coop_are_known_and_every_set_has_a_replica():
    assert set(COOP) | {"cifar10", "cifar100", "pacs"} <= set(set_names())
    assert {set_of(name) for name in REPLICAS} == set(set_names())


@pytest.mark.parametrize("name", REPLICAS)
def test_replica(name, tmp_path):
    expected = REPLICAS[name](tmp_path / "set")
    data = read_labelled(set_of(name), tmp_path / "set")
    assert by_part(data) == expected
    assert len({item.key for item in data.items}) == len(data)
    assert all(item.decode().size in ((8, 8), (32, 32), (28, 28)) for item in data.items)


@pytest.mark.parametrize("name", set_names())
def test_what_is_missing_is_told_with_layout_and_source(name, tmp_path):
    with pytest.raises(ClipworksError) as nothing:
        read_labelled(name, tmp_path / "absent")
    with pytest.raises(ClipworksError) as empty:
        read_labelled(name, tmp_path)
    for error in (nothing, empty):
        assert "Layout: " in str(error.value)
        assert "\nFrom: " in str(error.value)
        assert str(tmp_path) in str(error.value)


def test_names_are_found_in_whatever_way_they_are_written():
    assert [known_set(name) for name in ("OxfordPets", "oxford-pets", "Oxford_Pets", "pots")] == ["oxford_pets"] * 3 + [
        None
    ]
    assert describe("dtd").startswith("Describable Textures")


def test_cifar_pixels_come_from_planes(tmp_path):
    cifar10(tmp_path)
    data = read_labelled("cifar10", tmp_path)
    np.testing.assert_array_equal(np.asarray(data.items[2].decode())[5, 6], [2, 2, 3])  # batch 2: red 2


def test_pickles_are_refused_and_not_opened(tmp_path):
    """A pickle that would leave a file behind if it were loaded."""
    trap = tmp_path / "sprung"
    bomb = f"cos\nsystem\n(S'touch {trap}'\ntR.".encode()
    for name, folder, file in (("cifar10", "cifar-10-batches-py", "data_batch_1"),
                               ("cifar100", "cifar-100-python", "train")):  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_bytes(bomb)
        with pytest.raises(ClipworksError, match=r"(?s)pickle, which is not read.*binary version"):
            read_labelled(name, tmp_path)
    assert not trap.exists()


def test_cut_files_are_named(tmp_path):
    cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-bin/test_batch.bin").write_bytes(cifar_record([1], 1)[:-5])
    with pytest.raises(ClipworksError, match=r"test_batch\.bin is cut: 3068 bytes"):
        read_labelled("cifar10", tmp_path)
    fashion_mnist(tmp_path / "f")
    (tmp_path / "f/fashion-mnist/t10k-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bnot gzip")
    with pytest.raises(ClipworksError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        read_labelled("fashion_mnist", tmp_path / "f")


def test_an_image_of_the_list_that_is_not_there_is_named(tmp_path):
    dtd(tmp_path)
    (tmp_path / "images/banded/banded_0004.jpg").unlink()
    with pytest.raises(ClipworksError, match=r"1 of 1 images of the list .* 'banded/banded_0004.jpg'"):
        read_labelled("dtd", tmp_path)


def test_a_split_cannot_lead_out_of_the_folder(tmp_path):
    picture(tmp_path / "secret.jpg")
    home = tmp_path / "set"
    caltech101(home)
    (home / "split_zhou_Caltech101.json").write_text('{"train": [["../../secret.jpg", 0, "face"]]}')
    with pytest.raises(ClipworksError, match="outside the folder"):
        read_labelled("caltech101", home)


@pytest.mark.parametrize("text", ["[]", "{", '{"train": [["a.jpg", 0]]}', '{"train": 3}'])
def test_a_damaged_split_is_named(tmp_path, text):
    caltech101(tmp_path)
    (tmp_path / "split_zhou_Caltech101.json").write_text(text)
    with pytest.raises(ClipworksError, match="caltech101"):
        read_labelled("caltech101", tmp_path)


def test_pets_without_lists_are_not_split(tmp_path):
    oxford_pets(tmp_path)
    for path in (tmp_path / "annotations").iterdir():
        path.unlink()
    data = read_labelled("oxford_pets", tmp_path)
    assert by_part(data) == {None: ["abyssinian", "great pyrenees", "great pyrenees"]}


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the data are not beside the checkout")
@pytest.mark.parametrize(
    ("name", "folder", "images", "classes", "parts"),
    [
        ("caltech101", "caltech101-128", 8242, 100, {"train": 4128, "validation": 1649, "test": 2465}),
        ("pacs", "pacs-128", 5315, 7, {}),
        ("oxford_pets", "pets-600", 600, 3, {}),
        ("emoji_styles", "emoji-styles-64", 7821, 869, {}),
        ("defects", "magnetic-tile", 1344, 6, {}),
    ],
)
def test_real_sets(name, folder, images, classes, parts):
    data = read_labelled(name, SHARED / folder)
    assert (len(data), len(data.classes)) == (images, classes)
    assert {part: len(rows) for part, rows in data.parts.items()} == parts
    if name == "pacs":
        assert sorted(set(data.domains)) == ["art_painting", "cartoon", "photo", "sketch"]
    if name == "emoji_styles":
        assert len(set(data.domains)) == 9
