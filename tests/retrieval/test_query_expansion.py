"""Query expansion against its formula, its limits, and what it does to a noisy query."""

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.retrieval.query_expansion import expand_query


def rows(n, dim=6, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_against_the_formula(power):
    query, hits = rows(1)[0], rows(4, seed=1)
    scores = np.array([0.5, 0.4, 0.1, 0.02])
    total = query + sum((s / 0.5) ** power * h for s, h in zip(scores, hits, strict=True))
    np.testing.assert_allclose(expand_query(query, hits, scores, power), total / np.sqrt(total @ total), atol=1e-6)


def test_lengths_do_not_matter():
    query, hits, scores = rows(1)[0], rows(3, seed=1), np.array([0.5, 0.4, 0.1])
    np.testing.assert_allclose(
        expand_query(7 * query, 0.1 * hits, scores), expand_query(query, hits, scores), atol=1e-6
    )


def test_hits_that_point_away_have_no_weight_and_none_changes_nothing():
    query, hits = rows(1)[0], rows(2, seed=1)
    np.testing.assert_allclose(
        expand_query(query, hits, np.array([0.3, -0.9])), expand_query(query, hits[:1], np.array([0.3])), atol=1e-6
    )
    np.testing.assert_allclose(expand_query(query, hits, np.array([-0.1, 0.0])), query, atol=1e-6)
    np.testing.assert_allclose(expand_query(query, hits[:0], np.array([])), query, atol=1e-6)


def test_a_noisy_query_comes_nearer_to_its_class():
    rng = np.random.default_rng(0)
    centre = rows(1)[0]
    better = 0
    for _ in range(20):
        members = centre + 0.4 * rng.normal(size=(30, 6))
        members /= np.linalg.norm(members, axis=1, keepdims=True)
        query = centre + 0.5 * rng.normal(size=6)
        query /= np.linalg.norm(query)
        scores = members @ query
        best = np.argsort(-scores)[:10]
        better += expand_query(query, members[best], scores[best]) @ centre > query @ centre
    assert better >= 18


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="power must lie in"):
        expand_query(rows(1)[0], rows(2), np.ones(2), -1)
    with pytest.raises(ClipworksError, match=r"one number per hit \(2\)\. Got 3"):
        expand_query(rows(1)[0], rows(2), np.ones(3))
