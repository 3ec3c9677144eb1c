"""What the detectors share: views, feature maps, the core set's promises, memory by folds, thresholds, the result."""

import json

import numpy as np
import pytest
import torch
from parts import flawed, good, toy
from PIL import Image

from clipworks.anomaly.common import CoreSet, Memory, distances, grids, quantile, smooth, stacked, thinned, views
from clipworks.anomaly.detector import AnomalyDetector
from clipworks.anomaly.patch_memory import PatchMemory
from clipworks.anomaly.result import AnomalyMap
from clipworks.errors import BadImage, ClipworksError


def unit(n, dim=5, seed=0):
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("dim", [3, 5, 200])
def test_a_core_set_is_bounded_apart_and_covers_all_it_saw(dim):
    rows = unit(3000, dim)
    core = CoreSet(60)
    for part in rows.split(170):
        core.add(part)
        assert len(core.rows) <= 60
    assert len(core.rows) >= 40  # the room is used, also where all distances are nearly equal
    apart = torch.cdist(core.rows.double(), core.rows.double()) + 9 * torch.eye(len(core.rows))
    assert apart.min() > core.radius * 0.9999
    far = torch.cdist(rows.double(), core.rows.double()).amin(1).max()
    assert far <= core.reach
    best = torch.cdist(rows.double(), rows[:: len(rows) // 60].double()).amin(1).max()
    assert far < 1.5 * best  # as good as 60 rows picked from all of them, within the algorithm's factor


def test_a_core_set_with_room_keeps_everything_once():
    rows = unit(50)
    core = CoreSet(100)
    core.add(rows)
    core.add(rows.flip(0))
    torch.testing.assert_close(core.rows, rows)


def test_thinning_is_first_come_first_kept():
    rows = unit(40, 3)
    kept = []
    for i, row in enumerate(rows.double()):
        if all((row - rows[j].double()).norm() > 0.5 for j in kept):
            kept.append(i)
    assert thinned(rows @ rows.T, 0.5).tolist() == kept


def test_memory_leaves_a_fold_out():
    memory = Memory(100, 3)
    parts = [unit(4, seed=s) for s in range(3)]
    for fold, rows in enumerate(parts):
        memory.add(rows, fold)
    queries = unit(6, seed=9).view(2, 3, 5)
    for without in (None, 0, 2):
        kept = torch.cat([rows for fold, rows in enumerate(parts) if fold != without])
        nearest = [[min(1 - float(q @ k) for k in kept) for q in image] for image in queries]
        np.testing.assert_allclose(memory.distances(queries, without), nearest, atol=1e-6)
    assert (memory.distances(queries) <= memory.distances(queries, 1)).all()
    np.testing.assert_allclose(distances(unit(4), unit(4), squared=False), 0, atol=1e-3)


def test_stacked_maps_are_unit_rows_of_neighbourhoods():
    fine, coarse = torch.randn(2, 4, 6, 6), torch.randn(2, 3, 3, 3)
    rows = stacked([fine, coarse])
    assert rows.shape == (2, 6, 6, 7)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, 6, 6))
    around = fine[0, :, 1:4, 2:5].mean((1, 2))  # the 3 x 3 cells around row 2, column 3
    torch.testing.assert_close(rows[0, 2, 3, :4], around / around.norm() / 2**0.5)
    corner = fine[1, :, :2, :2].mean((1, 2))  # outside the image there is nothing to average
    torch.testing.assert_close(rows[1, 0, 0, :4], corner / corner.norm() / 2**0.5)


def test_feature_maps_of_every_kind_of_tower():
    encoder = toy(layers=4)
    found = grids(encoder, good(2), [0, -1])
    output = encoder.visual.run(good(2), output_layers=(-1,))
    torch.testing.assert_close(found[1][1, :, 2, 3], output.layers[-1][1, 1 + 2 * 6 + 3])
    assert len(grids(encoder, good(2))) == 2
    hybrid = toy(stem="efficientnet-lite0", patch_size=32, image_size=64)
    assert [m.shape[1:] for m in grids(hybrid, good(1, side=64))] == [(40, 8, 8), (112, 4, 4)]
    with pytest.raises(ClipworksError, match="layers must hold numbers of blocks, or names such as 'stem8'"):
        grids(encoder, good(2), ["stem"])


def test_whole_images_are_seen_in_the_order_given(tmp_path):
    for i, size in enumerate([(30, 20), (24, 24), (10, 40)]):
        Image.new("RGB", size, (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1b.png").write_bytes(b"no image")
    (batch,) = views(tmp_path, toy(), 16, on_error="report")
    assert batch.keys == ["0.png", "1.png", "2.png"]
    assert batch.sizes == [(30, 20), (24, 24), (10, 40)]
    assert [e.key for e in batch.errors] == ["1b.png"]
    assert batch.pixels.shape == (3, 3, 16, 16)
    assert batch.pixels[1, 0].std() < 1e-6 < batch.pixels[:, 0].std()
    with pytest.raises(BadImage, match=r"1b\.png"):
        list(views(tmp_path, toy(), 16))
    array = np.zeros((5, 7, 3), np.uint8)
    for one in (array, [array], Image.fromarray(array), str(tmp_path / "0.png")):
        assert sum(len(b.keys) for b in views(one, toy(), 16)) == 1


def test_smoothing_keeps_constants_and_blurs_a_point():
    flat = smooth(torch.full((1, 4, 4), 2.0), 16)
    np.testing.assert_allclose(flat, 2, rtol=1e-6)
    point = torch.zeros(1, 16, 16)
    point[0, 8, 8] = 1
    blurred = smooth(point, 16, sigma=1 / 16)
    x = np.exp(-(np.arange(-4, 5) ** 2) / 2)
    np.testing.assert_allclose(blurred[0, 8, 4:13], x[4] / x.sum() * x / x.sum(), atol=1e-6)
    assert np.array_equal(smooth(point, 16, sigma=0), point)


def test_the_threshold_keeps_its_promise_on_further_images():
    rng = np.random.default_rng(0)
    over = [(rng.normal(size=200) > quantile(rng.normal(size=59), 0.1)).mean() for _ in range(500)]
    assert abs(np.mean(over) - 6 / 60) < 0.006
    assert quantile(np.array([3.0, 1.0]), 0.05) == 3


class Brightness(AnomalyDetector):
    """Heat is how bright a cell is; learns nothing, so its thresholds can be computed by hand."""

    sigma = 0

    def __init__(self, encoder=None, *, image_size=None, rate=0.25):
        self.encoder, self.image_size, self.rate = encoder, image_size, rate

    def _describe(self, pixels):
        return {"light": pixels.mean(1)}

    def _judge(self, described, without):
        return described["light"], described["light"].mean((1, 2))


def test_thresholds_maps_and_predictions():
    images = good(7) * torch.arange(1, 8)[:, None, None, None]
    detector = Brightness(toy()).fit(images)
    light = images.mean(1).numpy()
    means, peaks = np.sort(light.mean((1, 2))), np.sort(light.max((1, 2)))
    assert detector.threshold_ == pytest.approx(means[5])  # the sixth of seven: ceil(0.75 * 8)
    assert detector.pixel_threshold_ == pytest.approx(peaks[5])
    assert detector.floor_ == pytest.approx(np.median(light))
    found = list(detector.score_maps(images, batch_size=3))
    np.testing.assert_allclose([m.score for m in found], light.mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found[4].heat, light[4], rtol=1e-6)
    np.testing.assert_allclose(detector.score(images), [m.score for m in found])
    assert detector.predict(images).tolist() == [1] * 6 + [-1]
    assert [m.defective for m in found] == [False] * 6 + [True]
    assert detector.score_map(images[2], key="third").key == "third"


def test_maps_have_the_size_of_the_image():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))
    found = Brightness(toy()).fit(good(3)).score_map(picture)
    assert found.heat.shape == (30, 50)
    assert found.draw().size == (50, 30)


def test_one_good_image_is_judged_by_its_mirror_image():
    one = good(1)
    detector = PatchMemory(toy()).fit(one)
    assert detector.threshold_ == pytest.approx(detector.score(one.flip(-1))[0])


def result():
    heat = np.zeros((20, 30), np.float32)
    heat[2:5, 3:9] = 0.8
    heat[10, 10] = heat[11, 11] = 0.9
    heat[15, 20] = 0.4
    return AnomalyMap("a.png", heat, 0.9, 0.5, 0.5)


def test_regions():
    first, second = result().regions()
    assert (first.x0, first.y0, first.x1, first.y1, first.area) == (10, 10, 12, 12, 2)
    assert (second.x0, second.y0, second.x1, second.y1, second.area) == (3, 2, 9, 5, 18)
    assert first.peak == pytest.approx(0.9)
    assert len(result().regions(least=3)) == 1


def test_a_drawing_leaves_usual_places_alone():
    picture = Image.new("RGB", (30, 20), (10, 200, 10))
    found = result()
    found.picture = picture
    drawn = np.asarray(found.draw(boxes=False), int)
    assert (drawn[found.heat == 0] == (10, 200, 10)).all()
    assert (np.abs(drawn[found.mask] - (10, 200, 10)).sum(1) > 100).all()
    found.picture = Image.new("RGB", (20, 30))
    with pytest.raises(ClipworksError, match="picture must have the size of the heat"):
        found.draw()


def test_saved_results(tmp_path):
    found = result()
    assert Image.open(found.save(tmp_path / "a.png")).size == (30, 20)
    with np.load(found.save(tmp_path / "a.npz")) as arrays:
        np.testing.assert_array_equal(arrays["heat"], found.heat)
    row = json.loads(found.save(tmp_path / "a.json").read_text())
    assert row == found.as_row()
    assert (row["defective"], len(row["regions"])) == (True, 2)
    with pytest.raises(ClipworksError, match="ending of an anomaly map must be one of"):
        found.save(tmp_path / "a.bmp")


def test_flaws_are_what_the_tests_think():
    images, masks = flawed()
    assert masks.sum() == 6 * 64
    assert images.shape == (6, 3, 24, 24)
