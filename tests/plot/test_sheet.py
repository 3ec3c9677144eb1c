"""Contact sheets: every picture is on the page, whole and in place; nothing breaks on odd input."""

import numpy as np
import pytest
from PIL import Image

from clipworks.errors import ClipworksError
from clipworks.plot.sheet import Section, Tile, classification_sheet, contact_sheet, save_sheet, search_sheet
from clipworks.types import Classification, Ranking

COLORS = [(200, 30, 30), (30, 160, 60), (30, 60, 200), (220, 180, 20), (140, 40, 160)]


def plain(color, size=(90, 60)):
    return Image.new("RGB", size, color)


def area(page, color):
    """Pixels of exactly that colour, and the box around them."""
    hit = (np.asarray(page) == color).all(-1)
    rows, columns = np.nonzero(hit)
    return hit.sum(), (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_every_picture_is_drawn_whole_in_reading_order():
    ranking = Ranking([f"{i}.jpg" for i in range(5)], np.linspace(0.9, 0.1, 5), "a query")
    page = search_sheet(ranking, lambda key: plain(COLORS[int(key[0])]), columns=3, size=120)
    boxes = [area(page, c)[1] for c in COLORS]
    for box in boxes:
        assert (box[2] - box[0], box[3] - box[1]) == (120, 80)  # 3 : 2 kept
    assert [b[1] for b in boxes[:3]] == [boxes[0][1]] * 3
    assert boxes[0][0] < boxes[1][0] < boxes[2][0]
    assert boxes[3][0] == boxes[0][0]
    assert boxes[3][1] > boxes[0][3]


def test_pictures_of_any_shape_stay_inside_their_square():
    shapes = [(1, 1), (4000, 3), (3, 4000), (64, 64)]
    tiles = [Tile(plain(c, s)) for c, s in zip(COLORS, shapes, strict=False)]
    page = contact_sheet([Section("", "", tiles)], title="shapes", columns=4, size=100)
    for color in COLORS[:4]:
        _, box = area(page, color)
        assert box[2] - box[0] <= 100
        assert box[3] - box[1] <= 100


def test_an_unreadable_picture_leaves_its_place_empty():
    ranking = Ranking(["a", "gone", "b"], np.array([0.3, 0.2, 0.1]))
    page = search_sheet(ranking, lambda key: None if key == "gone" else plain(COLORS[key == "b"]), size=100)
    first, last = area(page, COLORS[0])[1], area(page, COLORS[1])[1]
    assert last[0] - first[0] == 2 * (100 + 20 + 14)


def test_classes_stand_in_their_order_with_their_surest_images_first_and_empty_ones_last():
    probabilities = np.array([[0.1, 0.0, 0.9], [0.8, 0.0, 0.2], [0.4, 0.0, 0.6], [0.5, 0.3, 0.2]])
    result = Classification(list("abcd"), ["cat", "empty", "dog"], probabilities)
    page = classification_sheet(result, lambda key: plain(COLORS["abcd".index(key)], (50, 50)), size=100)
    a, b, c, d = (area(page, color)[1] for color in COLORS[:4])
    assert b[1] == d[1] < a[1] == c[1]  # cats: b, d above dogs: a, c
    assert b[0] < d[0]
    assert a[0] < c[0]
    assert page.height - a[3] > 100  # below them the heading of the empty class


def test_per_class_limits_the_pictures_and_not_the_count():
    result = Classification(list("abc"), ["x", "y"], np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]))
    page = classification_sheet(result, lambda key: plain(COLORS["abc".index(key)]), per_class=2, size=100)
    assert not (np.asarray(page) == COLORS[2]).all(-1).any()
    assert (np.asarray(page) == COLORS[1]).all(-1).any()


def test_long_and_strange_captions_stay_on_the_page():
    names = ["x" * 500, "a\nb\tc", "", "日本語 \x1b[31m red", "ü" * 40]
    tiles = [Tile(plain(COLORS[0]), n, n, n, 2.0) for n in names]
    page = contact_sheet([Section("t" * 400, "n" * 400, tiles)], title="T" * 400, note="N" * 400, size=60, columns=2)
    edge = np.asarray(page)[:, -8:]
    assert (edge == edge[0, 0]).all()


def test_an_empty_result_still_is_a_page():
    page = search_sheet(Ranking([], np.array([]), "nothing"), lambda key: None)
    assert page.width >= 500


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_save(tmp_path, ending):
    page = contact_sheet([Section("", "", [Tile(plain(COLORS[0]))])], title="one")
    path = save_sheet(page, tmp_path / f"sheet.{ending}")
    with Image.open(path) as back:
        assert back.size == page.size


def test_a_wrong_ending_or_folder_is_named(tmp_path):
    page = contact_sheet([], title="none")
    with pytest.raises(ClipworksError, match=r"must be one of '.png'.*Got '.pgn'. Did you mean '.png'"):
        save_sheet(page, tmp_path / "x.pgn")
    with pytest.raises(ClipworksError, match="folder of a sheet must exist"):
        save_sheet(page, tmp_path / "no" / "x.png")
