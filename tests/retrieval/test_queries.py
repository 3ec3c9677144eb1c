"""Queries of several parts against plain sums, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.retrieval.queries import compose, make_query, parts_of


def test_parts_and_weights_in_their_order():
    query = make_query(["at night", Path("a.jpg")], image="b.jpg", negative=["rain", "fog"], minus="a dog")
    assert query.parts == ["at night", Path("a.jpg"), Path("b.jpg"), "rain", "fog", "a dog"]
    assert query.weights == [1, 1, 1, -0.5, -0.5, -1]
    assert str(query) == "at night + a.jpg + b.jpg - rain - fog - a dog"
    assert make_query("a", minus="b", weights=[0.2, 0.3]).weights == [0.2, 0.3]


def test_compose_is_the_unit_weighted_sum():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, 5))
    expected = 2 * rows[0] - 0.5 * rows[1] - rows[2]
    found = compose(rows, [2, -0.5, -1])
    np.testing.assert_allclose(found, expected / np.sqrt((expected**2).sum()), atol=1e-6)
    assert found.dtype == np.float32


def test_words_minus_words_lose_what_all_texts_share():
    """With a weight of -1 the common part of the texts cancels; with -0.5 half of it stays."""
    common, stripes, horse = np.eye(3)
    both, alone = common + horse + stripes, common + horse
    assert compose(np.stack([both, alone]), [1, -1]) @ stripes == pytest.approx(1)
    assert abs(compose(np.stack([both, alone]), [1, -0.5]) @ common) > 0.3


def test_parts_of_every_form():
    assert parts_of(None) == []
    assert parts_of("a dog") == ["a dog"]
    assert len(parts_of(np.eye(3))) == 3
    assert len(parts_of(torch.eye(3))) == 3
    assert len(parts_of([1.0, 2.0])) == 1
    assert len(parts_of(np.zeros((4, 4, 3), np.uint8))) == 1


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="query must be words, an image or a vector"):
        make_query()
    with pytest.raises(ClipworksError, match=r"one number per part of the query \(2\)\. Got 1"):
        make_query("a", minus="b", weights=[1])
    with pytest.raises(ClipworksError, match="its parts cancel"):
        compose(np.ones((2, 3)), [1, -1])
