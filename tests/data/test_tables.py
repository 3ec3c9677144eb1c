"""Text files of paths, CSV and TSV: columns, keys, and paths that stay below the folder."""

import os

import pytest
from made_images import corners, encoded

from clipworks.data.sources import open_source
from clipworks.data.tables import TableSource, guess_columns
from clipworks.errors import BadImage, ClipworksError, UnknownName

PNG = encoded(corners())


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png", "../outside.png"):
        (root / name).write_bytes(PNG)
    return root


def table(folder, text, name="t.csv", **options):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source(folder / name, **options)


def row(item):
    return item.key, item.caption, item.label, item.columns


def test_columns_by_their_usual_names(folder):
    source = table(folder, "Title,file_name,year,class\na cat,a.png,1999,cats\n\n,sub/c.png,2000,\n")
    assert [row(item) for item in source] == [
        ("a.png", "a cat", "cats", {"year": "1999"}), ("sub/c.png", None, None, {"year": "2000"}),
    ]  # fmt: skip
    assert len(source) == 2
    assert all(item.decode().size == (12, 8) and item.mtime for item in source)


def test_columns_that_are_named(folder):
    text = "where,what,kind,id\na.png,one,k,1\nb.png,two,,2\n"
    names = {"image_column": "where", "caption_column": "what", "label_column": "kind", "key_column": "id"}
    assert [row(item) for item in table(folder, text, **names)] == [("1", "one", "k", {}), ("2", "two", None, {})]
    with pytest.raises(UnknownName, match=r"caption_column must be one of 'where'.*Did you mean 'what'\?"):
        table(folder, text, image_column="where", caption_column="whatt")


@pytest.mark.parametrize("delimiter", [",", ";", "|", "\t"])
def test_delimiters_and_quotes(folder, delimiter):
    text = f'path{delimiter}caption\n"a.png"{delimiter}"one, two; ""three"" |\t\nfour"\n'
    (item,) = table(folder, text)
    assert row(item) == ("a.png", 'one, two; "three" |\t\nfour', None, {})


def test_tsv_needs_no_guess(folder):
    (item,) = table(folder, "path\tthe, caption; x\na.png\tb\n", "t.tsv")
    assert item.columns == {"the, caption; x": "b"}


def test_byte_order_mark_and_other_encodings(folder):
    (item,) = table(folder, "\ufeffpath,caption\na.png,ü\n".encode())
    assert item.caption == "ü"
    (item,) = table(folder, b"path,caption\na.png,caf\xe9\n")
    assert item.caption == "caf\\udce9"  # kept, and valid for every store
    item.caption.encode("utf-8")
    with pytest.raises(ClipworksError, match="is UTF-16; save it as UTF-8"):
        table(folder, "path,caption\na.png,x\n".encode("utf-16"))


def test_a_row_of_another_length_is_reported_with_its_line(folder):
    good, bad, last = table(folder, "path,caption\na.png,x\nb.png\nsub/c.png,y\n")
    assert (good.error, last.error) == (None, None)
    with pytest.raises(BadImage, match=r"image 't.csv#3': has 1 fields where the header has 2"):
        bad.decode()


@pytest.mark.parametrize(("text", "message"), [
    ("path,caption\na.png,\"x\n", r"line \d: unexpected end of data"),
    ("caption,year\nx,1\n", r"no column that looks like an image path; it has 'caption', 'year'. Name it with"),
    ("", "no header"),
    ("path,x,x\na.png,1,2\n", "the column 'x' twice"),
    ("path\na.png\nb.png\n./a.png\n", r"duplicate key 'a.png' .*line 2 and line 4.*key_column"),
    ("path,key\na.png,1\nb.png,1\n", r"duplicate key '1' .*line 2 and line 3"),
])  # fmt: skip
def test_tables_that_make_no_sense(folder, text, message):
    with pytest.raises(ClipworksError, match=message):
        table(folder, text)


HOSTILE = ["../outside.png", "sub/../../outside.png", "/etc/passwd", "link.png", "linked/outside.png", ".", ""]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("ending", ["csv", "txt"])
def test_paths_that_leave_the_folder_are_refused(folder, name, ending):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "linked").symlink_to(folder.parent)
    if ending == "txt" and not name:
        pytest.skip("a blank line of a list is skipped")
    text = f"path,n\na.png,1\n{name},2\nb.png,3\n" if ending == "csv" else f"a.png\n{name}\nb.png\n"
    source = table(folder, text, f"t.{ending}")
    first, bad, last = source
    assert first.decode().size == last.decode().size == (12, 8)
    with pytest.raises(BadImage, match=r"lies outside the folder|empty path"):
        bad.decode()
    assert bad.image is None


@pytest.mark.parametrize("name", ["../outside.png", "link.png", "linked/outside.png", "{root}/outside.png"])
def test_they_are_read_where_that_is_meant(folder, name):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "linked").symlink_to(folder.parent)
    (item,) = table(folder, f"path\n{name.format(root=folder.parent)}\n", allow_outside=True)
    assert item.decode().size == (12, 8)


def test_an_absolute_path_below_the_folder_is_as_good_as_a_relative_one(folder):
    (item,) = table(folder, f"path\n{folder / 'sub' / 'c.png'}\n")
    assert item.key == "sub/c.png"


@pytest.mark.parametrize("text", ["http://127.0.0.1/a.png", "file:///etc/passwd", "pipe:touch canary", "a\0.png"])
def test_commands_and_urls_in_a_table_are_only_text(folder, text, monkeypatch):
    monkeypatch.chdir(folder)
    bad, good = table(folder, f"{text}\na.png\n", "t.txt")
    with pytest.raises(BadImage):
        bad.decode()
    assert good.decode().size == (12, 8)
    assert not (folder / "canary").exists()


def test_a_list_of_paths(folder):
    source = table(folder, "\ufeffsub/c.png\r\n\r\n  a.png  \n", "t.txt")
    assert [item.key for item in source] == ["sub/c.png", "a.png"]
    assert len(source) == 2
    with pytest.raises(ClipworksError, match=r"duplicate key 'a.png' .*line 1 and line 2"):
        table(folder, "a.png\na.png\n", "t.txt")


def test_a_missing_file_is_reported_with_its_key(folder):
    good, bad = table(folder, "path\na.png\nabsent.png\n")
    with pytest.raises(BadImage, match=r"image 'absent.png': no such file"):
        bad.decode()
    assert bad.mtime is None
    assert good.mtime


def test_a_name_that_is_not_utf8_is_found(folder):
    try:
        with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as stream:
            stream.write(PNG)
    except OSError:
        pytest.skip("this file system takes no such name")
    (item,) = table(folder, b"path\ncaf\xe9.png\n")
    assert item.decode().size == (12, 8)
    item.key.encode("utf-8")


def test_a_missing_table(folder):
    with pytest.raises(ClipworksError, match="is not a file"):
        TableSource(folder / "absent.csv")


def test_the_first_usual_name_wins():
    given = dict.fromkeys(("image", "caption", "label", "key"))
    assert guess_columns(["image", "path", "text", "caption"], given, "t") == {"image": "path", "caption": "caption"}
