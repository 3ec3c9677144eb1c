"""Images as features in memory: folders, tables, collections and features, their labels, and what was left out."""

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.errors import BadImage, ClipworksError
from clipworks.store.collection import Collection
from clipworks.types import Features
from clipworks.zeroshot.seen import image_features, labelled_features

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "dark_blue": (0, 0, 90)}


class Colors:
    """An encoder that sees the mean colour of an image."""

    dim, logit_scale, fingerprint = 3, 20.0, "colors"

    @staticmethod
    def preprocess(image, key=None):
        from clipworks.data.decode import decode

        return torch.from_numpy(np.array(decode(image, key=key).resize((4, 4)))).permute(2, 0, 1) / 255

    def images(self, pixels, **_):
        return torch.nn.functional.normalize(pixels.mean((2, 3)) + 1e-3, dim=1)


@pytest.fixture
def labelled(tmp_path):
    for name, color in COLORS.items():
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (20 + i, 30), color).save(tmp_path / name / f"{i}.png")
    (tmp_path / "red" / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(tmp_path / "nowhere.png")
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 4])
def test_folders_name_their_classes_and_nothing_is_lost(labelled, batch_size):
    found, names, errors = labelled_features(labelled, Colors(), ["red", "green", "Dark blue"], batch_size=batch_size)
    assert names == ["red", "green", "Dark blue"]
    assert dict(zip(found.keys, found.labels, strict=True)) == {
        f"{folder}/{i}.png": "Dark blue" if folder == "dark_blue" else folder for folder in COLORS for i in range(2)
    }
    color = {"red": [1, 0, 0], "green": [0, 1, 0], "Dark blue": [0, 0, 1]}
    np.testing.assert_allclose(found.vectors, [color[label] for label in found.labels], atol=0.01)
    assert {e.key: e.reason for e in errors}.keys() == {"red/empty.jpg", "nowhere.png"}
    assert errors[-1].reason == "has no label"
    assert found.fingerprint == "colors"


def test_without_names_the_labels_are_the_names(labelled):
    assert labelled_features(labelled, Colors(), None)[1] == ["dark_blue", "green", "red"]


def test_a_table_and_a_collection_are_read_alike(labelled):
    rows = [f"{folder}/{i}.png,{folder}" for folder in COLORS for i in range(2)]
    (labelled / "shots.csv").write_text("\n".join(["path,label", *rows, "green/gone.png,green", "nowhere.png,"]))
    of_table, names, errors = labelled_features(labelled / "shots.csv", Colors(), None)
    of_folder = labelled_features(labelled, Colors(), None)[0]
    order = np.argsort(of_table.keys)
    assert [of_table.keys[i] for i in order] == of_folder.keys
    np.testing.assert_array_equal(of_table.vectors[order], of_folder.vectors)
    assert sorted(e.key for e in errors) == ["green/gone.png", "nowhere.png"]
    features = Features(of_table.vectors, of_table.keys, of_table.labels, fingerprint="colors")
    Collection.create(labelled / "c", features=features, dtype="float32")
    again, same, left = labelled_features(str(labelled / "c"), Colors(), names)
    assert (same, left) == (names, [])
    assert dict(zip(again.keys, again.labels, strict=True)) == dict(zip(of_table.keys, of_table.labels, strict=True))
    direct = labelled_features(features, Colors(), names)[0]
    np.testing.assert_array_equal(direct.vectors, of_table.vectors)


def test_images_as_features_with_the_bad_one_reported(labelled):
    found, errors = image_features(labelled / "red", Colors())
    assert found.keys == ["0.png", "1.png"]
    assert found.labels is None
    assert [e.key for e in errors] == ["empty.jpg"]
    with pytest.raises(BadImage):
        image_features(labelled / "red", Colors(), on_error="raise")
    nothing, errors = image_features([labelled / "red" / "empty.jpg"], Colors())
    assert (nothing.vectors.shape, len(errors)) == ((0, 3), 1)


def test_mistakes_are_named(labelled):
    x = np.eye(3, dtype=np.float32)
    bad = x.copy()
    bad[1, 1] = np.nan
    twins = Features(x, ["1", "2", "3"], np.array(["dark blue", "red", "red"]))
    for call, message in (
        (lambda: labelled_features(labelled, Colors(), ["red", "green", "dark_blues"]), "Did you mean 'dark_blues'"),
        (lambda: labelled_features(twins, Colors(), ["Dark Blue", "dark-blue", "red"]), "could be 'Dark Blue' or"),
        (lambda: labelled_features(Features(x), Colors(), None), "at least 2 labelled images"),
        (lambda: labelled_features([labelled / "red" / "empty.jpg"], Colors(), None), r"left out: image .*empty\.jpg"),
        (lambda: image_features(Features(bad, ["a", "b", "c"]), Colors()), "NaN or infinity for 'b'"),
        (lambda: image_features(Features(x[:, :2]), Colors()), "3 columns"),
        (lambda: image_features(Features(x, fingerprint="other"), Colors()), "the one that made the features"),
    ):
        with pytest.raises(ClipworksError, match=message):
            call()
