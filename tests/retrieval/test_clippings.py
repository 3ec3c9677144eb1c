"""Record linkage: DBSCAN and agglomerative clustering of scikit-learn, limits of weight and threshold, the sampler."""

import itertools

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import DBSCAN, AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score, pairwise_distances

from clipworks.errors import ClipworksError
from clipworks.retrieval.clippings import (
    hard_batches,
    link_records,
    link_to,
    record_vectors,
    tune_links,
)
from clipworks.retrieval.common import group_scores


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rows(n, dim=8, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(n, dim)))


def entities(count=30, each=4, noise=0.9, seed=0):
    """Records of entities: image and text are two noisy views of what the entity is, equally noisy."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(count), each)
    u, v = (unit(rng.normal(size=(count, 24)))[labels] for _ in range(2))
    image, text = (x + noise * rng.normal(size=x.shape) / np.sqrt(24) for x in (u, v))
    return image, text, labels


def test_the_weight_chooses_between_image_and_text():
    u, v = rows(5), rows(5, seed=1)
    np.testing.assert_allclose(record_vectors(3 * u, v, 1.0), u, atol=1e-6)
    np.testing.assert_allclose(record_vectors(u, 5 * v, 0.0), v, atol=1e-6)
    np.testing.assert_allclose(record_vectors(u, v, 0.3), unit(0.3 * u + 0.7 * v), atol=1e-6)
    np.testing.assert_allclose(record_vectors(u, None), u, atol=1e-6)
    for weight in (0.0, 0.4, 1.0):
        np.testing.assert_allclose(record_vectors(u, 2 * u, weight), u, atol=1e-6)


@pytest.mark.parametrize("eps", [0.2, 0.35, 0.5])
def test_groups_are_those_of_dbscan_and_of_the_graph(eps):
    x = rows(200, dim=4)
    found = link_records(x, threshold=eps)
    distance = pairwise_distances(x, metric="cosine")
    assert adjusted_rand_score(DBSCAN(eps=eps, min_samples=1, metric="cosine").fit_predict(x), found) == 1
    assert adjusted_rand_score(connected_components(distance <= eps)[1], found) == 1
    for linkage in ("single", "average"):
        peer = AgglomerativeClustering(None, metric="cosine", linkage=linkage, distance_threshold=eps).fit_predict(x)
        assert adjusted_rand_score(peer, link_records(x, threshold=eps, linkage=linkage)) == 1


def test_fewer_groups_the_higher_the_threshold():
    x = np.concatenate([rows(60, dim=4), rows(10, dim=4)])  # the last ten are exact duplicates of the first ten
    counts = [link_records(x, threshold=eps).max() + 1 for eps in (0.0, 0.01, 0.1, 0.3, 0.6, 1.0, 2.0)]
    assert all(a >= b for a, b in itertools.pairwise(counts))
    assert counts[0] == 60
    assert counts[-1] == 1


def test_adjusted_rand_index_of_the_same_and_of_chance():
    labels = np.repeat(np.arange(10), 5)
    assert group_scores(labels, labels[::-1])["ari"] == 1
    rng = np.random.default_rng(0)
    draws = [group_scores(rng.permutation(labels), labels)["ari"] for _ in range(100)]
    assert abs(np.mean(draws)) < 0.01


def test_both_together_link_better_than_either_alone():
    image, text, labels = entities()
    other = entities(seed=1)
    tried = np.linspace(0.05, 0.9, 35)
    alone_image, alone_text = (tune_links(*other, weights=[w], thresholds=tried) for w in (1.0, 0.0))
    both = tune_links(*other, weights=(0.0, 0.3, 0.5, 0.7, 1.0), thresholds=tried)
    assert 0 < both.weight < 1
    assert both.ari == max(ari for _, ari in both.grid.values())

    def ari(tuned):
        return adjusted_rand_score(labels, link_records(image, text, weight=tuned.weight, threshold=tuned.threshold))

    assert ari(both) > max(ari(alone_image), ari(alone_text))


def test_tuning_is_the_best_of_a_grid_tried_by_hand():
    image, text, labels = entities(12, 3)
    tried = np.linspace(0.05, 0.9, 18)
    best = max(adjusted_rand_score(labels, link_records(image, text, weight=w, threshold=eps))
               for w in (0.0, 0.5, 1.0) for eps in tried)  # fmt: skip
    found = tune_links(image, text, labels, weights=(0.0, 0.5, 1.0), thresholds=tried)
    assert found.ari == pytest.approx(best, abs=1e-12)
    again = link_records(image, text, weight=found.weight, threshold=found.threshold)
    assert adjusted_rand_score(labels, again) == pytest.approx(best, abs=1e-12)


def test_links_to_a_list_or_to_nothing():
    stock = rows(6)
    asked = np.concatenate([stock[[4, 0]], -stock[:1]])
    assert link_to(asked, None, stock, threshold=0.1).tolist() == [4, 0, -1]
    nearest = pairwise_distances(-stock[:1], stock, metric="cosine").argmin()
    assert link_to(asked, None, stock, threshold=2.0).tolist() == [4, 0, nearest]


def test_batches_hold_every_class_beside_its_nearest():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(20), 4))
    x = rows(80, seed=2)
    centres = unit(np.stack([x[labels == c].sum(0) for c in range(20)]))
    score = centres @ centres.T - 9 * np.eye(20)
    batches = list(hard_batches(x, labels, views=3, near=3, batch_size=27, seed=1))
    for batch in batches:
        assert (np.unique(labels[batch], return_counts=True)[1] == 3).all()
        assert len(set(batch.tolist())) == len(batch) <= 27
    for c in range(20):
        wanted = {c, *np.argsort(-score[c])[:2].tolist()}
        assert any(wanted <= set(labels[batch].tolist()) for batch in batches)
    again = list(hard_batches(x, labels, views=3, near=3, batch_size=27, seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    moved = list(hard_batches(rows(80, seed=3), labels, views=3, near=3, batch_size=27, seed=1))
    assert [sorted(set(labels[b])) for b in moved] != [sorted(set(labels[b])) for b in batches]


def test_a_small_class_repeats_its_records():
    labels = np.array([0, 0, 0, 1, 2, 2, 2])
    (batch,) = hard_batches(rows(7), labels, views=3, near=3, batch_size=9)
    assert sorted(labels[batch].tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_mistakes_are_named():
    x = rows(4)
    with pytest.raises(ClipworksError, match=r"one vector per image \(4\)\. Got 3"):
        link_records(x, x[:3])
    with pytest.raises(ClipworksError, match="linkage must be one of"):
        link_records(x, linkage="singel")
    with pytest.raises(ClipworksError, match="weight must lie in"):
        link_records(x, x, weight=2)
    with pytest.raises(ClipworksError, match="groups of 4 records"):
        tune_links(x, x, [0, 1])
    with pytest.raises(ClipworksError, match="multiple of views"):
        list(hard_batches(x, [0, 0, 1, 1], batch_size=10))
