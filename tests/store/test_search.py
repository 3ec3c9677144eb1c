"""`search`, `search_many`, `similar` against plain float64 sums of unit vectors; conditions, mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_store import DIM, encoder, folder, picture

from clipworks.errors import ClipworksError, CollectionError, UnknownName
from clipworks.store.collection import Collection
from clipworks.store.embed import embed
from clipworks.store.search import search, search_many, similar
from clipworks.types import Features


@pytest.fixture(scope="module")
def model():
    return encoder()


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("search")
    folder(place / "photos", 40)
    embed(place / "photos", place / "c", encoder=model, label_from="folder", dtype="float32")
    return place


def expected(place, model, parts, weights, k, rows=None):
    """Keys and cosines of the weighted sum of unit vectors, in float64."""
    opened = Collection.open(place / "c")
    vectors = [model.texts([p]) if isinstance(p, str) else model.images([p]) for p in parts]
    query = sum(w * v[0].double().numpy() for w, v in zip(weights, vectors, strict=True))
    query /= np.linalg.norm(query)
    rows = np.arange(len(opened)) if rows is None else rows
    scores = opened.vectors[rows].astype(np.float64) @ query
    best = np.argsort(-scores, kind="stable")[:k]
    return [opened.keys[rows[i]] for i in best], scores[best]


def check(found, keys, scores):
    assert found.keys == keys
    np.testing.assert_allclose(found.scores, scores, atol=2e-6)


def test_by_words(model, place):
    check(search(place / "c", "a red bicycle", k=7, encoder=model), *expected(place, model, ["a red bicycle"], [1], 7))


@pytest.mark.parametrize("kind", ["path", "bytes", "image", "array"])
def test_by_an_image_in_any_form(model, place, kind):
    path = place / "photos/a/007.png"
    given = {
        "path": path,
        "bytes": path.read_bytes(),
        "image": Image.open(path),
        "array": np.asarray(picture(7)),
    }[kind]
    found = search(place / "c", given, k=3, encoder=model)
    assert found.keys[0] == "a/007.png"
    assert found.scores[0] == pytest.approx(1, abs=1e-5)
    check(found, *expected(place, model, [path], [1], 3))


def test_words_and_an_image_and_negatives(model, place):
    image = place / "photos/a/003.png"
    found = search(place / "c", "at night", image=str(image), negative=["rain", "a crowd"], k=9, encoder=model)
    check(found, *expected(place, model, ["at night", image, "rain", "a crowd"], [1, 1, -0.5, -0.5], 9))
    found = search(place / "c", "at night", image=image, negative="rain", weights=[0.3, 2, -1], k=9, encoder=model)
    check(found, *expected(place, model, ["at night", image, "rain"], [0.3, 2, -1], 9))
    assert found.query == f"at night + {image} - rain"
    several = search(place / "c", ["at night", image], weights=[1, -0.2], k=9, encoder=model)
    check(several, *expected(place, model, ["at night", image], [1, -0.2], 9))
    away = search(place / "c", negative="rain", k=9, encoder=model)
    check(away, *expected(place, model, ["rain"], [-1], 9))


@pytest.mark.parametrize("form", [np.asarray, torch.tensor, list])
def test_by_a_vector_without_an_encoder(place, form):
    opened = Collection.open(place / "c")
    found = search(opened, form((3 * opened.vectors[5]).tolist()), k=2)
    assert found.keys[0] == opened.keys[5]
    assert found.scores[0] == pytest.approx(1, abs=1e-6)


def test_conditions_and_columns(model, place):
    where = "key >= 'a/010.png' AND key < 'a/020.png'"
    found = search(place / "c", "a dog", k=4, where=where, encoder=model, columns=["caption", "label"])
    check(found, *expected(place, model, ["a dog"], [1], 4, np.arange(10, 20)))
    assert found.columns == [{"caption": f"picture {int(k[2:5])}", "label": "a"} for k in found.keys]
    by_mapping = search(place / "c", "a dog", where={"caption": ["picture 3", "picture 5"]}, encoder=model)
    assert sorted(by_mapping.keys) == ["a/003.png", "a/005.png"]
    assert len(search(place / "c", "a dog", where="label = 'b'", encoder=model)) == 0
    row = found.as_rows()[0]
    assert list(row) == ["rank", "key", "score", "caption", "label"]


def test_more_hits_than_rows(model, place):
    assert len(search(place / "c", "a dog", k=1000, encoder=model)) == 40


def test_many_are_as_one_by_one(model, place):
    image = place / "photos/a/003.png"
    queries = ["a dog", image, "a cat", np.arange(1.0, DIM + 1)]
    together = search_many(place / "c", queries, k=6, encoder=model)
    for query, found in zip(queries, together, strict=True):
        alone = search(place / "c", query, k=6, encoder=model)
        check(found, alone.keys, alone.scores)
        assert found.query == alone.query
    matrix = np.random.default_rng(0).standard_normal((30, DIM))
    for vector, found in zip(matrix, search_many(place / "c", matrix, k=3, memory=1 << 20), strict=True):
        assert found.keys == search(place / "c", vector, k=3).keys
    assert search_many(place / "c", []) == []


def test_similar(place):
    opened = Collection.open(place / "c")
    scores = opened.vectors.astype(np.float64) @ opened.vectors[4].astype(np.float64)
    order = [i for i in np.argsort(-scores, kind="stable") if i != 4]
    found = similar(opened, "a/004.png", k=5, columns=["caption"])
    check(found, [opened.keys[i] for i in order[:5]], scores[order[:5]])
    assert found.columns[0] == {"caption": f"picture {order[0]}"}
    some = similar(opened, "a/004.png", k=50, where="key < 'a/010.png'")
    check(some, [opened.keys[i] for i in order if i < 10], scores[[i for i in order if i < 10]])


def test_similar_keeps_an_equal_twin(tmp_path):
    vectors = np.eye(4, DIM, dtype=np.float32)[[0, 0, 1, 2]]
    made = Collection.create(tmp_path / "c", features=Features(vectors, list("abcd")))
    assert similar(made, "b", k=1).keys == ["a"]
    assert similar(made, "a", k=10).keys == ["b", "c", "d"]


def test_the_encoder_is_loaded_again_from_what_the_collection_says(model, place, tmp_path):
    from clipworks.encoders.loading import save

    save(model, tmp_path / "tiny.safetensors")
    embed(place / "photos", tmp_path / "c", encoder=str(tmp_path / "tiny.safetensors"), dtype="float32")
    check(search(tmp_path / "c", "a dog", k=5), *expected(place, model, ["a dog"], [1], 5))


def test_another_encoder_is_refused_with_the_field(model, place):
    with pytest.raises(CollectionError, match="They differ in weights"):
        search(place / "c", "a dog", encoder=encoder(seed=1))
    with pytest.raises(CollectionError, match=r"config\.vision\.layers: 2 -> 1"):
        search(place / "c", "a dog", encoder=encoder(layers=1))


def test_vectors_of_unknown_origin_need_an_encoder_that_is_named(model, tmp_path):
    made = Collection.create(tmp_path / "c", features=Features(np.eye(3, DIM, dtype=np.float32)))
    with pytest.raises(CollectionError, match="does not say which encoder made it"):
        search(made, "a dog")
    assert len(search(made, "a dog", encoder=model)) == 3
    short = Collection.create(tmp_path / "d", features=Features(np.eye(3, 5, dtype=np.float32)))
    with pytest.raises(CollectionError, match="length 16, the collection's 5"):
        search(short, "a dog", encoder=model)


def test_mistakes_are_named(model, place):
    def refused(message, *given, error=ClipworksError, **options):
        with pytest.raises(error, match=message):
            search(place / "c", *given, encoder=model, **options)

    refused("query must be words, an image or a vector")
    refused("empty words", "  ")
    refused("16 finite numbers", np.ones(3))
    refused("16 finite numbers", np.full(DIM, np.nan))
    refused("length zero", "a dog", negative="a dog", weights=[1, -1])
    refused(r"one number per part of the query \(2\)\. Got 3", "a dog", negative="rain", weights=[1, 2, 3])
    refused("k must lie in", "a dog", k=0)
    refused("memory must lie in", "a dog", memory=10)
    refused("Did you mean 'caption'", "a dog", columns=["captoin"], error=UnknownName)
    refused("where must be a condition", "a dog", where="label == = 3")
    with pytest.raises(ClipworksError, match=r"Did you mean 'a/004.png'"):
        similar(place / "c", "a/004.pgn")
    with pytest.raises(CollectionError, match="no collection at"):
        search(Path("nowhere"), "a dog")
    with pytest.raises(ClipworksError, match="no such file"):
        search(place / "c", place / "no.jpg", encoder=model)


def test_an_empty_collection_answers_with_nothing(model, tmp_path):
    made = Collection.create(tmp_path / "c", encoder=model)
    assert len(search(made, "a dog", encoder=model)) == 0
