"""Damage of every kind: `verify` names it, reading refuses it or is not touched by it, `repair` keeps the rest."""

import re
import shutil

import numpy as np
import pytest
from small_store import encoder, folder, same

from clipworks.errors import CollectionError
from clipworks.store.collection import Collection
from clipworks.store.embed import embed
from clipworks.store.verify import info, verify

ROWS, COMMIT = 40, 8


@pytest.fixture(scope="module")
def model():
    return encoder()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A collection in five data files of eight rows."""
    place = tmp_path_factory.mktemp("verify")
    embed(folder(place / "photos", ROWS), place / "c", encoder=model, batch_size=COMMIT, commit_every=COMMIT)
    return place


@pytest.fixture
def spoiled(whole, tmp_path):
    """A copy of it, to be damaged; the copy for searching is gone, so that rows are read from the table."""
    shutil.copytree(whole / "c", tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "snapshot")
    return tmp_path / "c"


def data(place):
    return sorted((place / "items.lance" / "data").iterdir())


def flip(path, share=0.1):
    held = bytearray(path.read_bytes())
    held[int(len(held) * share)] ^= 1
    path.write_bytes(held)


def parts(place):
    return {d.part: d.reason for d in verify(place).damage}


def test_an_intact_collection(whole):
    found = verify(whole / "c")
    assert found.ok
    assert found.n_rows == ROWS
    assert found.n_files == len(re.findall("sha256", (whole / "c/checksums.txt").read_text()))
    assert str(found).endswith(f"intact; {ROWS} rows, {found.n_files} files")


def test_every_byte_of_the_data_is_covered(spoiled):
    """A flip anywhere in a data file is seen, also where no row is."""
    path = data(spoiled)[2]
    held = path.read_bytes()
    for at in range(0, len(held), 97):
        flip(path, at / len(held))
        assert parts(spoiled)[f"items.lance/data/{path.name}"] == "does not match its checksum"
        path.write_bytes(held)
    assert verify(spoiled).ok


def test_a_flipped_byte_of_a_vector_names_the_row_and_reading_refuses(spoiled, model, whole):
    flip(data(spoiled)[1])
    with pytest.raises(CollectionError, match=r"row 'a/\d+\.png' does not match.*clipworks verify.*--repair"):
        Collection.open(spoiled)
    found = verify(spoiled)
    assert found.n_rows == ROWS - 1
    (lost,) = found.lost
    assert any(lost in d.reason for d in found.damage)
    assert all(d.remedy for d in found.damage)
    repaired = verify(spoiled, repair=True)
    assert repaired.repaired
    assert verify(spoiled).ok
    assert lost not in Collection.open(spoiled)
    report = embed(whole / "photos", spoiled, encoder=model)
    assert (report.n_added, report.n_skipped) == (1, ROWS - 1)
    assert same(Collection.open(spoiled), Collection.open(whole / "c"))


@pytest.mark.parametrize("fault", ["cut", "gone", "longer"])
def test_a_file_of_another_size_is_refused_at_once(spoiled, model, whole, fault):
    path = data(spoiled)[3]
    held = path.read_bytes()
    path.unlink() if fault == "gone" else path.write_bytes(held[:-10] if fault == "cut" else held + b"x")
    for opened in (lambda: Collection.open(spoiled), lambda: embed(whole / "photos", spoiled, encoder=model)):
        with pytest.raises(CollectionError, match=f"{path.name} .*clipworks verify"):
            opened()
    assert f"items.lance/data/{path.name}" in parts(spoiled)
    verify(spoiled, repair=True)
    assert verify(spoiled).ok
    assert len(Collection.open(spoiled)) == (ROWS if fault == "longer" else ROWS - COMMIT)
    embed(whole / "photos", spoiled, encoder=model)
    assert same(Collection.open(spoiled), Collection.open(whole / "c"))


def test_the_copy_for_searching_gives_lost_rows_back(whole, tmp_path):
    shutil.copytree(whole / "c", tmp_path / "c")
    for path in data(tmp_path / "c")[:4]:
        path.unlink()
    found = verify(tmp_path / "c", repair=True)
    assert found.n_rows == ROWS
    assert found.lost == []
    assert same(Collection.open(tmp_path / "c"), Collection.open(whole / "c"))


@pytest.mark.parametrize("name", ["vectors.npy", "rows.arrow", "facts.json"])
@pytest.mark.parametrize("fault", ["flip", "cut", "gone"])
def test_damage_in_the_copy_for_searching_loses_nothing(whole, tmp_path, name, fault):
    shutil.copytree(whole / "c", tmp_path / "c")
    (path,) = (tmp_path / "c" / "snapshot").rglob(name)
    if fault == "flip":
        flip(path, 0.9)
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()
    (damage,) = verify(tmp_path / "c").damage
    assert damage.part.startswith("snapshot/")
    assert "nothing is lost" in damage.remedy
    verify(tmp_path / "c", repair=True)
    assert verify(tmp_path / "c").ok
    assert same(Collection.open(tmp_path / "c"), Collection.open(whole / "c"))


def test_manifests(spoiled):
    newest, older = sorted((spoiled / "items.lance/_versions").glob("*.manifest"))[:2]
    held = newest.read_bytes(), older.read_bytes()
    flip(older)
    assert parts(spoiled) == {f"items.lance/_versions/{older.name}": "does not match its checksum"}
    assert len(Collection.open(spoiled)) == ROWS
    older.write_bytes(held[1])
    newest.write_bytes(held[1]), older.write_bytes(held[0])  # exchanged
    assert {f"items.lance/_versions/{p.name}" for p in (newest, older)} <= set(parts(spoiled))
    newest.write_bytes(held[0]), older.write_bytes(held[1])
    assert verify(spoiled).ok
    newest.unlink()  # the last eight rows with it
    with pytest.raises(CollectionError, match=r"manifest is missing.*clipworks verify"):
        Collection.open(spoiled)


def test_all_versions_gone(spoiled, whole, model):
    shutil.rmtree(spoiled / "items.lance" / "_versions")
    with pytest.raises(CollectionError, match="has lost all its versions"):
        Collection.open(spoiled)
    with pytest.raises(CollectionError, match="has lost all its versions"):
        embed(whole / "photos", spoiled, encoder=model)
    assert not verify(spoiled).ok
    with pytest.raises(CollectionError, match="remove the folder and embed again"):
        verify(spoiled, repair=True)


def test_checksums_that_are_damaged_or_gone(spoiled, whole, model):
    journal = spoiled / "checksums.txt"
    text = journal.read_text()
    lines = text.splitlines(keepends=True)
    journal.write_text("".join([lines[1], lines[0], *lines[2:]]))  # each line speaks for one file, in any order
    assert verify(spoiled).ok
    one, two = re.findall("[0-9a-f]{64}", text)[:2]
    journal.write_text(text.replace(one, "?").replace(two, one).replace("?", two))
    assert set(parts(spoiled)) == {"checksums.txt line 1", "checksums.txt line 2"}
    journal.unlink()
    assert parts(spoiled) == {"checksums.txt": "is missing"}
    assert embed(whole / "photos", spoiled, encoder=model).n_skipped == ROWS  # checks all rows and writes it anew
    assert verify(spoiled).ok
    assert verify(spoiled).n_files > 0


def test_what_is_no_collection(tmp_path):
    with pytest.raises(CollectionError, match="no collection at"):
        verify(tmp_path / "c")
    with pytest.raises(CollectionError, match="is no collection"):
        verify(tmp_path)


def test_info(whole, model):
    found = info(whole / "c")
    assert (found["rows"], found["dim"], found["dtype"]) == (ROWS, model.dim, "float16")
    assert (found["labels"], found["captions"], found["columns"]) == (0, ROWS, {})
    assert (found["encoder"], found["fingerprint"], found["precision"]) == ("tiny", model.fingerprint, "fp32")
    assert found["bytes"] == sum(p.stat().st_size for p in (whole / "c").rglob("*") if p.is_file())
    assert found["writer"] is None
    assert np.datetime64(found["created"].rstrip("Z")) <= np.datetime64("now")
