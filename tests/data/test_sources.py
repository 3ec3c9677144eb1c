"""`open_source` tells kinds apart, keeps order and keys, and says clearly what it does not take."""

import doctest
import os
import tarfile

import numpy as np
import pytest
from made_images import corners, encoded
from PIL import Image

import clipworks.data.item
import clipworks.data.sources as module
from clipworks.data.folder import FolderSource
from clipworks.data.item import Item, text_key
from clipworks.data.sources import OPTIONS, PathSource, Source, open_source
from clipworks.data.tables import ListSource, TableSource
from clipworks.data.webdataset import TarSource
from clipworks.errors import BadImage, ClipworksError, UnknownName

PNG = encoded(corners())


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.png", "cats/1.png", "cats/10.png", "cats/2.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PNG)
    return tmp_path


def keys(source):
    return [item.key for item in source]


def test_kinds_are_told_by_what_is_there(folder, tmp_path):
    (folder / "list.txt").write_text("a.png\n")
    (folder / "table.csv").write_text("path\na.png\n")
    (folder / "table.tsv").write_text("path\tcaption\na.png\tx\n")
    with tarfile.open(folder / "0.tar", "w") as archive:
        archive.add(folder / "a.png", "a.png")
    found = {
        folder: FolderSource, folder / "list.txt": ListSource, folder / "table.csv": TableSource,
        folder / "table.tsv": TableSource, folder / "0.tar": TarSource, folder / "a.png": PathSource,
    }  # fmt: skip
    for spec, kind in found.items():
        for form in (spec, str(spec)):
            source = open_source(form)
            assert type(source) is kind
            assert len(source) == len(keys(source)) > 0
            assert next(iter(source)).decode().size == (12, 8)
            assert keys(source) == keys(source)  # may be walked again
    assert type(open_source([str(folder / "0.tar")])) is TarSource
    assert type(open_source(str(folder / "*.tar"))) is TarSource
    assert type(open_source([str(folder / "a.png"), folder / "b.png"])) is PathSource


def test_an_open_source_is_returned_as_it_is(folder):
    source = open_source(folder)
    assert open_source(source) is source


def test_the_kind_can_be_named(folder):
    (folder / "table.dat").write_text("path,caption\na.png,x\n")
    assert keys(open_source(folder / "table.dat", kind="table")) == ["a.png"]
    with pytest.raises(UnknownName, match=r"kind must be one of .*Did you mean 'table'"):
        open_source(folder, kind="tabel")


def test_a_list_of_paths(folder):
    given = [folder / "b.png", str(folder / "cats" / ".." / "a.png"), Item("own", PNG)]
    source = open_source(given)
    assert keys(source) == [str(folder / "b.png"), str(folder / "a.png"), "own"]
    first = next(iter(source))
    assert first.mtime == (folder / "b.png").stat().st_mtime
    assert [item.decode().size for item in source] == [(12, 8)] * 3


def test_bad_entries_of_a_list_become_items_with_an_error(folder):
    good = str(folder / "a.png")
    source = open_source([good, "http://a/b.png", "", "x\0.png", "absent.png"])
    first, *others = source
    assert first.decode().size == (12, 8)
    reasons = ["nothing is fetched", "is empty", "has a NUL byte in its path", "no such file"]
    for item, reason in zip(others, reasons, strict=True):
        with pytest.raises(BadImage, match=reason) as caught:
            item.decode()
        assert caught.value.key == item.key


def test_duplicates_are_named(folder):
    with pytest.raises(ClipworksError, match=r"duplicate key '.*a.png' in list of paths: entry 1 and entry 3"):
        open_source([str(folder / "a.png"), str(folder / "b.png"), str(folder / "cats" / ".." / "a.png")])


@pytest.mark.parametrize("spec", [3, None, {"a": 1}, b"a.png", object()])
def test_other_things_are_no_source(spec):
    with pytest.raises(ClipworksError, match="source must be a path, a list of paths or a dataset"):
        open_source(spec)
    with pytest.raises(ClipworksError, match="a list of images must hold paths or Items"):
        open_source([spec])


def test_a_missing_source_offers_the_closest_name(folder):
    with pytest.raises(ClipworksError, match=r"source not found: '.*cast'. Did you mean 'cats'\?"):
        open_source(folder / "cast")
    with pytest.raises(ClipworksError, match=r"source not found"):
        open_source(folder / "nowhere" / "at" / "all")


@pytest.mark.parametrize("spec", ["https://a/b.csv", "pipe:cat x.tar", "file:///etc/passwd", "s3://bucket/a.tar"])
def test_urls_are_no_sources(spec):
    with pytest.raises(ClipworksError, match="nothing is fetched or run"):
        open_source(spec)


@pytest.mark.parametrize(("name", "message"), [
    ("a.zip", "compressed archive; unpack it"), ("a.tar.gz", "compressed archive"), ("a.docx", "unknown ending"),
])  # fmt: skip
def test_files_of_other_kinds(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ClipworksError, match=message):
        open_source(tmp_path / name)


def test_an_option_that_does_not_apply_is_refused(folder):
    with pytest.raises(ClipworksError, match=r"key_column does not apply to a folder source .*captions, label_from"):
        open_source(folder, key_column="key")
    with pytest.raises(ClipworksError, match=r"every does not apply to a paths source .*no options"):
        open_source([folder / "a.png"], every=2.0)


def test_every_kind_takes_the_options_that_the_table_says():
    import inspect

    taken = set().union(*OPTIONS.values())
    assert taken == set(inspect.signature(open_source).parameters) - {"spec", "kind", "limits"}


def test_the_base_class_yields_nothing():
    with pytest.raises(TypeError, match="yields no items"):
        list(Source("x"))


# -- items -------------------------------------------------------------------------------------------------------


def test_digests_are_of_bytes_or_pixels(folder):
    import hashlib

    expected = hashlib.sha256(PNG).hexdigest()
    assert Item("a", folder / "a.png").digest == Item("b", PNG).digest == expected
    image = Image.fromarray(corners())
    assert Item("a", image).digest == Item("b", image.copy()).digest
    assert Item("a", corners()).digest != Item("a", np.ascontiguousarray(corners()[::-1])).digest
    assert Item("a", np.zeros((2, 8, 3), np.uint8)).digest != Item("a", np.zeros((8, 2, 3), np.uint8)).digest


def test_a_digest_that_cannot_be_computed_names_the_item(tmp_path):
    with pytest.raises(BadImage, match=r"image 'k': cannot be read"):
        _ = Item("k", tmp_path / "absent.png").digest
    with pytest.raises(BadImage, match="has no image"):
        _ = Item("k").digest
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadImage, match="cannot be read"):  # and does not wait for a writer
        _ = Item("k", tmp_path / "pipe.png").digest
    with pytest.raises(BadImage, match="is not a regular file"):
        Item("k", tmp_path / "pipe.png").decode()


def test_keys_are_valid_text_with_forward_slashes():
    assert text_key("a/ü.png") == "a/ü.png"
    text_key(os.fsdecode(b"caf\xe9.png")).encode("utf-8")


@pytest.mark.parametrize("documented", [module, clipworks.data.item])
def test_the_documented_examples(documented):
    found = doctest.testmod(documented)
    assert found.failed == 0
    assert found.attempted > 0
