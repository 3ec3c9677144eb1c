"""Many collections searched as one: against the same rows in a single collection."""

import numpy as np
import pytest

from clipworks.cli.main import main
from clipworks.errors import ClipworksError, CollectionError
from clipworks.store.collection import Collection
from clipworks.store.search import search
from clipworks.store.shards import is_sharded, search_shards
from clipworks.types import Features

DIM, ROWS = 16, 90
PARTS = {"0": np.arange(0, 50), "1": np.arange(50, 55), "2": np.arange(55, ROWS)}  # rows of the shards


def features(rows, dim=DIM, fingerprint="one"):
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((ROWS, dim)).astype(np.float16)
    vectors[60:70] = vectors[:10]  # twins in other shards
    labels = np.array([f"class {i % 4}" for i in range(ROWS)])
    keys = [f"{i:02d}" for i in range(ROWS)]
    return Features(vectors[rows], [keys[i] for i in rows], labels[rows], None, fingerprint)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("shards")
    Collection.create(place / "whole", features=features(np.arange(ROWS)))
    for name, rows in PARTS.items():
        Collection.create(place / "s" / name, features=features(rows))
    (place / "s" / "notes").mkdir()
    (place / "s" / "readme.txt").write_text("")
    return place


@pytest.mark.parametrize("more", [{}, {"where": {"label": "class 2"}}, {"index": "exact"}, {"k": 1000}])
def test_as_one_collection(place, more):
    for query in np.random.default_rng(1).standard_normal((20, DIM)):
        found = search_shards(place / "s", query, columns=["label"], **more)
        whole = search(place / "whole", query, columns=["label"], **more)
        assert found.scores.tolist() == whole.scores.tolist()  # to the bit
        assert [key.split("/")[1] for key in found.keys] == whole.keys
        assert found.columns == whole.columns
        assert found.query == whole.query
        assert all(int(key[0]) == (int(key[2:]) >= 50) + (int(key[2:]) >= 55) for key in found.keys)


def test_search_takes_a_folder_of_collections(place):
    query = np.random.default_rng(3).standard_normal(DIM)
    whole, found = search(place / "whole", query, columns=["label"]), search(place / "s", query, columns=["label"])
    assert ([key.split("/")[1] for key in found.keys], found.columns) == (whole.keys, whole.columns)
    with pytest.raises(ClipworksError, match="need the rows of one collection; name one of the shards"):
        search(place / "s", query, diverse=0.5)


def test_which_folder_is_sharded(place):
    assert is_sharded(place / "s")
    assert not is_sharded(place / "whole")
    assert not is_sharded(place / "s" / "notes")
    assert not is_sharded(place / "absent")


def test_shards_of_two_encoders_are_refused(tmp_path):
    Collection.create(tmp_path / "a", features=features(np.arange(5)))
    Collection.create(tmp_path / "b", features=features(np.arange(5), fingerprint="two"))
    with pytest.raises(CollectionError, match=r"shards must be of one encoder. .*'one'.*'two'"):
        search_shards(tmp_path, np.ones(DIM))
    with pytest.raises(CollectionError, match="there is no collection in"):
        search_shards(tmp_path / "a", np.ones(DIM))


def test_a_damaged_shard_is_no_gap(tmp_path):
    for name in "ab":
        Collection.create(tmp_path / name, features=features(np.arange(5)))
    data = next((tmp_path / "b" / "items.lance" / "data").iterdir())
    data.write_bytes(data.read_bytes()[:-5])
    with pytest.raises(CollectionError, match="is damaged"):
        search_shards(tmp_path, np.ones(DIM))
    for manifest in (tmp_path / "b" / "items.lance" / "_versions").glob("*.manifest"):
        manifest.unlink()
    with pytest.raises(CollectionError, match="has lost all its versions"):
        search_shards(tmp_path, np.ones(DIM))


def test_mistakes(place):
    with pytest.raises(ClipworksError, match="columns must be one of"):
        search_shards(place / "s", np.ones(DIM), columns=["size"])
    with pytest.raises(ClipworksError, match="k must lie in"):
        search_shards(place / "s", np.ones(DIM), k=0)
    with pytest.raises(ClipworksError, match="Got nothing"):
        search_shards(place / "s")


def test_on_the_command_line(place, capsys):
    assert main(["search", str(place / "s"), "a dog"]) == 1
    assert "give the encoder that made the collection" in capsys.readouterr().err
    assert main(["search", str(place / "s"), "a dog", "--expand", "5"]) == 2
    assert "expand cannot be used with a sharded collection" in capsys.readouterr().err
