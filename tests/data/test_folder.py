"""A folder of images: what is taken, in which order, with which captions and labels."""

import os

import pytest
from made_images import corners, encoded

from clipworks.data.folder import IMAGE_SUFFIXES, FolderSource, read_json
from clipworks.data.sources import open_source
from clipworks.errors import BadImage, ClipworksError, UnknownName

PNG = encoded(corners())


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    return root


def test_keys_are_sorted_relative_paths(tmp_path):
    make(tmp_path, "b.png", "cats/10.png", "cats/2.png", "Z.png", "cats/deep/er/1.png")
    source = FolderSource(tmp_path)
    assert [item.key for item in source] == ["Z.png", "b.png", "cats/10.png", "cats/2.png", "cats/deep/er/1.png"]
    assert len(source) == 5
    for item in source:
        assert item.image == tmp_path / item.key
        assert item.mtime == (tmp_path / item.key).stat().st_mtime
        assert item.decode().size == (12, 8)


def test_every_usual_ending_in_any_case(tmp_path):
    names = [f"{i}{ending}" for i, ending in enumerate(IMAGE_SUFFIXES)]
    make(tmp_path, *names, "big.JPG")
    assert {item.key for item in FolderSource(tmp_path)} == {*names, "big.JPG"}


def test_what_is_left_out_is_counted_by_ending(tmp_path):
    make(tmp_path, "a.png", "b.pdf", "c.PDF", "README", "d.mp3", ".hidden.png", ".git/x.png", "__MACOSX/a.png", "a.txt")
    source = FolderSource(tmp_path)
    assert [item.key for item in source] == ["a.png"]
    assert source.ignored == {".pdf": 2, "(no ending)": 1, ".mp3": 1}


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    with pytest.raises(ClipworksError, match=r"no images in folder .*found: nothing"):
        FolderSource(tmp_path)
    make(tmp_path, "a.pdf")
    with pytest.raises(ClipworksError, match=r"found: 1 x .pdf"):
        open_source(tmp_path)
    with pytest.raises(ClipworksError, match="is not a folder"):
        FolderSource(tmp_path / "a.pdf")


def test_captions_lie_beside_the_images(tmp_path):
    make(tmp_path, *(f"{i}.png" for i in range(7)), "sub/0.png")
    (tmp_path / "0.txt").write_text("  a cat \n")
    (tmp_path / "1.caption").write_text("\ufeffa dög", encoding="utf-8")
    (tmp_path / "2.json").write_text('{"caption": "a bird", "year": 1999, "tags": ["x"], "label": "l"}')
    (tmp_path / "3.txt").write_text("")
    (tmp_path / "4.json").write_text("[1, 2")
    (tmp_path / "5.txt").write_bytes(b"caf\xe9")
    found = {item.key: item for item in FolderSource(tmp_path)}
    captions = {key: item.caption for key, item in found.items()}
    assert captions == {
        "0.png": "a cat", "1.png": "a dög", "2.png": "a bird", "3.png": None, "4.png": None, "5.png": "caf\ufffd",
        "6.png": None, "sub/0.png": None,
    }  # fmt: skip
    assert found["2.png"].columns == {"year": 1999}
    assert all(item.caption is None for item in FolderSource(tmp_path, captions=False))


def test_an_oversized_caption_file_is_not_read(tmp_path):
    make(tmp_path, "a.png")
    with (tmp_path / "a.txt").open("wb") as stream:
        stream.truncate(1 << 32)
    assert next(iter(FolderSource(tmp_path))).caption is None


def test_the_first_folder_is_the_label(tmp_path):
    make(tmp_path, "top.png", "cats/1.png", "dogs/puppies/2.png")
    labels = {item.key: item.label for item in FolderSource(tmp_path, label_from="folder")}
    assert labels == {"top.png": None, "cats/1.png": "cats", "dogs/puppies/2.png": "dogs"}
    with pytest.raises(UnknownName, match=r"label_from must be one of 'none', 'folder'"):
        FolderSource(tmp_path, label_from="folders")


def test_links_to_folders_are_not_followed_and_loops_do_no_harm(tmp_path):
    make(tmp_path, "in/a.png")
    outside = make(tmp_path / "elsewhere", "b.png")
    root = tmp_path / "in"
    (root / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "file.png").symlink_to(outside / "b.png")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "dangling.png").symlink_to(root / "absent.png")
    found = {item.key: item for item in FolderSource(root)}
    assert set(found) == {"a.png", "file.png", "self.png", "dangling.png"}
    assert found["file.png"].decode().size == (12, 8)
    with pytest.raises(BadImage, match=r"image 'self.png': cannot be read \(Too many levels of symbolic links\)"):
        found["self.png"].decode()
    with pytest.raises(BadImage, match=r"image 'dangling.png': no such file"):
        found["dangling.png"].decode()


def test_a_name_that_is_not_utf8_still_works(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        with open(name, "wb") as stream:
            stream.write(PNG)
    except OSError:
        pytest.skip("this file system takes no such name")
    (item,) = FolderSource(tmp_path)
    assert item.key == "caf\\udce9.png"
    assert item.decode().size == (12, 8)


def test_a_folder_that_is_named_as_an_image(tmp_path):
    make(tmp_path, "a.png")
    (tmp_path / "odd.png").mkdir()
    assert [item.key for item in FolderSource(tmp_path)] == ["a.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_an_error_not_a_gap(tmp_path):
    make(tmp_path, "a.png", "locked/b.png")
    (tmp_path / "locked").chmod(0)
    try:
        with pytest.raises(ClipworksError, match=r"locked.*cannot be read"):
            FolderSource(tmp_path)
    finally:
        (tmp_path / "locked").chmod(0o755)


@pytest.mark.parametrize(("data", "expected"), [
    (b'{"caption": "c", "label": 3, "n": null, "ok": true}', ("c", "3", {"ok": True})),
    (b'{"caption": 5}', (None, None, {})),
    (b'["c"]', (None, None, {})),
    (b"[" * 100_000, (None, None, {})),
    (b"\xff\xfe", (None, None, {})),
])  # fmt: skip
def test_json_beside_an_image(data, expected):
    assert read_json(data) == expected
