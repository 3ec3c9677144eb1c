"""Every way in which an image may be stored, against pixels that are known or computed apart."""

import io
import pickle

import numpy as np
import pytest
from made_images import corners, encoded, exif, photo, stored, tiff
from PIL import Image

from clipworks.data import decode as module
from clipworks.data.decode import FORMATS, Limits, count_scans, decode, decode_pixels, describe, refuse_text, sniff
from clipworks.errors import BadImage, ClipworksError, UnknownName

PIXELS = corners()
LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "GIF": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats(kind):
    assert np.array_equal(decode_pixels(encoded(PIXELS, kind, **LOSSLESS[kind])), PIXELS)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits", "tiff_adobe_deflate"])
def test_tiff_compressions(compression):
    assert np.array_equal(decode_pixels(encoded(PIXELS, "TIFF", compression=compression)), PIXELS)


def test_every_form_of_source_gives_the_same_pixels(tmp_path):
    data = encoded(PIXELS)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    encodings = [path, str(path), data, bytearray(data), memoryview(data)]
    for source in [*encodings, Image.fromarray(PIXELS), PIXELS, Image.open(path)]:
        found = decode_pixels(source)
        assert found.dtype == np.uint8
        assert np.array_equal(found, PIXELS)
    image = decode(path)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), PIXELS)


def test_the_pixels_are_the_callers_own():
    given = PIXELS.copy()
    decode_pixels(given)[:] = 0
    assert np.array_equal(given, PIXELS)
    image = Image.fromarray(PIXELS)
    decode_pixels(image)[:] = 0
    assert np.array_equal(np.asarray(image), PIXELS)
    decode(image).putpixel((0, 0), (9, 9, 9))
    assert np.array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1)])
def test_grey_arrays(shape):
    grey = np.arange(24, dtype=np.uint8).reshape(shape)
    assert np.array_equal(decode_pixels(grey), np.repeat(grey.reshape(4, 6, 1), 3, 2))


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)])
def test_other_arrays_are_refused(array):
    with pytest.raises(BadImage, match=r"must be a uint8 array of shape .* not"):
        decode_pixels(array)


def test_an_array_without_pixels_is_refused():
    with pytest.raises(BadImage, match="has no pixels"):
        decode_pixels(np.zeros((0, 4, 3), np.uint8))


# -- JPEG --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", [0, 1, 2, "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_is_bit_equal_to_pillow_in_full_and_scaled(subsampling, progressive, mode):
    image = Image.fromarray(photo(333, 251)).convert(mode)
    data = encoded(image, "JPEG", subsampling=subsampling, progressive=progressive)
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(decode_pixels(data), np.asarray(opened.convert("RGB")))
    for side in (20, 40, 100, 200, 300):
        with Image.open(io.BytesIO(data)) as opened:
            opened.draft(mode, (side, side))
            expected = np.asarray(opened.convert("RGB"))
        found = decode_pixels(data, min_side=side)
        assert np.array_equal(found, expected)
        assert min(found.shape[:2]) >= min(side, 251)


def test_the_turbo_path_is_taken_and_can_be_absent(monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    data = encoded(photo(64, 48), "JPEG")
    calls = []
    original = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: calls.append(1) or original(*a, **k))
    with_it = decode_pixels(data)
    assert calls
    monkeypatch.setitem(__import__("sys").modules, "simplejpeg", None)
    assert np.array_equal(decode_pixels(data), with_it)
    assert len(calls) == 1


def test_cmyk_jpeg():
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[..., 0], inks[..., 3] = 255, 51  # all cyan, a fifth of black
    data = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)
    expected = np.array([0, 204, 204])  # (1 - ink) * (1 - black) * 255
    assert np.abs(decode_pixels(data).astype(int) - expected).max() <= 3


def test_a_jpeg_named_png_is_read_by_its_first_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(photo(20, 10), "JPEG"))
    assert decode(path).size == (20, 10)


def test_mpo_gives_its_first_picture():
    first, second = Image.fromarray(photo(16, 16, 1)), Image.fromarray(photo(16, 16, 2))
    data = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert np.array_equal(decode_pixels(data), decode_pixels(encoded(first, "JPEG", quality=95)))


# -- modes -------------------------------------------------------------------------------------------------------


def over_white(color, alpha):
    return np.round(np.asarray(color) * alpha / 255 + 255 * (1 - alpha / 255))


@pytest.mark.parametrize("alpha", [0, 51, 128, 255])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "PIL", "array"])
def test_transparency_is_laid_over_white(alpha, kind):
    rgba = np.full((5, 7, 4), (200, 100, 40, alpha), np.uint8)
    image = Image.fromarray(rgba)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    source = {"PIL": image, "array": rgba}.get(kind)
    found = decode_pixels(encoded(image, kind, **options) if source is None else source)
    assert np.abs(found - over_white((200, 100, 40), alpha)).max() <= 1


def test_grey_with_alpha():
    image = Image.merge("LA", [Image.new("L", (4, 4), 60), Image.new("L", (4, 4), 51)])
    assert np.abs(decode_pixels(encoded(image)) - over_white((60,) * 3, 51)).max() <= 1


def test_palette_with_alpha_per_entry():
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([0, 1] * 4)
    found = decode_pixels(encoded(image, transparency=bytes([255, 0])))
    assert np.array_equal(found[0], [(10, 20, 30), (255, 255, 255)] * 2)


def test_one_transparent_colour():
    image = Image.fromarray(PIXELS)
    found = decode_pixels(encoded(image, transparency=(255, 0, 0)))
    assert np.array_equal(found[0, 0], (255, 255, 255))
    assert np.array_equal(found[0, -1], (0, 255, 0))


def test_one_bit():
    bits = np.arange(64).reshape(8, 8) % 3 == 0
    assert np.array_equal(decode_pixels(encoded(Image.fromarray(bits)))[..., 1], bits * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_are_scaled_not_clipped(kind, order):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    mode = "I;16" if order == "<" else "I;16B"
    image = Image.frombytes(mode, (16, 16), values.astype(f"{order}u2").tobytes())
    if (kind, order) == ("PNG", ">"):
        source = image  # Pillow writes no such PNG from this mode; the image itself is read
    else:
        source = encoded(image, kind)
    found = decode_pixels(source)
    assert np.array_equal(found[..., 0], np.round(values / 65535 * 255))
    assert np.array_equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode):
    with pytest.raises(BadImage, match="range is not defined"):
        decode(encoded(Image.new(mode, (4, 4), 7), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (6, 4), color) for color in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert np.array_equal(decode_pixels(data), np.asarray(frames[0]))


def test_a_colour_profile_is_ignored():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert np.array_equal(decode_pixels(encoded(PIXELS, icc_profile=profile)), PIXELS)


# -- orientation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_orientation_of_lossless_files(kind, orientation):
    data = encoded(stored(PIXELS, orientation), kind, exif=exif(orientation), **LOSSLESS[kind])
    assert np.array_equal(decode_pixels(data), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("min_side", [None, 8])
def test_orientation_of_jpeg(orientation, min_side):
    upright = corners(64, 32)
    data = encoded(stored(upright, orientation), "JPEG", quality=95, subsampling=0, exif=exif(orientation))
    found = decode_pixels(data, min_side=min_side)
    assert found.shape == ((32, 64, 3) if min_side is None else (8, 16, 3))
    step = 64 // found.shape[1]
    assert np.abs(found[1::6, 1::6].astype(int) - upright[::step, ::step][1::6, 1::6]).max() < 8


@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_of_an_opened_image(tmp_path, orientation):
    for kind in ("JPEG", "TIFF", "PNG"):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(encoded(stored(corners(64, 32), orientation), kind, exif=exif(orientation)))
        with Image.open(path) as image:
            assert np.array_equal(decode_pixels(image), decode_pixels(path))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_ignored(value):
    assert np.array_equal(decode_pixels(encoded(PIXELS, exif=exif(value))), PIXELS)


def test_damaged_metadata_does_not_spoil_the_pixels():
    data = encoded(PIXELS, "WEBP", lossless=True, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x99" * 40)
    assert np.array_equal(decode_pixels(data), PIXELS)


# -- names, limits, helpers --------------------------------------------------------------------------------------


def test_the_error_names_key_and_reason_and_survives_pickling():
    with pytest.raises(BadImage) as caught:
        decode(b"", key="cats/1.jpg")
    assert (caught.value.key, caught.value.reason) == ("cats/1.jpg", "is empty (0 bytes)")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.key, str(again)) == ("cats/1.jpg", "image 'cats/1.jpg': is empty (0 bytes)")


@pytest.mark.parametrize(
    ("source", "name"),
    [("a/b.jpg", "a/b.jpg"), (b"12345", "<5 bytes>"), (np.zeros(3), "<ndarray>"), (None, "<NoneType>")],
)
def test_an_image_without_a_key_is_described(source, name):
    assert describe(source) == name
    with pytest.raises(BadImage) as caught:
        decode(source)
    assert caught.value.key == name


@pytest.mark.parametrize(
    "text",
    ["http://a/b.jpg", "HTTPS://a/b.jpg", " file:///etc/passwd", "pipe:touch x", "data:image/png;base64,AA", "s3://b/k"],
)
def test_urls_and_commands_are_no_paths(text):
    assert "nothing is fetched or run" in refuse_text(text)
    with pytest.raises(BadImage, match="is a URL or a command"):
        decode(text)


@pytest.mark.parametrize("text", ["a.jpg", "/tmp/a.jpg", "C:/a.jpg", "pipes/a.jpg", "a:b.jpg"])
def test_paths_are_paths(text):
    assert refuse_text(text) is None


def test_a_nul_byte_is_refused():
    with pytest.raises(BadImage, match="NUL byte"):
        decode("a\0.jpg")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_is_known_by_its_first_bytes_and_can_be_excluded(kind):
    data = encoded(PIXELS, kind)
    assert sniff(data[:16]) == kind
    others = Limits(formats=tuple(f for f in FORMATS if f != kind))
    with pytest.raises(BadImage, match=f"is a {kind} image; accepted are"):
        decode(data, limits=others)
    assert decode(data, limits=Limits(formats=(kind,))).size == (12, 8)


def test_limits_are_inclusive():
    assert decode(PIXELS, limits=Limits(max_pixels=96)).size == (12, 8)
    data = encoded(PIXELS)
    assert decode(data, limits=Limits(max_pixels=96, max_bytes=len(data))).size == (12, 8)
    for source in (data, PIXELS, Image.fromarray(PIXELS)):
        with pytest.raises(BadImage, match="has 12 x 8 pixels; the limit is 95"):
            decode(source, limits=Limits(max_pixels=95))
    with pytest.raises(BadImage, match=r"bytes; the limit is .*Limits.max_bytes"):
        decode(data, limits=Limits(max_bytes=len(data) - 1))


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"max_pixels": 0}])
def test_impossible_limits(options):
    with pytest.raises(ClipworksError, match=next(iter(options))):
        Limits(**options)
    with pytest.raises(UnknownName, match="formats must be one of"):
        Limits(formats=("JPEG", "PNGS"))


def test_scans_are_counted_without_what_only_looks_like_one():
    plain = encoded(photo(64, 64), "JPEG")
    progressive = encoded(photo(64, 64), "JPEG", progressive=True)
    assert count_scans(plain) == 1
    assert 2 <= count_scans(progressive) <= 15
    noise = b"\xff\xda\0\x02" * 100
    behind = plain + noise  # a film behind a photo, as telephones write
    inside = plain[:2] + b"\xff\xe5" + (len(noise) + 2).to_bytes(2, "big") + noise + plain[2:]
    for data in (behind, inside):
        assert count_scans(data) == 1
        assert np.array_equal(decode_pixels(data), decode_pixels(plain))


def test_pillows_settings_are_left_alone():
    from PIL import ImageFile

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    decode(encoded(PIXELS))
    with pytest.raises(BadImage):
        decode(encoded(photo(64, 64))[:-60])
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_a_plain_tiff_of_our_own_making():
    data = tiff(4, 2, data=bytes(range(0, 80, 10)))
    assert np.array_equal(decode_pixels(data)[..., 0], np.arange(0, 80, 10).reshape(2, 4))


def test_the_documented_example():
    import doctest

    assert doctest.testmod(module).failed == 0
