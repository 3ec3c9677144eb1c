"""K-reciprocal distances against sets and loops, their limits; rank fusion against sums."""

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.retrieval.rerank import fuse, reciprocal_distances
from clipworks.types import Ranking


def rows(n, dim=5, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def oracle(queries, gallery, k1, k2, mix):
    """The paper with Python sets."""
    x = np.concatenate([queries, gallery]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    n, dist = len(x), np.maximum(1 - x @ x.T, 0)
    order = [[i, *[j for j in np.argsort(dist[i]) if j != i]] for i in range(n)]

    def mutual(i, k):
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    weights = np.zeros((n, n))
    for i in range(n):
        near, members = mutual(i, k1), set(mutual(i, k1))
        for j in near:
            other = mutual(j, max(1, round(k1 / 2)))
            if len(other & near) > 2 / 3 * len(other):
                members |= other
        for j in members:
            weights[i, j] = np.exp(-dist[i, j])
        weights[i] /= weights[i].sum()
    weights = np.array([np.mean([weights[j] for j in order[i][:k2]], 0) for i in range(n)])
    q = len(queries)
    jaccard = [[1 - sum(map(min, weights[i], weights[j])) / sum(map(max, weights[i], weights[j])) for j in range(q, n)]
               for i in range(q)]  # fmt: skip
    return mix * dist[:q, q:] + (1 - mix) * np.array(jaccard)


@pytest.mark.parametrize(("k1", "k2", "mix"), [(5, 2, 0.3), (4, 1, 0.0), (30, 6, 0.5)])
def test_against_sets(k1, k2, mix):
    found = reciprocal_distances(rows(2), rows(14, seed=1), k1=k1, k2=k2, mix=mix)
    np.testing.assert_allclose(found, oracle(rows(2), rows(14, seed=1), k1, k2, mix), atol=1e-6)


def test_a_mix_of_one_is_the_plain_order():
    query, stock = rows(1), rows(20, seed=1)
    found = reciprocal_distances(query, stock, mix=1.0)[0]
    assert np.argsort(found).tolist() == np.argsort(-(query @ stock.T)[0]).tolist()


def test_it_finds_more_of_a_class_whose_members_know_each_other():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 20)
    asked = np.repeat(np.arange(4), 10)
    stock = np.eye(4, 12)[labels] + 0.2 * rng.normal(size=(80, 12))
    queries = np.eye(4, 12)[asked] + 0.4 * rng.normal(size=(40, 12))
    stock, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (stock, queries))

    def right(distance):
        return np.mean(labels[np.argsort(distance, axis=1)[:, :20]] == asked[:, None])

    distances = np.concatenate([reciprocal_distances(query[None], stock) for query in queries])
    assert right(distances) > right(-queries @ stock.T) + 0.05


def test_twins_and_a_single_row():
    stock = np.repeat(rows(3), 2, 0)
    assert np.isfinite(reciprocal_distances(stock[:1], stock, k1=2, k2=1)).all()
    assert reciprocal_distances(rows(1), rows(1, seed=2)).shape == (1, 1)


def test_fusion_is_the_sum_of_reciprocal_ranks():
    one = Ranking(list("abc"), np.array([3.0, 2.0, 1.0]), "x")
    two = Ranking(list("cad"), np.array([9.0, 8.0, 7.0]), "y")
    found = fuse([one, two], k=10)
    expected = {"a": 1 / 11 + 1 / 12, "b": 1 / 12, "c": 1 / 13 + 1 / 11, "d": 1 / 13}
    assert {key: score for key, score in found} == pytest.approx(expected)
    assert found.keys == sorted(expected, key=lambda key: -expected[key])
    assert found.query == "x | y"
    assert fuse([one, two], weights=[1, 0]).keys[:3] == list("abc")
    assert fuse([one]).keys == one.keys
    assert len(fuse([])) == 0


def test_columns_stay_with_their_keys():
    one = Ranking(["a", "b"], np.array([1.0, 0.5]), "", [{"label": 1}, {"label": 2}])
    two = Ranking(["b", "a"], np.array([1.0, 0.5]), "", [{"label": 2}, {"label": 1}])
    assert fuse([one, two, two]).columns == [{"label": 2}, {"label": 1}]


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="k2 must lie in"):
        reciprocal_distances(rows(1), rows(3), k1=2, k2=3)
    with pytest.raises(ClipworksError, match="mix must lie in"):
        reciprocal_distances(rows(1), rows(3), mix=2)
    with pytest.raises(ClipworksError, match=r"one number per ranking \(1\)"):
        fuse([Ranking(["a"], np.ones(1))], weights=[1, 2])
