"""Pixels against the published transform, computed here by Pillow and numpy alone."""

import doctest
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import clipworks.encoders.preprocess as module
from clipworks.data.decode import Limits
from clipworks.encoders.config import PreprocessConfig
from clipworks.encoders.preprocess import Preprocess, shortest_side
from clipworks.errors import BadImage, ClipworksError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# (width, height): landscape, portrait, square, exact, upscaled, odd margins, thin
SIZES = [(640, 427), (427, 640), (300, 300), (224, 224), (100, 75), (225, 224), (500, 333), (224, 1000), (1279, 853)]


def photo(width, height, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(2 * np.pi * (rng.uniform(1, 30) * x + rng.uniform(1, 30) * y)) for _ in range(3)]
    pixels = 127 + 90 * np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.uniform(0, 255, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def published(image, size, interpolation="bicubic"):
    """Resize(size), CenterCrop(size), ToTensor: what open_clip and OpenAI's CLIP document, as uint8 (H, W, 3)."""
    width, height = image.size
    if width <= height:
        wide, tall = size, int(size * height / width)
    else:
        wide, tall = int(size * width / height), size
    image = image.resize((wide, tall), RESAMPLE[interpolation])
    left, top = round((wide - size) / 2.0), round((tall - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def assert_levels(found, expected):
    """Equal in nearly all values, one level off in a few of a thousand, two in at most one of 50,000, never more.

    Both sides compute in whole numbers and round between the two passes, with weights of 15 and of 22 bits.
    """
    off = np.abs(found.astype(int) - expected)
    assert off.max() <= 2
    assert (off == 2).sum() <= off.size / 50_000
    assert (off == 1).mean() <= 0.01  # a crop one pixel off would differ nearly everywhere


def levels(tensor, mean=MEAN, std=STD):
    """A normalised tensor as 8-bit levels (H, W, 3), not rounded."""
    return (tensor.double().numpy().transpose(1, 2, 0) * std + mean) * 255


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_published_ones_within_one_level(size, interpolation):
    array = photo(*size)
    preprocess = Preprocess(PreprocessConfig(size=224, mean=MEAN, std=STD, interpolation=interpolation))
    found = preprocess.pixels(array)
    assert found.shape == (224, 224, 3)
    assert_levels(found, published(Image.fromarray(array), 224, interpolation))
    tensor = preprocess(array)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert np.abs(levels(tensor) - found).max() <= 1e-3


@pytest.mark.parametrize("size", [32, 225, 336])
def test_other_sizes_than_224(size):
    array = photo(701, 467)
    found = Preprocess(PreprocessConfig(size=size)).pixels(array)
    assert_levels(found, published(Image.fromarray(array), size))


def test_from_a_jpeg_file(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(photo(640, 427)).save(path, quality=88)
    with Image.open(path) as image:
        expected = published(image.convert("RGB"), 224)
    assert_levels(Preprocess(PreprocessConfig(size=224)).pixels(path), expected)


def test_squash():
    array = photo(320, 200)
    config = PreprocessConfig(size=64, resize="squash", crop="none", interpolation="bilinear")
    expected = np.asarray(Image.fromarray(array).resize((64, 64), RESAMPLE["bilinear"]))
    assert_levels(Preprocess(config).pixels(array), expected)


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (3000, 40), (1, 1)])
def test_extreme_shapes_cost_little_and_keep_the_centre(size):
    width, height = size
    array = np.zeros((height, width, 3), np.uint8)
    array[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    array[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    found = Preprocess(PreprocessConfig(size=32)).pixels(array)
    assert found.shape == (32, 32, 3)
    if max(size) > 1:
        long = 0 if width > height else 1
        assert abs(found[..., long].mean() - 127.5) < 3
    if max(size) == 3000:  # small enough to compute in the published way
        assert np.abs(found - published(Image.fromarray(array), 32).astype(float)).max() <= 2


def test_normalisation():
    preprocess = Preprocess(PreprocessConfig(size=2, mean=MEAN, std=STD))
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    expected = ((pixels / 255 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)
    assert np.allclose(preprocess.normalize(pixels).numpy(), expected, atol=1e-6)
    assert pixels[0, 0, 1] == 20  # the input is left alone


@pytest.mark.parametrize("height", [1, 7, 223, 224, 225, 427])
@pytest.mark.parametrize("width", [1, 224, 333, 640])
def test_the_shorter_side_becomes_the_size(height, width):
    tall, wide = shortest_side(height, width, 224)
    assert min(tall, wide) == 224
    assert max(tall, wide) == max(height, width) * 224 // min(height, width)


def test_fast_keeps_enough_pixels_and_loses_little():
    data = io.BytesIO()
    Image.fromarray(photo(1600, 1200)).filter(ImageFilter.GaussianBlur(2)).save(data, "JPEG", quality=90)
    exact, fast = (Preprocess(PreprocessConfig(size=224), fast=f) for f in (False, True))
    difference = np.abs(fast.pixels(data.getvalue()) - exact.pixels(data.getvalue()).astype(float))
    assert 0 < difference.mean() < 3
    small = io.BytesIO()
    Image.fromarray(photo(300, 300)).save(small, "JPEG")  # not twice the size: nothing may be dropped
    assert np.array_equal(fast.pixels(small.getvalue()), exact.pixels(small.getvalue()))


def test_the_fingerprint_covers_what_decides_the_pixels():
    config = PreprocessConfig(size=224)
    same = Preprocess(PreprocessConfig(size=224), limits=Limits(max_pixels=10))
    assert Preprocess(config).fingerprint == same.fingerprint
    others = [
        Preprocess(config, fast=True), Preprocess(PreprocessConfig(size=336)),
        Preprocess(PreprocessConfig(size=224, interpolation="bilinear")),
        Preprocess(PreprocessConfig(size=224, mean=(0, 0, 0))),
    ]  # fmt: skip
    assert len({Preprocess(config).fingerprint, *(p.fingerprint for p in others)}) == 5


def test_errors_name_the_image():
    preprocess = Preprocess(PreprocessConfig(size=8), limits=Limits(max_pixels=100))
    with pytest.raises(BadImage, match=r"image 'cats/1.jpg': has 20 x 20 pixels; the limit is 100"):
        preprocess(np.zeros((20, 20, 3), np.uint8), key="cats/1.jpg")
    with pytest.raises(ClipworksError, match="crop='none' needs resize='squash'"):
        Preprocess(PreprocessConfig(size=8, resize="shortest", crop="none"))


@pytest.mark.shared_data
def test_real_photos():
    from pathlib import Path

    folder = Path(__file__).parents[3] / "shared" / "data" / "coco-mini"
    paths = sorted(folder.rglob("*.jpg"))[:25]
    if not paths:
        pytest.skip("no photos beside this checkout")
    preprocess = Preprocess(PreprocessConfig(size=224))
    found, wanted = [], []
    for path in paths:
        with Image.open(path) as image:
            expected = published(image.convert("RGB"), 224)
        found.append(preprocess.pixels(path))
        wanted.append(expected)
    assert_levels(np.stack(found), np.stack(wanted))


def test_the_documented_examples():
    assert doctest.testmod(module).failed == 0
