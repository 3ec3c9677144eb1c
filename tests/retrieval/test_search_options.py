"""`search` with what is taken away, expanded, ordered anew and made diverse, against the functions themselves."""

import numpy as np
import pytest

from clipworks.cli.main import main
from clipworks.errors import ClipworksError
from clipworks.retrieval.diversity import diverse_order
from clipworks.retrieval.query_expansion import expand_query
from clipworks.retrieval.rerank import reciprocal_distances
from clipworks.store.collection import Collection
from clipworks.store.search import search
from clipworks.types import Features


@pytest.fixture
def stock(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return Collection.create(tmp_path / "c", features=Features(x, [f"{i:02}" for i in range(60)]), dtype="float32")


QUERY = np.random.default_rng(1).normal(size=8).astype(np.float32)


def keys(places):
    return [f"{i:02}" for i in places]


def plain(stock, query=QUERY):
    scores = stock.vectors @ (query / np.linalg.norm(query))
    order = np.argsort(-scores)
    return order, scores[order]


def test_expand_searches_once_more(stock):
    order, scores = plain(stock)
    moved = expand_query(QUERY, stock.vectors[order[:4]], scores[:4])
    found = search(stock, QUERY, expand=4, k=10)
    assert found.keys == keys(plain(stock, moved)[0][:10])
    assert found.keys != keys(order[:10])


def test_rerank_orders_the_first_hits_and_leaves_the_rest(stock):
    order, _ = plain(stock)
    distance = reciprocal_distances(QUERY[None], stock.vectors[order[:20]])[0]
    expected = [*order[np.argsort(distance, kind="stable")], *order[20:25]]
    found = search(stock, QUERY, rerank=20, k=25)
    assert found.keys == keys(expected)
    np.testing.assert_allclose(found.scores, stock.vectors[expected] @ (QUERY / np.linalg.norm(QUERY)), atol=1e-6)


def test_diverse_chooses_among_ten_times_k(stock):
    order, scores = plain(stock)
    few = order[:40]
    expected = few[diverse_order(stock.vectors[few], scores[:40], 4, 0.7)]
    assert search(stock, QUERY, diverse=0.7, k=4).keys == keys(expected)
    assert search(stock, QUERY, diverse=0.0, k=4).keys == keys(order[:4])


def test_all_together_with_a_condition(stock):
    found = search(stock, QUERY, expand=3, rerank=30, diverse=0.5, k=5, where="key < '30'")
    assert len(found) == 5
    assert all(key < "30" for key in found.keys)


def test_mistakes_are_named(stock):
    for name, value in (("expand", -1), ("rerank", -1), ("diverse", 1.5), ("k", 0)):
        with pytest.raises(ClipworksError, match=f"{name} must lie in"):
            search(stock, QUERY, **{name: value})


def test_the_command_has_the_options(capsys):
    assert main(["search", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--minus", "--image", "--expand", "--rerank", "--diverse", "--negative"))
