"""Mutated JPEG, PNG, WebP, GIF, BMP and TIFF: an image, or `BadImage`, in bounded time and memory."""

from __future__ import annotations

import re
import struct
import zlib

import numpy as np
import pytest
from fuzzing import NUMBERS, edits, run
from hypothesis import strategies as st
from PIL import Image
from test_data_faults import encoded, photo, pillow_warns, seeds

from clipworks.data.decode import FORMATS, Limits, decode_pixels, sniff
from clipworks.errors import BadImage

SMALL = Limits(max_pixels=1_000_000)
KINDS = {kind: [data for data in seeds() if sniff(data) == kind] for kind in FORMATS}


def read(data: bytes) -> None:
    for min_side in (None, 8):
        pixels = decode_pixels(data, key="k", limits=SMALL, min_side=min_side)
        assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
        assert 0 < pixels.shape[0] * pixels.shape[1] <= SMALL.max_pixels


def sealed(data: bytes) -> bytes:
    """A PNG whose chunks have right checksums again, so that damage comes further than the first check."""
    out, place = bytearray(data[:8]), 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        out += data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return bytes(out) + data[place:]


@st.composite
def repacked(draw: st.DrawFn) -> bytes:
    """A PNG with other numbers in its header, or other rows, packed as they should be."""
    side = st.sampled_from([n for n in NUMBERS if n < 2**32]) | st.integers(0, 4000)
    header = struct.pack(">IIBBBBB", draw(side), draw(side), *(draw(st.integers(0, 17)) for _ in range(5)))
    rows = zlib.compress(draw(st.binary(max_size=2000)) * draw(st.sampled_from([1, 1, 1000])))
    parts = [(b"IHDR", header), (b"PLTE", draw(st.binary(max_size=800))), (b"tRNS", draw(st.binary(max_size=300))),
             (b"acTL", draw(st.binary(max_size=8))), (b"IDAT", rows), (b"IEND", b"")]  # fmt: skip
    kept = [part for part in parts if part[0] in (b"IHDR", b"IDAT", b"IEND") or draw(st.booleans())]
    return sealed(b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(b)) + n + b + bytes(4) for n, b in kept))


@st.composite
def resized(draw: st.DrawFn) -> bytes:
    """A JPEG, GIF, WebP or BMP that claims another size in one of the places that tell it."""
    kind = draw(st.sampled_from(["JPEG", "GIF", "WEBP", "BMP"]))
    data = bytearray(draw(st.sampled_from(KINDS[kind])))
    form = {"JPEG": ">HH", "GIF": "<HH", "WEBP": "<HH", "BMP": "<ii"}[kind]
    marks = {"JPEG": rb"\xff[\xc0-\xc2]...", "GIF": rb"\x2c....|^GIF8.a", "WEBP": rb"\x9d\x01\x2a", "BMP": rb"^BM.{16}"}
    places = [found.end() for found in re.finditer(marks[kind], bytes(data), re.DOTALL)] or [6]
    place = draw(st.sampled_from(places))
    most = 32_767 if kind == "BMP" else 65_535
    sides = [draw(st.sampled_from([0, 1, 17, 999, 4000, most]) | st.integers(0, most)) for _ in range(2)]
    data[place : place + struct.calcsize(form)] = struct.pack(form, *sides)
    return bytes(data)


TARGETS = {kind: st.sampled_from(data).flatmap(lambda d: edits(d, keep=3)) for kind, data in KINDS.items()}
TARGETS["PNG with right checksums"] = st.sampled_from(KINDS["PNG"]).flatmap(lambda d: edits(d, keep=8)).map(sealed)
TARGETS["PNG of any rows"] = repacked()
TARGETS["other sizes"] = resized()
TARGETS["any bytes"] = st.binary(max_size=300) | st.builds(
    lambda head, body: head + body,
    st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\1\0WEBP", b"BM", b"II*\0", b"MM\0*"]),
    st.binary(max_size=300),
)


@pillow_warns
@pytest.mark.parametrize("name", TARGETS)
def test_mutants_are_images_or_bad_images(name):
    found = run(TARGETS[name], read, 150, BadImage)
    assert found["refused"]
    assert found["read"] or name in ("any bytes", "PNG of any rows")


@pytest.mark.slow
@pillow_warns
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutants_are_images_or_bad_images(name):
    assert run(TARGETS[name], read, 4000, BadImage)["refused"]


def test_the_rule_can_be_broken():
    """A reader that raises what it likes, or takes too long or too much, is found."""

    def raises(data: bytes) -> None:
        if len(data) > 5:
            raise KeyError("from the depths")

    def takes(data: bytes) -> None:
        if len(data) > 5:
            np.ones(40_000_000)

    with pytest.raises(KeyError):
        run(st.binary(), raises, 50)
    with pytest.raises(AssertionError, match="grew by"):
        run(st.just(bytes(9)), takes, 1, seconds=60.0)  # fresh pages alone may take a second
    with pytest.raises(AssertionError):
        run(st.binary(min_size=1), lambda data: sum(range(3_000_000)), 1, seconds=0.001)


def test_a_bomb_in_every_format_is_refused_within_limits():
    """Images of one colour, far larger than allowed, in files of some kilobytes."""
    flat = Image.new("RGB", (4000, 3000))
    bombs = [encoded(flat.convert("P") if kind == "GIF" else flat, kind, **options)
             for kind, options in (("PNG", {}), ("GIF", {}), ("WEBP", {"lossless": True}), ("JPEG", {}),
                                   ("TIFF", {"compression": "tiff_adobe_deflate"}))]  # fmt: skip
    found = run(st.sampled_from(bombs), read, 20, BadImage)
    assert found == {"refused": sum(found.values())}
    assert decode_pixels(encoded(photo(), "PNG"), limits=SMALL).shape == (64, 96, 3)
