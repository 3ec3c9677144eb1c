"""`Collection`: opening, columns, conditions, vectors from elsewhere."""

import numpy as np
import pytest
from small_store import DIM, encoder, folder

from clipworks.errors import ClipworksError, CollectionError, UnknownName
from clipworks.store.collection import Collection
from clipworks.store.embed import embed
from clipworks.types import Features


def unit(n, dim=DIM, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("c")
    keys, texts = [f"k{i:02}" for i in range(30)], [f"it's {i}" for i in range(30)]
    features = Features(unit(30), keys, np.arange(30) % 3, texts, "f")
    return Collection.create(place / "c", features=features)


def test_round_trip(made):
    assert len(made) == 30
    np.testing.assert_array_equal(made.vectors, unit(30).astype(np.float16))
    assert isinstance(made.vectors, np.memmap)
    assert made.fingerprint == "f"
    back = made.features()
    assert back.keys == [f"k{i:02}" for i in range(30)]
    assert list(back.labels) == [str(i % 3) for i in range(30)]
    assert back.texts[4] == "it's 4"
    assert "k03" in made
    assert "x" not in made
    np.testing.assert_array_equal(made.vector("k03"), unit(30)[3].astype(np.float16))
    assert Collection.open(made) is made


def test_rows_are_sorted_by_key(tmp_path):
    order = np.random.default_rng(1).permutation(20)
    keys = [f"k{i:02}" for i in order]
    made = Collection.create(tmp_path / "c", features=Features(unit(20)[order], keys), dtype="float32")
    assert made.keys == sorted(keys)
    np.testing.assert_array_equal(made.vectors, unit(20))


def test_where(made):
    assert list(made.where("label = '1'")) == list(range(1, 30, 3))
    assert list(made.where({"label": "1"})) == list(range(1, 30, 3))
    assert list(made.where({"label": ["0", "2"], "caption": "it's 2"})) == [2]
    assert list(made.where({"label": []})) == []
    assert len(made.where({"label": None})) == 0
    assert len(made.where({})) == 30
    with pytest.raises(UnknownName, match="Did you mean 'label'"):
        made.where({"labl": "1"})
    with pytest.raises(ClipworksError, match="where must be a condition on the columns key,"):
        made.where("nothing = 3")
    with pytest.raises(ClipworksError, match="where must be a condition"):
        made.where("label = '")


def test_where_needs_no_writer_to_stand_still(tmp_path):
    made = Collection.create(tmp_path / "c", features=Features(unit(4), list("abcd")))
    made.add(Features(unit(1, seed=3), ["e"]))
    assert list(made.where("key > 'b'")) == [2, 3]  # the version that was opened


def test_columns(made):
    types = {"key": "string", "digest": "string", "mtime": "double", "label": "string", "caption": "string"}
    assert made.columns == types
    assert made.take([2, 0], ["key", "label"]) == [{"key": "k02", "label": "2"}, {"key": "k00", "label": "0"}]
    with pytest.raises(UnknownName, match="columns must be one of"):
        made.take([0], ["colour"])
    with pytest.raises(ClipworksError, match="Did you mean 'k03'"):
        made.row("k03 ")


def test_add(tmp_path):
    made = Collection.create(tmp_path / "c", dim=DIM, dtype="float32")
    assert len(made) == 0
    assert made.vectors.shape == (0, DIM)
    more = made.add(Features(unit(5), list("abcde")))
    assert (len(made), len(more)) == (0, 5)
    with pytest.raises(CollectionError, match="new and unique"):
        more.add(Features(unit(1), ["a"]))
    with pytest.raises(CollectionError, match=r"16 columns\. Got 3"):
        more.add(Features(unit(1, 3), ["z"]))
    with pytest.raises(ClipworksError, match="finite"):
        more.add(Features(np.full((1, DIM), np.nan, np.float32), ["z"]))
    assert len(Collection.open(tmp_path / "c")) == 5


def test_fingerprints_are_not_mixed(made):
    with pytest.raises(CollectionError, match="fingerprint"):
        made.add(Features(unit(1), ["z"], fingerprint="other"))


def test_create_refuses(tmp_path):
    with pytest.raises(ClipworksError, match="dim must be given"):
        Collection.create(tmp_path / "c")
    with pytest.raises(UnknownName, match="dtype"):
        Collection.create(tmp_path / "c", dim=3, dtype="float8")
    Collection.create(tmp_path / "c", dim=3)
    with pytest.raises(CollectionError, match="already"):
        Collection.create(tmp_path / "c", dim=3)
    with pytest.raises(CollectionError, match="Did you mean 'c'"):
        Collection.open(tmp_path / "cc")
    (tmp_path / "d").mkdir()
    with pytest.raises(CollectionError, match="clipworks embed"):
        Collection.open(tmp_path / "d")


def test_many_small_commits_are_merged(tmp_path):
    model = encoder()
    photos = folder(tmp_path / "p", 24, captions=False)
    embed(photos, tmp_path / "c", encoder=model, batch_size=2, commit_every=2)
    assert len(list((tmp_path / "c/items.lance/data").iterdir())) == 1
    assert len(list((tmp_path / "c/items.lance/_versions").glob("*.manifest"))) == 1
    assert len(Collection.open(tmp_path / "c")) == 24


def test_foreign_table_is_refused(tmp_path):
    import lancedb
    import pyarrow as pa

    lancedb.connect(str(tmp_path / "c")).create_table("items", pa.table({"a": [1]}))
    with pytest.raises(CollectionError, match="did not write"):
        Collection.open(tmp_path / "c")
