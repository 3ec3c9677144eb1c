"""Image retrieval against scikit-learn, loops, and the facts of its card that concern evaluation."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from clipworks.errors import ClipworksError
from clipworks.metrics import retrieval
from clipworks.metrics.retrieval import image_retrieval
from clipworks.types import Features


def vectors(n=40, classes=6, dim=5, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = rng.normal(size=(classes, dim))[y] + 1.2 * rng.normal(size=(n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), y


def brute(x, y, gallery, of, removed):
    """(AP, how many others are at least as near as the nearest relevant image) of every query, by loops."""
    found = []
    for i in range(len(x)):
        kept = [j for j in range(len(gallery)) if not removed(i, j)]
        score, hit = gallery[kept] @ x[i], of[kept] == y[i]
        others = sum(s >= score[hit].max() for s, h in zip(score, hit, strict=True) if not h) if hit.any() else None
        found.append((average_precision_score(hit, score) if hit.any() else np.nan, others))
    return found


@pytest.mark.parametrize("cells", [1 << 22, 100])  # all queries together, and a few at a time
def test_equals_scikit_learn_with_the_query_left_out(monkeypatch, cells):
    monkeypatch.setattr(retrieval, "CELLS", cells)
    x, y = vectors()
    y[0] = 99  # nothing else is of this class
    expected = brute(x, y, x, y, lambda i, j: i == j)
    found = image_retrieval(x, y, cutoffs=(1, 3, 10))
    np.testing.assert_allclose(found.average_precision, [ap for ap, _ in expected], atol=1e-6)
    assert found.unanswerable == 1
    assert found.mean_average_precision == pytest.approx(np.nanmean([ap for ap, _ in expected]))
    others = [o for _, o in expected if o is not None]
    assert found.recall == pytest.approx({k: np.mean([o < k for o in others]) for k in (1, 3, 10)})
    assert 0.2 < found.recall[1] < found.recall[10] <= 1


def test_another_gallery_and_what_is_ignored():
    x, y = vectors()
    gallery, of = vectors(60, seed=1)
    ignore = np.random.default_rng(0).random((40, 60)) < 0.3
    expected = brute(x, y, gallery, of, lambda i, j: ignore[i, j])
    found = image_retrieval(x, y, gallery=gallery, gallery_labels=of, ignore=ignore)
    np.testing.assert_allclose(found.average_precision, [ap for ap, _ in expected], atol=1e-6)
    named = [f"kind {c}" for c in y]
    same = image_retrieval(Features(x, labels=np.array(named)), gallery=Features(gallery, labels=np.array(
        [f"kind {c}" for c in of])), ignore=ignore)  # fmt: skip
    np.testing.assert_array_equal(same.average_precision, found.average_precision)


def test_equal_scores_share_their_place():
    """Scikit-learn's rule; and no credit for an encoder that gives all images one vector."""
    x = np.array([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 1]])
    y = np.array([0, 0, 1, 1, 1])
    found = image_retrieval(x, y)
    expected = brute(x, y, x, y, lambda i, j: i == j)
    np.testing.assert_allclose(found.average_precision, [ap for ap, _ in expected])
    constant = image_retrieval(np.ones((10, 3)), np.arange(10) % 2)
    assert constant.recall[1] == 0
    assert constant.mean_average_precision == pytest.approx(4 / 9)


def test_votes_are_those_of_scikit_learn():
    x, y = vectors(60, classes=3)
    gallery, of = vectors(80, classes=3, seed=1)
    for k in (1, 7, 21):
        votes = KNeighborsClassifier(k, metric="cosine").fit(gallery, of)
        counts = votes.predict_proba(x) * k
        clear = np.sort(counts, 1)[:, -1] > np.sort(counts, 1)[:, -2]
        assert clear.sum() > 40
        found = image_retrieval(x[clear], y[clear], gallery=gallery, gallery_labels=of, neighbours=k)
        assert found.knn == pytest.approx(votes.score(x[clear], y[clear]))
    tie = image_retrieval([[1.0, 0.0]], [1], gallery=[[0.9, 0.5], [1, 0.1], [0.9, -0.5], [1, 0.2]],
                          gallery_labels=[0, 1, 0, 1], neighbours=4)  # fmt: skip
    assert tie.knn == 1


def test_it_does_not_change_under_rotation_length_and_order():
    x, y = vectors()
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    order = np.random.default_rng(1).permutation(len(x))
    plain = image_retrieval(x, y)
    moved = image_retrieval(3 * (x @ turn)[order], y[order])
    np.testing.assert_allclose(moved.average_precision, plain.average_precision[order], atol=1e-6)


def test_perfect_groups_are_found_perfectly():
    found = image_retrieval(np.eye(5)[np.arange(20) % 5], np.arange(20) % 5)
    assert (found.mean_average_precision, found.recall) == (1, {1: 1, 5: 1, 10: 1})
    assert found.knn == 0  # all 19 others vote: 3 for the own class, 4 for each other
    assert image_retrieval(np.eye(5)[np.arange(20) % 5], np.arange(20) % 5, neighbours=3).knn == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "labels must hold one label per vector"),
        ({"labels": np.zeros(3)}, "labels must hold one label per vector"),
        ({"gallery": vectors()[0]}, "gallery_labels must hold"),
        ({"gallery": np.ones((4, 3))}, r"shape \(n, 5\)"),
        ({"ignore": np.ones((2, 2))}, "ignore must have shape"),
        ({"cutoffs": (0,)}, "cutoffs must lie in"),
        ({"neighbours": 0}, "neighbours must lie in"),
        ({"labels": np.arange(40)}, "None has one"),
    ],
)
def test_mistakes_are_named(change, message):
    x, y = vectors()
    with pytest.raises(ClipworksError, match=message):
        image_retrieval(**{"queries": x, "labels": y, **change})
