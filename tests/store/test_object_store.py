"""Published collections, searched where they lie: against the same rows in local collections."""

import json

import numpy as np
import pytest
from test_shards import DIM, PARTS, ROWS, features

from clipworks.cli.main import main
from clipworks.errors import ClipworksError, CollectionError
from clipworks.store.collection import Collection
from clipworks.store.object_store import Shard, is_address, publish
from clipworks.store.search import search
from clipworks.store.shards import is_sharded, search_shards
from clipworks.types import Features

pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A collection, and its rows in three published ones below `address`."""
    place = tmp_path_factory.mktemp("store")
    Collection.create(place / "whole", features=features(np.arange(ROWS)))
    for name, rows in PARTS.items():
        Collection.create(place / name, features=features(rows))
        done = publish(place / name, f"file://{place}/s/{name}")
        assert (done.rows, done.recall) == (len(rows), None)
    (place / "s" / "notes").mkdir()
    return place


@pytest.mark.parametrize("more", [{}, {"where": {"label": "class 2"}}, {"where": "label > 'class 1'"}, {"k": 1000}])
def test_as_one_collection(place, more):
    for query in np.random.default_rng(1).standard_normal((10, DIM)):
        found = search_shards(f"file://{place}/s", query, columns=["label"], **more)
        whole = search(place / "whole", query, columns=["label"], **more)
        assert found.scores.tolist() == whole.scores.tolist()  # to the bit
        assert [key.split("/")[1] for key in found.keys] == whole.keys
        assert found.columns == whole.columns


def test_one_that_is_published_keeps_its_keys(place):
    query = np.random.default_rng(2).standard_normal(DIM)
    found = search_shards(f"file://{place}/s/0/", query, k=3)
    assert found.keys == search(place / "0", query, k=3).keys == search(f"file://{place}/s/0", query, k=3).keys


def test_what_is_an_address(place):
    assert is_address("s3://bucket/a")
    assert is_sharded("s3://bucket/a")
    assert not is_address(place)
    assert not is_address(str(place))


def test_with_an_index(tmp_path):
    """Scores are those of the rows; what it finds, and that an exact search is there beside it."""
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((40, 32))
    vectors = (centres[draw.integers(40, size=9000)] + 0.4 * draw.standard_normal((9000, 32))).astype(np.float16)
    kept = Collection.create(tmp_path / "c", features=Features(vectors, [f"{i:05d}" for i in range(9000)]))
    address = f"file://{tmp_path}/s/c"
    done = publish(kept, address)
    assert done.rows == 9000
    assert done.recall >= 0.95
    facts = json.loads((tmp_path / "s/c/published.json").read_text())
    assert facts["breadth"] == done.breadth == Shard(address).breadth
    both = []
    for query in vectors[::100].astype(np.float32):  # others than the 50 that it was measured with, and more
        near, whole = (search_shards(address, query, index=index) for index in ("auto", "exact"))
        assert (whole.keys, whole.scores.tolist()) == (lambda r: (r.keys, r.scores.tolist()))(search(kept, query))
        same = dict(zip(whole.keys, whole.scores.tolist(), strict=True))
        assert all(same.get(key, score) == score for key, score in zip(near.keys, near.scores.tolist(), strict=True))
        both.append(len(set(near.keys) & set(whole.keys)) / 10)
    assert np.mean(both) >= 0.9
    assert publish(kept, address, index=False, overwrite=True).recall is None
    assert Shard(address).breadth == 0
    with pytest.raises(ClipworksError, match="index 'lance' was not built"):
        search_shards(address, vectors[0], index="lance")


def test_a_place_that_is_taken(place, tmp_path):
    address = f"file://{tmp_path}/x"
    publish(place / "0", address)
    with pytest.raises(CollectionError, match=r"there is a collection at .* already; overwrite=True"):
        publish(place / "1", address)
    assert Shard(address).rows == 50
    assert publish(place / "1", address, overwrite=True).rows == 5
    assert Shard(address).rows == 5


def test_no_rows(tmp_path):
    Collection.create(tmp_path / "c", dim=DIM)
    publish(tmp_path / "c", f"file://{tmp_path}/s/c")
    assert search_shards(f"file://{tmp_path}/s", np.ones(DIM)).keys == []


def test_damaged_rows_are_not_answered(place, tmp_path):
    publish(place / "0", f"file://{tmp_path}/s/0")
    (data,) = (tmp_path / "s/0/items.lance/data").iterdir()
    stored = np.asarray(Collection.open(place / "0").vectors[7]).tobytes()
    content = data.read_bytes()
    assert content.count(stored) == 1
    at = content.index(stored) + 3
    data.write_bytes(content[:at] + bytes([content[at] ^ 2]) + content[at + 1 :])
    with pytest.raises(CollectionError, match="is damaged: row '07' does not match its check"):
        search_shards(f"file://{tmp_path}/s", np.ones(DIM), k=50)


def test_mistakes(place, tmp_path):
    address = f"file://{place}/s"
    with pytest.raises(ClipworksError, match="address must begin with a protocol"):
        publish(place / "0", str(tmp_path / "here"))
    with pytest.raises(CollectionError, match="no published collection in"):
        search_shards(f"file://{place}/s/notes", np.ones(DIM))
    with pytest.raises(CollectionError, match="cannot be read or written"):
        search_shards(f"file://{tmp_path}/absent", np.ones(DIM))
    with pytest.raises(CollectionError, match="cannot be read or written"):
        search_shards("nosuch://place", np.ones(DIM))
    with pytest.raises(ClipworksError, match="columns must be one of"):
        search_shards(address, np.ones(DIM), columns=["size"])
    with pytest.raises(ClipworksError, match="where must be a condition on the columns"):
        search_shards(address, np.ones(DIM), where="size > 3")
    with pytest.raises(ClipworksError, match="index must be one of"):
        search_shards(address, np.ones(DIM), index="ivf")
    Collection.create(tmp_path / "b", features=features(np.arange(5), fingerprint="two"))
    publish(tmp_path / "b", f"file://{tmp_path}/two/b")
    publish(place / "0", f"file://{tmp_path}/two/a")
    with pytest.raises(CollectionError, match=r"shards must be of one encoder. .*'one'.*'two'"):
        search_shards(f"file://{tmp_path}/two", np.ones(DIM))


def test_from_a_shell_with_words(tmp_path, capsys):
    """The encoder that the table names reads the words, as in a local collection."""
    import clipworks

    encoder = clipworks.load()
    rows = encoder.texts(["a cat", "a red bus", "a tree"])
    kept = Collection.create(tmp_path / "c", encoder=encoder, features=Features(rows, ["cat", "bus", "tree"]))
    address = f"file://{tmp_path}/s/c"
    assert main(["publish", str(kept.path), address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"address": address, "rows": 3, "recall": None, "breadth": 0}
    assert main(["search", f"file://{tmp_path}/s", "a big bus", "--k", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["key"] == "c/bus"
    assert main(["publish", str(kept.path), address]) == 1
    assert "already" in capsys.readouterr().err
