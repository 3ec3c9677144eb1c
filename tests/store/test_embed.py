"""`embed`: once each, new, changed and deleted images, neighbours of bad ones, refusals."""

import os

import numpy as np
import pytest
from small_store import encoder, folder, picture, same

from clipworks.data.item import Item
from clipworks.errors import BadImage, ClipworksError, CollectionError
from clipworks.store.collection import Collection
from clipworks.store.embed import embed


@pytest.fixture(scope="module")
def model():
    return encoder()


@pytest.fixture
def photos(tmp_path):
    return folder(tmp_path / "photos")


def test_vectors_are_those_of_the_encoder(model, photos, tmp_path):
    report = embed(photos, tmp_path / "c", encoder=model, dtype="float32", batch_size=5)
    made = Collection.open(tmp_path / "c")
    assert (report.n_added, report.n_rows, report.n_left_out, len(made)) == (12, 12, 0, 12)
    expected = model.images([photos / key for key in made.keys]).numpy()
    np.testing.assert_allclose(made.vectors, expected, atol=1e-6)
    assert made.keys == sorted(f"a/{i:03}.png" for i in range(12))
    assert made.column("caption") == [f"picture {i}" for i in range(12)]
    assert made.fingerprint == model.fingerprint
    assert made.column("digest")[3] == Item("x", photos / "a/003.png").digest


def test_float16_is_the_rounded_float32(model, photos, tmp_path):
    for dtype in ("float16", "float32"):
        embed(photos, tmp_path / dtype, encoder=model, dtype=dtype)
    half, full = (Collection.open(tmp_path / dtype).vectors for dtype in ("float16", "float32"))
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, full.astype(np.float16))


def test_second_run_encodes_nothing(model, photos, tmp_path, monkeypatch):
    embed(photos, tmp_path / "c", encoder=model)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "c").rglob("*.lance"))
    monkeypatch.setattr(type(model), "images", lambda *a, **k: pytest.fail("an image was encoded twice"))
    report = embed(photos, tmp_path / "c", encoder=model)
    assert (report.n_added, report.n_changed, report.n_skipped) == (0, 0, 12)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "c").rglob("*.lance"))


def test_new_changed_touched_and_deleted(model, photos, tmp_path):
    embed(photos, tmp_path / "c", encoder=model)
    old = Collection.open(tmp_path / "c")
    folder(photos, 2, start=12)
    (photos / "a/000.png").unlink()
    picture(99).save(photos / "a/001.png")
    os.utime(photos / "a/002.png", (1, 1))
    (photos / "a/003.txt").write_text("other words")
    report = embed(photos, tmp_path / "c", encoder=model)
    assert (report.n_added, report.n_changed, report.n_refreshed, report.n_removed) == (2, 1, 2, 1)
    assert report.n_skipped == 8
    new = Collection.open(tmp_path / "c")
    assert len(new) == 13
    assert "a/000.png" not in new
    assert new.take([new.row("a/003.png")], ["caption"]) == [{"caption": "other words"}]
    assert new.column("mtime")[new.row("a/002.png")] == 1
    fresh = embed(photos, tmp_path / "fresh", encoder=model)
    assert fresh.n_added == 13
    assert same(new, Collection.open(tmp_path / "fresh"))
    assert embed(photos, tmp_path / "c", encoder=model).n_skipped == 13
    assert len(old) == 12  # an open collection keeps showing what it showed
    assert old.keys[0] == "a/000.png"


def test_prune_can_be_switched_off(model, photos, tmp_path):
    embed(photos, tmp_path / "c", encoder=model)
    (photos / "a/000.png").unlink()
    assert embed(photos, tmp_path / "c", encoder=model, prune=False).n_rows == 12


def test_second_source_keeps_the_first(model, photos, tmp_path):
    embed(photos, tmp_path / "c", encoder=model)
    other = tmp_path / "other" / "b"
    other.mkdir(parents=True)
    picture(50).save(other / "x.png")
    assert embed(other.parent, tmp_path / "c", encoder=model).n_removed == 0
    assert len(Collection.open(tmp_path / "c")) == 13
    clash = tmp_path / "clash" / "a"
    clash.mkdir(parents=True)
    picture(77).save(clash / "000.png")  # the key of another image
    report = embed(clash.parent, tmp_path / "c", encoder=model)
    assert report.n_left_out == 1
    assert "belongs to another image" in report.left_out[0].reason


def test_moved_folder_is_recognised(model, photos, tmp_path):
    embed(photos, tmp_path / "c", encoder=model)
    photos.rename(tmp_path / "moved")
    picture(99).save(tmp_path / "moved/a/001.png")
    report = embed(tmp_path / "moved", tmp_path / "c", encoder=model)
    assert (report.n_added, report.n_changed, report.n_refreshed, report.n_rows) == (0, 1, 11, 12)


def test_bad_images_leave_their_neighbours_alone(model, photos, tmp_path):
    embed(photos, tmp_path / "good", encoder=model, batch_size=4)
    (photos / "a/0005.jpg").write_text("<html>no image</html>")
    (photos / "a/0015.png").write_bytes(b"")
    (photos / "a/0025.png").write_bytes((photos / "a/002.png").read_bytes()[:200])
    report = embed(photos, tmp_path / "c", encoder=model, batch_size=4)
    assert report.n_left_out == 3
    assert sorted(row["key"] for row in report.as_rows()) == ["a/0005.jpg", "a/0015.png", "a/0025.png"]
    assert all(row["reason"] for row in report.as_rows())
    assert same(Collection.open(tmp_path / "good"), Collection.open(tmp_path / "c"))
    skipped = embed(photos, tmp_path / "c", encoder=model, on_error="skip")
    assert (skipped.n_left_out, skipped.left_out) == (3, [])


def test_raise_keeps_what_was_encoded(model, photos, tmp_path):
    (photos / "a/0055.png").write_bytes(b"")
    with pytest.raises(BadImage, match="0055"):
        embed(photos, tmp_path / "c", encoder=model, batch_size=2, on_error="raise")
    kept = len(Collection.open(tmp_path / "c"))
    assert 2 <= kept <= 6
    (photos / "a/0055.png").unlink()
    assert embed(photos, tmp_path / "c", encoder=model).n_added == 12 - kept


def test_failing_source_keeps_what_was_encoded(model, tmp_path):
    def items():
        for i in range(6):
            yield Item(f"k{i}", picture(i))
        raise OSError("the share is gone")

    from clipworks.data.sources import Source

    class Failing(Source):
        def __iter__(self):
            return items()

    with pytest.raises(OSError, match="share"):
        embed(Failing("share"), tmp_path / "c", encoder=model, batch_size=2)
    assert len(Collection.open(tmp_path / "c")) == 6


def test_columns_of_items(model, tmp_path):
    items = [Item("a", picture(0), label="x", columns={"width": 3, "exif.lens": "f", "key": "k", "ok": True})]
    items.append(Item("b", picture(1), columns={"width": "three", "score": 1.5}))
    report = embed(items, tmp_path / "c", encoder=model)
    made = Collection.open(tmp_path / "c")
    rows = made.take([0, 1], ["label", "width", "exif_lens", "key_", "ok", "score"])
    assert rows[0] == {"label": "x", "width": 3, "exif_lens": "f", "key_": "k", "ok": True, "score": None}
    assert rows[1]["width"] is None
    assert rows[1]["score"] == 1.5
    assert report.notes == ["column 'width' holds int64; 1 values of another type were left empty"]
    items[0].columns["width"] = 4
    assert embed(items, tmp_path / "c", encoder=model).n_refreshed == 1
    assert Collection.open(tmp_path / "c").column("width") == [4, None]


def test_table_without_files_is_told_by_bytes(model, tmp_path):
    embed([Item("a", picture(0)), Item("b", picture(1))], tmp_path / "c", encoder=model)
    report = embed([Item("a", picture(0)), Item("b", picture(2))], tmp_path / "c", encoder=model)
    assert (report.n_skipped, report.n_changed) == (1, 1)


def test_duplicate_keys_are_an_error(model, tmp_path):
    from clipworks.data.sources import Source

    class Twice(Source):
        def __iter__(self):
            return iter([Item("a", picture(0)), Item("a", picture(1))])

    with pytest.raises(ClipworksError, match="duplicate key 'a'"):
        embed(Twice("twice"), tmp_path / "c", encoder=model)


def test_another_encoder_is_refused_with_the_field(model, photos, tmp_path):
    embed(photos, tmp_path / "c", encoder=model)
    with pytest.raises(CollectionError, match="They differ in weights") as error:
        embed(photos, tmp_path / "c", encoder=encoder(seed=1))
    assert model.fingerprint[:12] in str(error.value)
    assert encoder(seed=1).fingerprint[:12] in str(error.value)
    with pytest.raises(CollectionError, match=r"config.vision.layers: 2 -> 3"):
        embed(photos, tmp_path / "c", encoder=encoder(layers=3))
    with pytest.raises(CollectionError, match=r"precision: 'fp32' -> 'bf16'"):
        embed(photos, tmp_path / "c", encoder=model, precision="bf16")
    with pytest.raises(CollectionError, match="fast: False -> True"):
        embed(photos, tmp_path / "c", encoder=model, fast=True)
    assert model.precision == "fp32"  # the given encoder was not touched
    assert not model.preprocess.fast
    report = embed(photos, tmp_path / "c", encoder=encoder(seed=1), overwrite=True)
    assert report.n_added == 12
    assert Collection.open(tmp_path / "c").fingerprint == encoder(seed=1).fingerprint


def test_refusals(model, photos, tmp_path):
    embed(photos, tmp_path / "c", encoder=model)
    with pytest.raises(CollectionError, match="resume=True"):
        embed(photos, tmp_path / "c", encoder=model, resume=False)
    with pytest.raises(CollectionError, match="float16 vectors"):
        embed(photos, tmp_path / "c", encoder=model, dtype="float32")
    with pytest.raises(CollectionError, match="not empty"):
        embed(photos, photos, encoder=model)
    with pytest.raises(CollectionError, match="is a file"):
        embed(photos, photos / "a/000.png", encoder=model)
    with pytest.raises(ClipworksError, match="on_error must be one of"):
        embed(photos, tmp_path / "d", encoder=model, on_error="ignore")
    with pytest.raises(ClipworksError, match="batch_size"):
        embed(photos, tmp_path / "d", encoder=model, batch_size=0)
    assert not (tmp_path / "d").exists()


def test_batches_may_fall_otherwise(model, photos, tmp_path):
    """The same image gets the same bytes, whatever shares its batch."""
    keys = sorted((photos / "a").glob("*.png"))
    embed(keys, tmp_path / "one", encoder=model, batch_size=8)
    embed(keys[::-1], tmp_path / "two", encoder=model, batch_size=8)
    for key in keys[:5]:
        embed([key], tmp_path / "three", encoder=model, batch_size=8)
    one, two, three = (Collection.open(tmp_path / n) for n in ("one", "two", "three"))
    assert one.vectors.tobytes() == two.vectors.tobytes()
    assert one.vectors[:5].tobytes() == three.vectors.tobytes() or len(three) == 1
