"""webdataset tar files: samples by stem, and archives made to do harm."""

import io
import tarfile

import pytest
from made_images import corners, encoded

from clipworks.data.decode import Limits
from clipworks.data.sources import open_source
from clipworks.data.webdataset import TarSource
from clipworks.errors import BadImage, ClipworksError

PNG = encoded(corners())


def write(path, members, format=tarfile.PAX_FORMAT):
    """Members are (name, bytes) or ready `TarInfo`s."""
    with tarfile.open(path, "w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size, info.mtime = len(member[1]), 1_000_000
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def outcome(item):
    try:
        return item.decode().size
    except BadImage as error:
        return error.reason


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_by_stem_wherever_their_parts_lie(tmp_path, format):
    path = write(tmp_path / "s.tar", [
        ("000.txt", b"a cat"), ("000.png", PNG), ("000.cls", b"3"), ("001.png", PNG),
        ("dir/002.jpg", PNG), ("dir/002.json", b'{"caption": "a dog", "label": "dog", "year": 5}'),
        ("003.a.png", PNG), ("003.b.png", PNG), ("003.txt", b"both"), ("001.caption", b"late"), ("001.txt", b" "),
    ], format)  # fmt: skip
    source = open_source(path)
    found = {item.key: (item.caption, item.label, item.columns) for item in source}
    assert found == {
        "s.tar/000.png": ("a cat", "3", {}), "s.tar/001.png": ("late", None, {}),
        "s.tar/dir/002.jpg": ("a dog", "dog", {"year": 5}),
        "s.tar/003.a.png": ("both", None, {}), "s.tar/003.b.png": ("both", None, {}),
    }  # fmt: skip
    assert list(found) == [item.key for item in source]
    assert len(source) == 5
    assert all(item.decode().size == (12, 8) and item.mtime == 1_000_000 for item in source)


def test_several_shards_in_order(tmp_path):
    for name in ("b.tar", "a.tar"):
        write(tmp_path / name, [("0.png", PNG), ("1.png", PNG)])
    by_pattern = [item.key for item in open_source(str(tmp_path / "*.tar"))]
    assert by_pattern == ["a.tar/0.png", "a.tar/1.png", "b.tar/0.png", "b.tar/1.png"]
    by_list = [item.key for item in open_source([tmp_path / "b.tar", tmp_path / "a.tar"])]
    assert by_list == [*by_pattern[2:], *by_pattern[:2]]
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.tar", [("0.png", PNG)])
    with pytest.raises(ClipworksError, match=r"tar name 'a.tar' comes twice"):
        TarSource([tmp_path / "a.tar", tmp_path / "sub" / "a.tar"])
    with pytest.raises(ClipworksError, match="matches no file"):
        TarSource(str(tmp_path / "x*.tar"))
    with pytest.raises(ClipworksError, match="empty list"):
        TarSource([])


def test_long_and_unusual_names(tmp_path):
    names = ["x" * 180 + "/" + "y" * 90 + ".png", "ü/日本.png", "./dot.png", "a b.png"]
    found = [item.key for item in TarSource(write(tmp_path / "s.tar", [(name, PNG) for name in names]))]
    assert found == [f"s.tar/{name.removeprefix('./')}" for name in names]


def test_what_is_no_image_is_counted(tmp_path):
    path = write(tmp_path / "s.tar", [("0.png", PNG), ("0.npy", b"x"), ("1.pyd", b"x"), ("._0.png", b"x"),
                                      ("__MACOSX/0.png", b"x"), special("folder", tarfile.DIRTYPE)])  # fmt: skip
    source = TarSource(path)
    assert [item.key for item in source] == ["s.tar/0.png"]
    assert source.ignored == {".npy": 1, ".pyd": 1, ".png": 2}


HOSTILE = [
    ("../x.png", "absolute path or '..'"), ("/abs.png", "absolute path or '..'"), ("a/../../x.png", "absolute path or"),
    ("..\\x.png", "absolute path or '..'"), ("C:\\x.png", "absolute path or '..'"),
]  # fmt: skip


def test_hostile_members_are_refused_one_by_one(tmp_path):
    kinds = {"sym.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "device.png": tarfile.CHRTYPE,
             "block.png": tarfile.BLKTYPE, "pipe.png": tarfile.FIFOTYPE}  # fmt: skip
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / "s.tar", [
        ("first.png", PNG), *((name, PNG) for name, _ in HOSTILE),
        *(special(name, kind, "/etc/passwd") for name, kind in kinds.items()), ("last.png", PNG),
    ])  # fmt: skip
    found = {item.key.removeprefix("s.tar/"): outcome(item) for item in TarSource(path)}
    assert found["first.png"] == found["last.png"] == (12, 8)
    for name, reason in HOSTILE:
        assert reason in found[name]
    assert "link" in found["sym.png"]
    assert "link" in found["hard.png"]
    assert all("not a regular file" in found[name] for name in ("device.png", "block.png", "pipe.png"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "s.tar"]  # nothing was written anywhere


def test_pickles_are_never_opened(tmp_path):
    import pickle

    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    data = pickle.dumps(Canary())
    endings = ("pickle", "pyd", "pth", "pt", "json")
    path = write(tmp_path / "s.tar", [("0.png", PNG), *((f"0.{ending}", data) for ending in endings)])
    (item,) = TarSource(path)
    assert item.decode().size == (12, 8)
    assert not (tmp_path / "canary").exists()


def test_duplicates_and_too_many_members(tmp_path):
    path = write(tmp_path / "s.tar", [("0.png", PNG), ("1.png", PNG), ("./0.png", PNG)])
    with pytest.raises(ClipworksError, match=r"duplicate member '0.png' .*numbers 1 and 3"):
        len(TarSource(path))
    with pytest.raises(ClipworksError, match="has more than 2 members"):
        len(open_source(path, max_members=2))
    assert len(open_source(write(tmp_path / "t.tar", [("0.png", PNG), ("1.png", PNG)]), max_members=2)) == 2


def test_an_image_above_the_limit_is_not_read(tmp_path):
    path = write(tmp_path / "s.tar", [("0.png", PNG), ("1.png", PNG + b"\0" * 1000)])
    small, large = TarSource(path, limits=Limits(max_bytes=len(PNG) + 10))
    assert outcome(small) == (12, 8)
    assert "Limits.max_bytes" in outcome(large)


@pytest.mark.parametrize("cut", [1, 300, 512, 700, 1024, 1300])
def test_an_archive_that_is_cut_off_keeps_what_is_whole(tmp_path, cut):
    path = write(tmp_path / "s.tar", [("0.png", PNG), ("1.png", PNG), ("2.png", encoded(corners(200, 200), "BMP"))])
    end = 2 * 1024 + 512 + 120_054
    path.write_bytes(path.read_bytes()[: end - cut])
    first, second, *rest = list(TarSource(path))
    assert outcome(first) == outcome(second) == (12, 8)
    assert rest
    assert all(isinstance(outcome(item), str) for item in rest)
    assert any("cut off" in outcome(item) or "damaged" in outcome(item) for item in rest)


def test_a_damaged_header_is_reported_not_taken_for_the_end(tmp_path):
    path = write(tmp_path / "s.tar", [("0.png", PNG), ("1.png", PNG), ("2.png", PNG)])
    data = bytearray(path.read_bytes())
    data[1024 + 20] ^= 0xFF  # in the name of the second member
    path.write_bytes(data)
    first, damage = TarSource(path)
    assert outcome(first) == (12, 8)
    assert damage.key == "s.tar"
    assert "damaged after member number 1" in outcome(damage)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x1f\x8b" + b"\0" * 2000, b"PK\x03\x04" + b"x" * 2000])
def test_what_is_no_tar_file(tmp_path, data):
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(ClipworksError, match="is not a plain tar file"):
        len(TarSource(tmp_path / "s.tar"))


def test_a_header_that_claims_gigabytes_is_not_believed(tmp_path):
    """An extended header of 8 GB (a number of base 256) must not be read into memory."""
    info = tarfile.TarInfo("0.png")
    info.type, info.size = tarfile.XHDTYPE, 8 << 30
    path = write(tmp_path / "s.tar", [("first.png", PNG)])
    data = path.read_bytes()
    path.write_bytes(data[:1024] + info.tobuf(tarfile.GNU_FORMAT) + data[1024:])
    first, damage = TarSource(path)
    assert outcome(first) == (12, 8)
    assert "damaged" in outcome(damage)


def test_the_member_list_is_not_kept(tmp_path):
    """A million tiny members must not stay in memory as a million header objects."""
    kept = []
    original = tarfile.TarFile.next

    def next_(self):
        kept.append(len(self.members))
        return original(self)

    path = write(tmp_path / "s.tar", [(f"{i}.png", b"x") for i in range(50)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tarfile.TarFile, "next", next_)
        assert len(TarSource(path)) == 50
    assert max(kept) <= 1
