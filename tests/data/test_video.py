"""Frames of a video: which, under which names, how they lie, and files that are no videos."""

import struct

import numpy as np
import pytest

from clipworks.data.decode import Limits
from clipworks.data.sources import open_source
from clipworks.data.video import VideoSource
from clipworks.errors import BadImage, ClipworksError, MissingExtra

av = pytest.importorskip("av")

FPS = 4


def film(path, frames=10, size=(64, 48), codec="mpeg4"):
    """Frame i is grey of level 20 * i (at most 255) with a red top left quarter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), min(20 * i, 255), np.uint8)
            pixels[: size[1] // 2, : size[0] // 2] = (255, 0, 0)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def level(item):
    return float(np.asarray(item.decode())[-8:, -8:].mean())


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov"])
def test_one_frame_a_second(tmp_path, name):
    source = open_source(film(tmp_path / name))
    items = list(source)
    assert [item.key for item in items] == [f"{name}#t=0", f"{name}#t=1", f"{name}#t=2"]
    assert [item.columns for item in items] == [{"seconds": 0.0}, {"seconds": 1.0}, {"seconds": 2.0}]
    assert np.allclose([level(item) for item in items], [0, 20 * FPS, 20 * 2 * FPS], atol=6)
    assert all(item.decode().size == (64, 48) and item.mtime for item in items)
    with pytest.raises(TypeError):
        len(source)


@pytest.mark.parametrize(("every", "frames"), [(0.5, [0, 2, 4, 6, 8]), (0.25, range(10)), (0.1, range(10)), (100, [0])])
def test_other_steps(tmp_path, every, frames):
    items = list(open_source(film(tmp_path / "a.mp4"), every=every))
    assert np.allclose([level(item) for item in items], [20 * i for i in frames], atol=6)
    assert len({item.key for item in items}) == len(items)
    seconds = [item.columns["seconds"] for item in items]
    assert all(abs(s - i / FPS) <= every for s, i in zip(seconds, frames, strict=True))


def turned(path, matrix):
    """Write the display matrix of an mp4 track (ISO 14496-12, tkhd): x' = a x + c y, y' = b x + d y."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0: nine numbers of 16.16 from there
    a, b, c, d = matrix
    data[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


# the red quarter lies top left in the frame; (a, b, c, d) carries x to the right and y downwards
@pytest.mark.parametrize(("matrix", "size", "corner"), [
    ((1, 0, 0, 1), (64, 48), "top left"), ((0, 1, -1, 0), (48, 64), "top right"),
    ((-1, 0, 0, -1), (64, 48), "bottom right"), ((0, -1, 1, 0), (48, 64), "bottom left"),
])  # fmt: skip
def test_a_film_taken_upright_is_shown_upright(tmp_path, matrix, size, corner):
    first = next(iter(VideoSource(turned(film(tmp_path / "a.mp4", 3), matrix)))).decode()
    assert first.size == size
    pixels = np.asarray(first).astype(int)
    redness = pixels[..., 0] - pixels[..., 1]
    height, width = redness.shape
    found = {
        f"{row} {column}": redness[top : top + height // 2, left : left + width // 2].mean()
        for row, top in (("top", 0), ("bottom", height // 2))
        for column, left in (("left", 0), ("right", width // 2))
    }
    assert max(found, key=found.get) == corner
    assert found[corner] > 150


def test_a_film_that_breaks_off_gives_what_there_is(tmp_path):
    path = film(tmp_path / "a.mkv", 40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    items = list(VideoSource(path))
    good = [item for item in items if item.error is None]
    assert 0 < len(good) < 10
    assert all(item.decode().size == (64, 48) for item in good)


def test_frames_above_the_limit_are_refused(tmp_path):
    (item,) = VideoSource(film(tmp_path / "a.mp4"), limits=Limits(max_pixels=64 * 48 - 1))
    with pytest.raises(BadImage, match=r"image 'a.mp4#t=0': has 64 x 48 pixels; the limit is 3,071"):
        item.decode()
    assert len(list(VideoSource(tmp_path / "a.mp4", limits=Limits(max_pixels=64 * 48)))) == 3


def test_frames_that_grow_in_the_middle_of_a_film_are_refused(tmp_path):
    """The size that the file declares is not the one that its stream comes to have."""
    small, large = film(tmp_path / "a.ts", 8, codec="mpeg2video"), film(tmp_path / "b.ts", 8, (640, 480), "mpeg2video")
    small.write_bytes(small.read_bytes() + large.read_bytes())
    items = list(VideoSource(small, every=0.25, limits=Limits(max_pixels=64 * 48)))
    good = [item for item in items if item.error is None]
    assert good
    assert all(item.decode().size == (64, 48) for item in good)
    larger = list(VideoSource(small, every=0.25))
    assert {item.decode().size for item in larger} == {(64, 48), (640, 480)}


@pytest.mark.parametrize("data", [b"", b"hello" * 100, b"<html>"])
def test_what_is_no_video(tmp_path, data):
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(ClipworksError, match=r"video '.*a.mp4' (cannot be read|has no picture track)"):
        open_source(tmp_path / "a.mp4")


def test_a_playlist_under_a_videos_name_opens_nothing(tmp_path):
    film(tmp_path / "secret.mp4")
    other = tmp_path / "secret.mp4"
    playlists = [f"#EXTM3U\n#EXTINF:1,\n{other}\n", f"ffconcat version 1.0\nfile '{other}'\n"]
    for number, text in enumerate(playlists):
        for ending in ("mp4", "mkv", "avi", "ts", "mpg"):
            path = tmp_path / f"{number}.{ending}"
            path.write_text(text)
            try:
                items = list(VideoSource(path))
            except ClipworksError:
                continue
            assert all(item.error for item in items)


def test_other_files_and_steps(tmp_path):
    (tmp_path / "a.flv").write_bytes(b"x")
    with pytest.raises(ClipworksError, match="unknown ending"):
        VideoSource(tmp_path / "a.flv")
    with pytest.raises(ClipworksError, match="is not a file"):
        VideoSource(tmp_path / "absent.mp4")
    with pytest.raises(ClipworksError, match="every must lie in"):
        VideoSource(film(tmp_path / "a.mp4"), every=0)


def test_the_library_is_asked_for_by_name(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtra, match=r"pip install 'clipworks\[video\]'"):
        open_source(tmp_path / "a.mp4")
