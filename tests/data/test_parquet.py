"""Parquet: bytes, structs, paths; keys; what is kept of the other columns."""

import pytest
from made_images import corners, encoded

from clipworks.data.parquet import ROWS_AT_ONCE
from clipworks.data.sources import open_source
from clipworks.errors import BadImage, ClipworksError, UnknownName

pa = pytest.importorskip("pyarrow")
PNG = encoded(corners())


@pytest.fixture
def write(tmp_path):
    import pyarrow.parquet as pq

    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(PNG)

    def make(columns, **options):
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        return open_source(tmp_path / "t.parquet", **options)

    return make


def test_a_column_of_bytes(write):
    source = write({"jpg": [PNG, None, PNG], "caption": ["one", "two", None], "label": [3, None, 5], "year": [1, 2, 3],
                    "tags": [["x"], [], None], "thumb": [b"1", b"2", b"3"]}, image_column="jpg")  # fmt: skip
    items = list(source)
    assert len(source) == 3
    assert [item.key for item in items] == ["t.parquet#0", "t.parquet#1", "t.parquet#2"]
    assert [item.caption for item in items] == ["one", "two", None]
    assert [item.label for item in items] == ["3", None, "5"]
    assert items[0].columns == {"year": 1}  # nested values and further bytes are not kept
    assert items[0].decode().size == items[2].decode().size == (12, 8)
    with pytest.raises(BadImage, match=r"image 't.parquet#1': has neither bytes nor a path"):
        items[1].decode()


def test_structs_as_hugging_face_writes_them(write):
    images = [{"bytes": PNG, "path": "x/1.png"}, {"bytes": PNG, "path": "x/2.png"}]
    source = write({"image": images, "text": ["a", "b"]})
    assert [(item.key, item.caption) for item in source] == [("x/1.png", "a"), ("x/2.png", "b")]
    assert all(item.decode().size == (12, 8) for item in source)
    twice = write({"image": [{"bytes": PNG, "path": "1.png"}, {"bytes": PNG, "path": "1.png"}]})
    assert [item.key for item in twice] == ["t.parquet#0", "t.parquet#1"]


def test_a_struct_may_hold_only_a_path_but_not_any_path(write, tmp_path):
    (tmp_path.parent / "secret.png").write_bytes(PNG)
    paths = ["a.png", "../secret.png", "http://127.0.0.1/x.png", None]
    inside, *refused = write({"image": [*({"bytes": None, "path": path} for path in paths), None]})
    assert inside.decode().size == (12, 8)
    for item, reason in zip(refused, ["lies outside", "is a URL", "neither bytes", "neither bytes"], strict=True):
        with pytest.raises(BadImage, match=reason):
            item.decode()


def test_a_column_of_paths(write, tmp_path):
    source = write({"path": ["b.png", "./a.png", "../x.png", None], "caption": ["1", "2", "3", "4"]})
    items = list(source)
    assert [item.key for item in items] == ["b.png", "a.png", "../x.png", "t.parquet#3"]
    assert items[0].mtime == (tmp_path / "b.png").stat().st_mtime
    assert items[1].decode().size == (12, 8)
    assert [item.error is None for item in items] == [True, True, False, False]
    with pytest.raises(ClipworksError, match=r"duplicate key 'a.png' .*row 0 and row 1"):
        write({"path": ["a.png", "./a.png"]})


def test_keys_from_a_column(write):
    source = write({"key": ["x", None, "", "7"], "image": [PNG] * 4})
    assert [item.key for item in source] == ["x", "t.parquet#1", "t.parquet#2", "7"]
    assert [item.key for item in write({"id": [4, 5], "image": [PNG] * 2}, key_column="id")] == ["4", "5"]
    with pytest.raises(ClipworksError, match=r"duplicate key 'x' .*row 0 and row 2"):
        write({"key": ["x", "y", "x"], "image": [PNG] * 3})


def test_more_rows_than_are_read_at_once(write):
    count = 2 * ROWS_AT_ONCE + 3
    source = write({"image": [PNG] * count, "n": list(range(count))})
    assert [item.columns["n"] for item in source] == list(range(count))
    assert len({item.key for item in source}) == count


def test_which_column_is_the_image(write):
    with pytest.raises(ClipworksError, match="no column that looks like an image"):
        write({"x": [PNG], "y": [PNG]})
    assert len(write({"x": [PNG], "path": ["a.png"]})) == 1
    assert next(iter(write({"x": [PNG], "path": ["a.png"]}))).image == PNG  # the only bytes are preferred to a path
    with pytest.raises(UnknownName, match=r"image_column must be one of 'x', 'y'"):
        write({"x": [PNG], "y": [PNG]}, image_column="z")


def test_damaged_files(write, tmp_path):
    path = tmp_path / "t.parquet"
    write({"image": [PNG] * 300})
    data = path.read_bytes()
    for cut in (0, 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ClipworksError, match="is not a readable Parquet file"):
            open_source(path)
    path.write_bytes(data[:50] + b"\xff" * 400 + data[450:])
    with pytest.raises(ClipworksError, match=r"is damaged|is not a readable"):
        list(open_source(path))
