"""Images made to do harm, damaged in every way or not images at all: a reason for each, and nothing else happens."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.data.decode import Limits, decode_pixels
from clipworks.data.item import Item
from clipworks.data.loader import load_batches
from clipworks.data.sources import open_source
from clipworks.encoders.config import PreprocessConfig
from clipworks.encoders.preprocess import Preprocess
from clipworks.errors import BadImage, ClipworksError

PREPROCESS = Preprocess(PreprocessConfig(size=32))
KINDS = {"JPEG": {}, "PNG": {}, "WEBP": {"quality": 80}, "GIF": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}}
pillow_warns = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


def photo(width=96, height=64, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / width
    pixels = 127 + 90 * np.stack([np.sin(9 * x + k * y) for k in (2, 5, 9)], -1) + rng.normal(0, 9, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason(data, **options):
    with pytest.raises(BadImage) as caught:
        decode_pixels(data, key="k", **options)
    assert caught.value.key == "k"
    return caught.value.reason


# -- a corpus of everything that lies about in folders ------------------------------------------------------------


def usable():
    """Name -> bytes of odd images that must be read."""
    image = photo()
    turned = Image.Exif()
    turned[0x0112] = 6
    grey16 = Image.fromarray(np.linspace(0, 65535, 64 * 96).astype(np.uint16).reshape(64, 96))
    rgba = image.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(image.size))
    others = [photo(seed=1), photo(seed=2)]
    return {
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"), "grey.jpg": encoded(image.convert("L"), "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True), "turned.jpg": encoded(image, "JPEG", exif=turned),
        "mpo.jpg": encoded(image, "MPO", save_all=True, append_images=others), "really.png": encoded(image, "JPEG"),
        "really.jpg": encoded(image, "PNG"), "16-bit.png": encoded(grey16, "PNG"),
        "1-bit.png": encoded(image.convert("1"), "PNG"),
        "palette.png": encoded(image.convert("P"), "PNG", transparency=0), "rgba.png": encoded(rgba, "PNG"),
        "rgba.webp": encoded(rgba, "WEBP"), "grey-alpha.png": encoded(rgba.convert("LA"), "PNG"),
        "film.gif": encoded(image, "GIF", save_all=True, append_images=others),
        "film.webp": encoded(image, "WEBP", save_all=True, append_images=others),
        "one.png": encoded(image.resize((1, 1)), "PNG"), "column.png": encoded(image.resize((1, 20000)), "PNG"),
        "row.jpg": encoded(image.resize((20000, 1)), "JPEG"),
    }  # fmt: skip


def unusable():
    """Name -> (bytes, part of the reason) of what must be reported."""
    found = {
        "empty.jpg": (b"", "is empty"), "page.jpg": (b"<!DOCTYPE html><html>404</html>", "a web page"),
        "icon.png": (b"\xef\xbb\xbf <svg xmlns='x'/>", "an SVG drawing"), "text.png": (b"hello", "not a known image"),
        "lfs.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        "paper.jpg": (b"%PDF-1.7", "PDF"), "heic.jpg": (b"\0\0\0\x18ftypheic" + bytes(40), "heic file"),
        "zip.png": (b"PK\x03\x04" + bytes(40), "zip archive"),
        "header.png": (b"\x89PNG\r\n\x1a\n", "damaged"),
        "float.tif": (encoded(Image.new("F", (4, 4)), "TIFF"), "range"),
    }  # fmt: skip
    for kind, options in KINDS.items():
        data = encoded(photo(), kind, **options)
        if kind != "TIFF":  # whose directory stands at the end: any cut is a damaged header there, tested below
            found[f"cut.{kind.lower()}"] = (data[: len(data) // 2], "truncated or damaged")
    return found


def test_each_is_used_or_reported_once_and_neighbours_do_not_change():
    good, bad = usable(), unusable()
    plain = {f"plain-{i}": encoded(photo(seed=i), "JPEG") for i in range(10)}
    names = sorted({**good, **bad, **plain}, key=lambda name: zlib.crc32(name.encode()))  # well mixed
    data = {**good, **{name: entry[0] for name, entry in bad.items()}, **plain}
    batches = list(load_batches([Item(name, data[name]) for name in names], PREPROCESS, 7, 3, "report"))
    reported = [error for batch in batches for error in batch.errors]
    assert [error.key for error in reported] == [name for name in names if name in bad]
    for error in reported:
        assert bad[error.key][1] in error.reason, error
    rows = {key: row for batch in batches for key, row in zip(batch.keys, batch.pixels, strict=True)}
    assert sorted(rows) == sorted({**good, **plain})
    for name, row in rows.items():
        assert torch.equal(row, PREPROCESS(data[name])), name
        assert torch.isfinite(row).all()


@pillow_warns
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_at_every_tenth(kind):
    """A cut file is refused, unless only what follows the picture is missing."""
    data = encoded(photo(), kind, **KINDS[kind])
    whole = decode_pixels(data)
    for tenth in range(10):
        try:
            found = decode_pixels(data[: len(data) * tenth // 10])
        except BadImage:
            continue
        assert np.array_equal(found, whole), f"{tenth} tenths were taken for a picture"
    assert len(reason(data[: len(data) // 2])) > 10


# -- bombs -------------------------------------------------------------------------------------------------------


def png_header(width, height, *chunks):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", zlib.compress(b""))


def tiff_header(*entries):
    body = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(64)


def jpeg_of(width, height):
    data = bytearray(encoded(photo(16, 16), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def many_scans(count):
    data = encoded(photo(96, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def webp_canvas(width, height):
    frame = encoded(photo(16, 16), "WEBP", lossless=True)[12:]
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + sides
    return b"RIFF" + struct.pack("<I", 4 + len(canvas) + len(frame)) + b"WEBP" + canvas + frame


def gif_frame_beyond_its_screen(width, height):
    data = bytearray(encoded(photo(16, 16), "GIF"))
    place = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))  # the first picture, behind the palette
    data[place + 5 : place + 9] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp_of(width, height):
    data = bytearray(encoded(photo(4, 4), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


tiled = ((256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (324, 200), (325, 50))
BOMBS = {
    "png 13000": lambda: png_header(13000, 13000),
    "png 2^31": lambda: png_header(2**31 - 1, 2**31 - 1),
    "png text": lambda: png_header(9000, 9000, (b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20)))),
    "jpeg 65500": lambda: jpeg_of(65500, 65500),
    "jpeg scans": lambda: many_scans(1000),
    "tiff 100000": lambda: tiff_header((256, 100_000), (257, 100_000), (258, 8), (262, 1), (273, 8), (279, 8)),
    "tiff tiles": lambda: tiff_header(*tiled, (322, 20_000), (323, 20_000)),
    "webp 16000": lambda: webp_canvas(16_000, 16_000),
    "gif frame": lambda: gif_frame_beyond_its_screen(65_535, 65_535),
    "bmp": lambda: bmp_of(30_000, 30_000),
    "bmp upside down": lambda: bmp_of(30_000, -30_000),
}


def peak_growth(work):
    """Bytes by which the peak of this process's memory rises above what it has now; None where nobody says."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status")
    except OSError:
        work()
        return None

    def field(name):
        return int(status.read_text().split(f"{name}:")[1].split()[0]) * 1024

    before = field("VmRSS")
    work()
    return field("VmHWM") - before


@pillow_warns
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_from_its_header(name):
    data = BOMBS[name]()
    assert len(data) < 1_000_000
    said = reason(data)  # once for what is imported on first use
    assert any(word in said for word in ("pixels", "scans", "too large")), said
    seconds = []

    def work():
        start = time.thread_time()
        reason(data)
        seconds.append(time.thread_time() - start)

    growth = peak_growth(work)
    assert growth is None or growth < 50 << 20
    work()
    assert min(seconds) < 0.05


@pytest.mark.parametrize("side", [20_000])
def test_a_tile_that_unpacks_to_much_more_than_the_image(side):
    """16 x 16 pixels in a tile of 400 MB: the header of the image alone does not show it."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(side)) for _ in range(side // 20)) + packer.flush()
    entries = (*tiled[:-2], (324, 200), (325, len(packed)), (322, side), (323, side))
    assert "has tiles of 20000 x 20000 pixels" in reason(tiff_header(*entries).ljust(200, b"\0") + packed)


def test_a_film_of_900_large_frames_costs_one_frame():
    still = encoded(Image.new("P", (2000, 2000), 3), "GIF")
    palette_end = 13 + 3 * 2 ** ((still[10] & 7) + 1)
    film = still[:palette_end] + still[palette_end:-1] * 900 + b";"
    with Image.open(io.BytesIO(film)) as image:
        assert image.n_frames == 900
    growth = peak_growth(lambda: decode_pixels(film))
    assert growth is None or growth < 50 << 20


def test_a_file_of_ten_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff_header((256, 10), (257, 10), (258, 8), (262, 1), (273, 8), (279, 100)))
    os.truncate(path, 10 << 30)
    start = time.thread_time()
    assert "10,737,418,240 bytes; the limit is" in reason(path)
    assert time.thread_time() - start < 0.05


def test_archives_in_archives_are_no_source(tmp_path):
    data = b"x"
    for _ in range(5):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("inner.zip", data)
        data = buffer.getvalue()
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ClipworksError, match="compressed archive; unpack it"):
        open_source(tmp_path / "a.zip")
    assert "zip archive" in reason(data)


# -- fuzz --------------------------------------------------------------------------------------------------------


def seeds():
    images = [photo(24, 16), photo(24, 16).convert("L"), photo(24, 16).convert("P"), photo(24, 16).convert("RGBA")]
    found = [encoded(images[0], kind, **options) for kind, options in KINDS.items()]
    found += [encoded(image, kind) for image in images[1:] for kind in ("PNG", "WEBP", "TIFF", "GIF")]
    found += [encoded(images[0], "JPEG", progressive=True), encoded(images[0].convert("CMYK"), "JPEG")]
    found += [encoded(images[0], "TIFF", compression=c) for c in ("packbits", "jpeg", "tiff_adobe_deflate")]
    found += [encoded(images[0], kind, save_all=True, append_images=[images[0]]) for kind in ("GIF", "WEBP", "PNG")]
    turned = Image.Exif()
    turned[0x0112] = 6
    return found + [encoded(images[0], kind, exif=turned) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]


def mutated(data, rng):
    """Flip, overwrite, cut out, double or truncate, at one to eight places; the first bytes are mostly kept."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        place = int(rng.integers(4 if rng.random() < 0.9 else 0, max(5, len(data))))
        way, count = rng.integers(5), int(rng.integers(1, 9))
        if way == 0:
            data[place : place + 1] = bytes([rng.integers(256)])
        elif way == 1:
            data[place : place + count] = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * count
        elif way == 2:
            del data[place : place + count]
        elif way == 3:
            data[place:place] = data[place : place + 16]
        elif rng.random() < 0.2:
            del data[place:]
    return bytes(data)


def fuzz(count, seed):
    """Number of mutants read and refused; anything but an image or `BadImage` within a second is an error."""
    rng = np.random.default_rng(seed)
    kinds, read, refused = seeds(), 0, 0
    for _ in range(count):
        data = mutated(kinds[rng.integers(len(kinds))], rng)
        start = time.thread_time()
        try:
            pixels = decode_pixels(data, limits=Limits(max_pixels=1_000_000))
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            read += 1
        except BadImage:
            refused += 1
        assert time.thread_time() - start < 1
    return read, refused


@pillow_warns
def test_mutants_are_images_or_bad_images(record_property):
    read, refused = fuzz(1500, seed=1)
    record_property("injected", read + refused)
    assert read > 100
    assert refused > 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory through resource")
def test_twenty_thousand_mutants_under_a_memory_limit(record_property):
    """In a process of its own, so that a crash of a decoder is seen as one."""
    code = (
        "import sys, resource, warnings, torch; warnings.simplefilter('ignore'); sys.path.insert(0, sys.argv[1])\n"
        "import test_data_faults as t; t.decode_pixels(t.seeds()[0])\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20),) * 2)\n"
        "print(*t.fuzz(20_000, seed=2))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused = map(int, done.stdout.split())
    assert read + refused == 20_000
    record_property("injected", read + refused)


# -- names that are not names ------------------------------------------------------------------------------------


def test_nothing_in_a_table_is_run_or_fetched(tmp_path, monkeypatch):
    """Commands and addresses in place of paths are text: no process starts and no connection is made."""
    import socket

    def refused(*arguments, **options):
        raise AssertionError(f"called with {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(subprocess, "Popen", refused)
    monkeypatch.setattr(os, "system", refused)
    (tmp_path / "good.png").write_bytes(encoded(photo(), "PNG"))
    rows = ["pipe:touch canary", "file:///etc/passwd", "http://127.0.0.1:9/a.png", "|touch canary", "$(touch canary)",
            "../../../../etc/passwd", "good.png"]  # fmt: skip
    (tmp_path / "t.csv").write_text("path\n" + "".join(f'"{row}"\n' for row in rows))
    monkeypatch.chdir(tmp_path)
    (batch,) = load_batches(open_source("t.csv"), PREPROCESS, 10, 2, "report")
    assert batch.keys == ["good.png"]
    assert len(batch.errors) == len(rows) - 1
    assert sorted(os.listdir(tmp_path)) == ["good.png", "t.csv"]
