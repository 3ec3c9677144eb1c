"""Maximal marginal relevance against loops, its two ends, and copies."""

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.retrieval.diversity import diverse_order


def data(n=12, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    return x, rng.random(n)


def oracle(x, scores, k, d):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    sim = x @ x.T
    off = [sim[i, j] for i in range(len(x)) for j in range(len(x)) if i != j]
    sim = (sim - min(off)) / (max(off) - min(off))
    rel = (scores - scores.min()) / (scores.max() - scores.min())
    chosen = []
    while len(chosen) < k:
        gains = {i: rel[i] if not chosen else (1 - d) * rel[i] - d * max(sim[i, j] for j in chosen)
                 for i in range(len(x)) if i not in chosen}  # fmt: skip
        chosen.append(max(gains, key=gains.get))
    return chosen


@pytest.mark.parametrize("d", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_loops(d, seed):
    x, scores = data(seed=seed)
    assert diverse_order(3 * x, scores, 8, d).tolist() == oracle(x, scores, 8, d)


def test_without_diversity_it_is_the_ranking():
    x, scores = data()
    assert diverse_order(x, scores, 12, 0.0).tolist() == np.argsort(-scores).tolist()


def test_copies_come_last():
    x, _ = data(5)
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    copies = np.concatenate([x, x])
    found = diverse_order(copies, np.concatenate([scores, scores - 0.01]), 5, 0.9)
    assert len({i % 5 for i in found}) == 5


def test_a_shift_of_all_scores_changes_nothing():
    x, scores = data()
    assert diverse_order(x, scores, 6).tolist() == diverse_order(x, 0.01 * scores + 5, 6).tolist()


def test_edges_and_mistakes():
    x, scores = data(3)
    assert sorted(diverse_order(x, scores, 10).tolist()) == [0, 1, 2]
    assert diverse_order(x[:1], scores[:1], 1).tolist() == [0]
    assert diverse_order(x[:0], scores[:0], 1).tolist() == []
    with pytest.raises(ClipworksError, match="diversity must lie in"):
        diverse_order(x, scores, 2, 1.5)
    with pytest.raises(ClipworksError, match="one number per vector"):
        diverse_order(x, scores[:2], 2)
