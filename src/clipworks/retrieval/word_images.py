"""Drawn images of words, with where the word is: training and test data for scene text without any download."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from ..errors import check_range

HEIGHT = (0.08, 0.2)
SHRINK = 0.4  # of FDP: the mask is the word's polygon, moved inwards


@dataclass
class WordImage:
    """One drawn word.

    Attributes
    ----------
    image : RGB
    word : what is written
    polygon : corners of the word, (4, 2) in pixels, x before y
    """

    image: Image.Image
    word: str
    polygon: np.ndarray

    def mask(self, rows: int, columns: int, shrink: float = SHRINK) -> np.ndarray:
        """Which cells of a grid have their centre in the word's polygon, moved inwards; at least one.

        Parameters
        ----------
        rows, columns : of the grid
        shrink : r of d = area (1 - r^2) / length, the distance by which the sides move inwards
        """
        centre, half = self.polygon.mean(0), []
        sides = (self.polygon[1] - self.polygon[0], self.polygon[3] - self.polygon[0])
        lengths = [np.linalg.norm(side) for side in sides]
        moved = lengths[0] * lengths[1] * (1 - shrink**2) / (2 * sum(lengths))
        half = [max(length / 2 - moved, 0.5) for length in lengths]
        x, y = (
            (np.arange(columns) + 0.5) * self.image.width / columns,
            (np.arange(rows) + 0.5) * self.image.height / rows,
        )
        points = np.stack(np.meshgrid(x, y), -1) - centre
        along = [np.abs(points @ (side / length)) for side, length in zip(sides, lengths, strict=True)]
        found = (along[0] <= half[0]) & (along[1] <= half[1])
        if not found.any():
            found[np.unravel_index((points**2).sum(-1).argmin(), found.shape)] = True
        return found


def draw_word(
    word: str, size: int = 640, seed: int = 0, tilt: float = 15.0, ground: Image.Image | None = None,
    font: str | PathLike[str] | None = None, height: tuple[float, float] = HEIGHT,
) -> WordImage:  # fmt: skip
    """Write a word somewhere on a photo, or on a ground of soft colours.

    Parameters
    ----------
    word : some letters
    size : side of the image in pixels
    seed : of place, size, colours and ground
    tilt : largest angle in degrees
    ground : what is written on, made square and of that size; it is not changed
    font : file of a TrueType font (default: Pillow's own)
    height : smallest and largest size of the font, as shares of the side
    """
    check_range("size", size, 16)
    rng = np.random.default_rng([seed, *word.encode()])
    soft = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    ground = (soft if ground is None else ImageOps.fit(ground.convert("RGB"), (size, size))).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    letters = _font(font, max(8, int(size * rng.uniform(*height))))
    left, top, right, bottom = letters.getbbox(word)
    wide, tall = max(1, int(right - left)), max(1, int(bottom - top))
    shrink = min(1.0, 0.85 * size / wide)
    patch = Image.new("L", (wide + 2, tall + 2), 0)
    ImageDraw.Draw(patch).text((1 - left, 1 - top), word, fill=255, font=letters)
    wide, tall = max(1, int(wide * shrink)), max(1, int(tall * shrink))
    angle = rng.uniform(-tilt, tilt)
    turned = patch.resize((wide, tall)).rotate(angle, expand=True, resample=Image.Resampling.BICUBIC)
    corner = [int(rng.integers(0, max(1, size - side))) for side in turned.size]
    under = np.asarray(ground.crop((corner[0], corner[1], corner[0] + turned.width, corner[1] + turned.height))).mean()
    colour = rng.integers(0, 70, 3) if under > 127 else rng.integers(185, 256, 3)
    ground.paste(Image.new("RGB", turned.size, tuple(int(c) for c in colour)), (corner[0], corner[1]), turned)
    turn = np.deg2rad(angle)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    box = np.array([[-wide, -tall], [wide, -tall], [wide, tall], [-wide, tall]]) / 2
    return WordImage(ground, word, box @ rotation.T + corner + np.array(turned.size) / 2)


def _font(file: str | PathLike[str] | None, size: int) -> Any:
    return ImageFont.load_default(size=size) if file is None else ImageFont.truetype(file, size=size)


def toy_reader(seed: int = 0) -> Any:
    """A tiny ResNet encoder with random weights, for examples and tests."""
    from ..encoders.encoder import Encoder
    from ..encoders.toy import ToyTokenizer

    vision = VisionConfig(kind="resnet", image_size=64, width=8, layers=(1, 1, 1, 1), heads=8, activation="relu",
                          pool="attention")  # fmt: skip
    text = TextConfig(vocab_size=64, eot_id=63, width=16, layers=1, heads=2, mlp_width=32)
    config = EncoderConfig("toy", 8, vision, text, PreprocessConfig(64))
    return Encoder(config, ToyTokenizer(), seed=seed).eval()
