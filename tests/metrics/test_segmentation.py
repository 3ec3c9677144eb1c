"""Segmentation metrics against scikit-learn, loops and worked cases."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score

from clipworks.errors import ClipworksError
from clipworks.metrics.segmentation import (
    boundary,
    boundary_counts,
    boundary_iou,
    class_iou,
    confusion,
    harmonic_iou,
    mean_iou,
    panoptic_counts,
    panoptic_quality,
    pixel_accuracy,
    weighted_iou,
)


@pytest.fixture
def maps():
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 5, (20, 30))
    prediction = np.where(draw.random(truth.shape) < 0.6, truth, draw.integers(0, 5, truth.shape))
    truth[draw.random(truth.shape) < 0.1] = 255
    return truth, prediction


def test_against_scikit_learn(maps):
    truth, prediction = maps
    kept = truth != 255
    counts = confusion(truth, prediction, 5)
    assert np.array_equal(counts, confusion_matrix(truth[kept], prediction[kept], labels=range(5)))
    expected = jaccard_score(truth[kept], prediction[kept], average=None, labels=range(5))
    np.testing.assert_allclose(class_iou(counts), expected, atol=1e-6)
    assert mean_iou(counts) == pytest.approx(expected.mean(), abs=1e-6)
    weights = jaccard_score(truth[kept], prediction[kept], average="weighted")
    assert weighted_iou(counts) == pytest.approx(weights, abs=1e-6)
    assert pixel_accuracy(counts) == pytest.approx((truth == prediction)[kept].mean(), abs=1e-6)


def test_ignored_pixels_have_no_effect(maps):
    truth, prediction = maps
    other = np.where(truth == 255, 4 - prediction, prediction)
    assert np.array_equal(confusion(truth, other, 5), confusion(truth, prediction, 5))


def test_images_add_up_and_are_not_averaged(maps):
    truth, prediction = maps
    parts = [confusion(truth[i : i + 5], prediction[i : i + 5], 5) for i in range(0, 20, 5)]
    assert np.array_equal(sum(parts), confusion(truth, prediction, 5))


def test_perfect_wrong_and_absent_classes():
    truth = np.array([[0, 1], [1, 3]])
    assert mean_iou(confusion(truth, truth, 5)) == 1.0
    assert mean_iou(confusion(truth, np.array([[1, 0], [0, 4]]), 5)) == 0.0
    assert np.isnan(class_iou(confusion(truth, truth, 5))[[2, 4]]).all()
    assert mean_iou(confusion(truth, truth, 5), classes=[0, 2]) == 1.0
    empty = np.zeros((3, 3), int)
    assert np.isnan([mean_iou(empty), pixel_accuracy(empty), weighted_iou(empty)]).all()


def test_harmonic_mean():
    assert harmonic_iou(0.8, 0.2) == pytest.approx(0.32)
    assert harmonic_iou(0.0, 0.0) == 0.0


def test_boundary_against_a_loop():
    mask = np.random.default_rng(1).random((24, 30)) < 0.9
    steps = max(1, round(0.05 * np.hypot(24, 30)))
    for y in range(24):
        for x in range(30):
            ys, xs = range(y - steps, y + steps + 1), range(x - steps, x + steps + 1)
            inside = all(0 <= a < 24 and 0 <= b < 30 and mask[a, b] for a in ys for b in xs)
            assert boundary(mask, 0.05)[y, x] == (mask[y, x] and not inside)


def test_boundary_iou_sees_what_iou_hardly_does():
    truth = np.zeros((100, 100), int)
    truth[20:80, 20:80] = 1
    near = np.zeros_like(truth)
    near[22:78, 22:78] = 1
    assert boundary_iou(boundary_counts(truth, truth, 2)) == 1.0
    assert class_iou(confusion(truth, near, 2))[1] > 0.85
    one, two = ((truth == 1), (near == 1))
    d = round(0.02 * np.hypot(100, 100))  # three pixels: the frames share one ring
    ring_one = one.copy()
    ring_one[20 + d : 80 - d, 20 + d : 80 - d] = False
    ring_two = two.copy()
    ring_two[22 + d : 78 - d, 22 + d : 78 - d] = False
    counts = boundary_counts(truth, near, 2)
    assert counts[1].tolist() == [(ring_one & ring_two).sum(), (ring_one | ring_two).sum()]
    assert boundary_iou(counts) < 0.6


def test_panoptic_quality_of_the_worked_case():
    """Two of three true segments are found with an IoU of 0.6 each."""
    truth, prediction = np.zeros((3, 10), int), np.zeros((3, 10), int)
    truth[0, :8], truth[1, :8], truth[2] = 1, 2, 3
    prediction[0, :6], prediction[0, 6:8] = 7, 0
    prediction[1, :6] = 8
    truth[0, 8:], truth[1, 8:] = 1, 2
    counts = panoptic_counts(truth, {1: 0, 2: 0, 3: 0}, prediction, {7: 0, 8: 0})
    assert counts == {0: (2, 0, 1, pytest.approx(1.2))}
    assert panoptic_quality(counts) == pytest.approx({"pq": 0.48, "sq": 0.6, "rq": 0.8})


def test_panoptic_classes_void_and_false_segments():
    truth = np.array([[1, 1, 1, 1, 0, 0, 0, 0]])
    prediction = np.array([[5, 5, 5, 5, 5, 6, 6, 6]])
    # the void pixel leaves the union; segment 6 lies in the void and does not count
    assert panoptic_counts(truth, {1: 2}, prediction, {5: 2, 6: 2}) == {2: (1, 0, 0, 1.0)}
    # the right place under another class is a miss and a false segment
    assert panoptic_counts(truth, {1: 2}, prediction, {5: 3, 6: 3}) == {2: (0, 0, 1, 0.0), 3: (0, 1, 0, 0.0)}
    # exactly a half is no match
    half = np.array([[1, 1, 1, 1, 2, 2, 2, 2]])
    assert panoptic_counts(half, {1: 0, 2: 1}, np.array([[9, 9, 0, 0, 8, 8, 8, 8]]), {9: 0, 8: 1})[0][0] == 0


def test_messages():
    with pytest.raises(ClipworksError, match="shape"):
        confusion(np.zeros((2, 2), int), np.zeros((2, 3), int), 2)
    with pytest.raises(ClipworksError, match=r"truth must hold labels from 0 to 1\. Got 0 to 2"):
        confusion(np.array([0, 2]), np.array([0, 1]), 2)
    with pytest.raises(ClipworksError, match="prediction must hold"):
        confusion(np.array([0, 1]), np.array([0, -1]), 2)
    with pytest.raises(ClipworksError, match="at least one segment"):
        panoptic_quality({})
