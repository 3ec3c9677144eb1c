"""Folders that fsspec opens: the same items as the folder on a disk, and what is refused."""

import fsspec
import pytest
from PIL import Image

from clipworks.data.decode import Limits
from clipworks.data.sources import open_source
from clipworks.errors import BadImage, ClipworksError


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("cats/tom.png", "gray"), ("dogs/rex.png", "brown"), ("top.png", "red")):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), colour).save(tmp_path / "p" / name)
    (tmp_path / "p/cats/tom.txt").write_text("a grey cat")
    (tmp_path / "p/dogs/rex.json").write_text('{"caption": "a dog", "label": 3, "age": 4}')
    (tmp_path / "p/dogs/notes.pdf").write_text("")
    (tmp_path / "p/.hidden.png").write_text("")
    (tmp_path / "p/.git").mkdir()
    (tmp_path / "p/.git/a.png").write_text("")
    return tmp_path / "p"


def facts(source, times=True):
    return [
        (i.key, i.caption, i.label, i.columns, i.digest, i.decode().getpixel((0, 0)), i.mtime if times else None)
        for i in source
    ]


@pytest.mark.parametrize("options", [{}, {"captions": False}, {"label_from": "folder"}])
def test_the_same_items_as_the_folder(folder, options):
    near, far = open_source(folder, **options), open_source(f"file://{folder}", kind="remote", **options)
    assert facts(far) == facts(near)
    assert (len(far), far.ignored) == (len(near), near.ignored) == (3, {".pdf": 1})


def test_another_store(folder):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/test_another_store", recursive=True)
    try:
        far = open_source("memory://test_another_store", kind="remote")
        assert facts(far, times=False) == facts(open_source(folder), times=False)
        assert all(item.mtime > 1e9 for item in far)
        item = next(iter(far))
        memory.rm("/test_another_store", recursive=True)
        with pytest.raises(BadImage, match=r"cats/tom\.png.*cannot be read"):
            item.decode()
    finally:
        memory.store.clear()


def test_a_large_file_is_refused_unread(folder):
    source = open_source(f"file://{folder}", kind="remote", limits=Limits(max_bytes=10))
    for item in source:
        with pytest.raises(BadImage, match=r"bytes; the limit is 10 \(Limits.max_bytes\)"):
            item.source()


@pytest.mark.parametrize("spec", ["photos", "https://a/b", "simplecache::s3://b/k", 3])
def test_what_is_no_address(spec):
    with pytest.raises(ClipworksError, match="kind 'remote' must be an address such as"):
        open_source(spec, kind="remote")


def test_addresses_that_cannot_be_listed(tmp_path):
    with pytest.raises(ClipworksError, match=r"source 'nosuch://a/b' cannot be listed: .*nosuch"):
        open_source("nosuch://a/b", kind="remote")
    with pytest.raises(ClipworksError, match="no images at"):
        open_source(f"file://{tmp_path}", kind="remote")
