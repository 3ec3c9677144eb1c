"""Pixel metrics against scikit-learn, and PRO against a naive count of every threshold and region."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import f1_score, roc_auc_score

from clipworks.errors import ClipworksError
from clipworks.metrics.anomaly import aupro, pixel_auroc, pixel_f1_max, pro_curve


def draw(seed, digits=None, n=4, side=12):
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.normal(size=(n, side, side)), (0, 1.2, 1.2)) > 0.35
    masks[0] = False
    maps = rng.normal(size=masks.shape) + 1.5 * masks
    return (maps if digits is None else maps.round(digits)), masks


def naive(maps, masks, limit):
    """Every threshold, every region, by the definition."""
    regions = []
    for number, mask in enumerate(masks):
        labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(number, labelled == k) for k in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for t in np.unique(maps)[::-1]:
        hit = maps >= t
        overlap = np.mean([hit[i][region].mean() for i, region in regions])
        points.append((hit[~masks].mean(), overlap))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            y1, x1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0), limit
        area += (x1 - x0) * (y0 + y1) / 2
    return points, area / limit


@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_definitions(seed, digits):
    maps, masks = draw(seed, digits)
    points, area = naive(maps, masks, 0.3)
    np.testing.assert_allclose(np.transpose(pro_curve(maps, masks)), points, atol=1e-12)
    assert abs(aupro(maps, masks) - area) < 1e-9
    assert abs(aupro(maps, masks, 0.05) - naive(maps, masks, 0.05)[1]) < 1e-9
    assert abs(pixel_auroc(maps, masks) - roc_auc_score(masks.ravel(), maps.ravel())) < 1e-12
    best = max(f1_score(masks.ravel(), maps.ravel() >= t) for t in np.unique(maps))
    assert abs(pixel_f1_max(maps, masks)[0] - best) < 1e-12


def test_the_mask_as_map_is_perfect_and_order_is_all_that_counts():
    maps, masks = draw(0)
    assert aupro(masks.astype(float), masks) == pytest.approx(1, abs=1e-12)
    assert aupro(np.exp(maps), masks) == pytest.approx(aupro(maps, masks), abs=1e-12)


def test_small_regions_weigh_as_much_as_large_ones():
    mask = np.zeros((1, 20, 20), bool)
    mask[0, :10, :10], mask[0, 15, 15] = True, True
    heat = mask.copy().astype(float)
    heat[0, 15, 15] = 0
    fpr, pro = pro_curve(heat, mask)
    assert pro[fpr == 0].max() == pytest.approx(0.5)
    assert (heat[mask] > 0).mean() > 0.99  # of the pixels, nearly all are found


def test_diagonal_neighbours_are_one_region():
    mask = np.zeros((1, 4, 4))
    mask[0, 0, 0] = mask[0, 1, 1] = 1
    heat = np.zeros((1, 4, 4))
    heat[0, 0, 0] = 1
    assert pro_curve(heat, mask)[1].tolist() == [0, 0.5, 1]


def test_maps_of_different_sizes():
    maps, masks = draw(1)
    cut = [(m[:9, :7], k[:9, :7]) if i == 2 else (m, k) for i, (m, k) in enumerate(zip(maps, masks, strict=True))]
    heats, truths = zip(*cut, strict=True)
    expected = roc_auc_score(np.concatenate([t.ravel() for t in truths]), np.concatenate([h.ravel() for h in heats]))
    assert pixel_auroc(heats, truths) == pytest.approx(expected, abs=1e-12)
    assert 0 < aupro(heats, truths) < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, k: (m[:2], k), r"as many as the maps \(2\). Got 4"),
        (lambda m, k: (m[:, :5], k), "the same shape"),
        (lambda m, k: (m * np.nan, k), "maps must be finite"),
        (lambda m, k: (m, k & False), "defects and good pixels. Got 0 regions"),
        (lambda m, k: ([], []), "at least one heat map"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ClipworksError, match=message):
        aupro(*change(*draw(0)))
