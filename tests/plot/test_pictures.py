"""The picture behind a key is found again, whatever the collection was made from."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipworks.plot.pictures import pictures, source_pictures

COLORS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}


class Kept:
    """As much of a collection as sheets need: which source each key came from."""

    def __init__(self, keys, source):
        self.known = dict.fromkeys(keys, source)

    def sources(self, keys):
        return {key: self.known[key] for key in keys}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, color in COLORS.items():
        Image.new("RGB", (30, 20), color).save(tmp_path / "sub" / f"{name}.png")
    return tmp_path


def shown(image):
    return tuple(np.asarray(image)[5, 5])


def table(folder):
    rows = "".join(f"{name},sub/{name}.png\n" for name in COLORS)
    (folder / "table.csv").write_text("key,image\n" + rows)
    return folder / "table.csv", list(COLORS)


def paths(folder):
    (folder / "list.txt").write_text("".join(f"sub/{name}.png\n" for name in COLORS))
    return folder / "list.txt", [f"sub/{name}.png" for name in COLORS]


def archive(folder):
    with tarfile.open(folder / "data.tar", "w") as tar:
        for name in COLORS:
            data = (folder / "sub" / f"{name}.png").read_bytes()
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    from clipworks.data.sources import open_source

    return folder / "data.tar", [item.key for item in open_source(folder / "data.tar")]


def files(folder):
    return "list of paths", [str(folder / "sub" / f"{name}.png") for name in COLORS]


def itself(folder):
    return folder, [f"sub/{name}.png" for name in COLORS]


@pytest.mark.parametrize("kind", [itself, table, paths, archive, files])
def test_a_collections_pictures_are_found_by_key(folder, kind):
    source, keys = kind(folder)
    picture = pictures(Kept(keys, str(source)), keys)
    assert [shown(picture(key)) for key in keys] == list(COLORS.values())


@pytest.mark.parametrize("kind", [itself, table, paths, archive])
def test_a_sources_pictures_are_found_by_key(folder, kind):
    source, keys = kind(folder)
    picture = source_pictures(source, keys[:2])
    assert [shown(picture(key)) for key in keys[:2]] == list(COLORS.values())[:2]


def test_what_is_gone_or_damaged_is_none(folder):
    (folder / "sub" / "red.png").unlink()
    (folder / "sub" / "green.png").write_bytes(b"no picture")
    keys = [f"sub/{name}.png" for name in COLORS]
    picture = pictures(Kept(keys, str(folder)), keys)
    assert [picture(key) is None for key in keys] == [True, True, False]
    assert pictures(Kept(["a"], str(folder / "gone.csv")), ["a"])("a") is None
    assert pictures(Kept(["a"], None), ["a"])("a") is None  # vectors that were added without images


def test_large_photos_are_decoded_small(folder):
    Image.new("RGB", (4000, 3000), "gray").save(folder / "large.jpg")
    assert max(source_pictures(folder, ["large.jpg"])("large.jpg").size) <= 2000
