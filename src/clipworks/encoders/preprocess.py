"""From an image to the pixels that an encoder was trained on, the same on every machine.

Exact by default: the published CLIP transform (resize on the shorter side, bicubic with antialiasing, centre crop,
scale to [0, 1], subtract mean, divide by standard deviation) within one 8-bit level (two in about one value of a
million), computed by `torch.nn.functional.interpolate` on bytes. `fast=True` decodes large JPEGs at 1/2, 1/4 or 1/8
of their size first.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..data.decode import DEFAULT_LIMITS, ImageSource, Limits, decode_pixels
from ..errors import ClipworksError, check_choice

if TYPE_CHECKING:
    from .config import PreprocessConfig

PIXEL_RULES = 1  # raise whenever decoding or resizing gives other pixels: stores made before must not be mixed with it
LONGEST = 8  # beyond this ratio of sides only the part that the crop keeps is resized, through Pillow


@dataclass(frozen=True)
class Preprocess:
    """Turn an image into a float tensor of shape (3, H, W).

    Parameters
    ----------
    config : size, mean, std, interpolation ("bicubic", "bilinear"), resize ("shortest" side, or "squash" both),
        crop ("center", "none"); comes with the weights
    fast : decode JPEGs at a fraction of their size where both sides stay at least `config.size`; about 1.3 times
        the speed on photos of one megapixel and more on larger ones, for a loss of a few 8-bit levels on average
        (docs/data.md); part of the fingerprint
    limits : what one image may cost

    Examples
    --------
    >>> from clipworks.encoders.config import PreprocessConfig
    >>> config = PreprocessConfig(size=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    >>> Preprocess(config)(np.full((8, 6, 3), 255, np.uint8)).shape
    torch.Size([3, 4, 4])
    """

    config: PreprocessConfig
    fast: bool = False
    limits: Limits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        check_choice("interpolation", self.config.interpolation, ("bicubic", "bilinear"))
        check_choice("resize", self.config.resize, ("shortest", "squash"))
        check_choice("crop", self.config.crop, ("center", "none"))
        if self.config.resize == "shortest" and self.config.crop == "none":
            raise ClipworksError("crop='none' needs resize='squash': images of different shapes do not stack.")

    def __call__(self, image: ImageSource, key: str | None = None) -> torch.Tensor:
        """Decode (if need be), resize, crop and normalise one image.

        Parameters
        ----------
        image : PIL image, path, encoded bytes, or uint8 array of shape (H, W, 3)
        key : name used in errors

        Returns
        -------
        float32 tensor of shape (3, size, size)

        Raises
        ------
        BadImage
            If it cannot be used.
        """
        return self.normalize(self.pixels(image, key))

    def pixels(self, image: ImageSource, key: str | None = None) -> np.ndarray:
        """The resized and cropped image before normalisation: uint8 array of shape (size, size, 3)."""
        size = self.config.size
        array = decode_pixels(image, key=key, limits=self.limits, min_side=size if self.fast else None)
        height, width = array.shape[:2]
        if self.config.resize == "squash":
            return _resize(array, size, size, self.config.interpolation)
        tall, wide = shortest_side(height, width, size)
        top, left = round((tall - size) / 2.0), round((wide - size) / 2.0)
        if max(tall, wide) > LONGEST * size:
            right, below = (left + size) * width / wide, (top + size) * height / tall
            box = (left * width / wide, top * height / tall, min(width, right), min(height, below))
            resample = Image.Resampling[self.config.interpolation.upper()]
            return np.array(Image.fromarray(array).resize((size, size), resample, box=box))
        return _resize(array, tall, wide, self.config.interpolation)[top : top + size, left : left + size]

    def normalize(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 (H, W, 3) to float32 (3, H, W): scaled to [0, 1], minus mean, over standard deviation."""
        # numpy, not torch: torch would start a team of threads inside every decoding thread
        values = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
        values -= 255.0 * np.asarray(self.config.mean, np.float32)[:, None, None]
        values /= 255.0 * np.asarray(self.config.std, np.float32)[:, None, None]
        return torch.from_numpy(values)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the pixels: the configuration, `fast`, and the version of the rules."""
        record = {"config": self.config.to_dict(), "fast": self.fast, "rules": PIXEL_RULES}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def shortest_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after the shorter side is brought to `size`; the longer one is rounded down, as published.

    >>> shortest_side(427, 640, 224)
    (224, 335)
    """
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _resize(array: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    if array.shape[:2] == (height, width):
        return array
    image = torch.from_numpy(array).permute(2, 0, 1)[None]
    resized = F.interpolate(image, (height, width), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
