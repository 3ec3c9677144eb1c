"""Views of an image for training: random resized crop, flip, colour, each drawn from a given generator.

The same generator state gives the same pixels, so a view can be replayed from its seed alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ..data.decode import decode_pixels
from ..errors import check_choice

if TYPE_CHECKING:
    import torch

    from ..data.item import Item
    from ..encoders.preprocess import Preprocess


@dataclass(frozen=True)
class Augment:
    """How views are drawn.

    Parameters
    ----------
    scale : least and greatest share of the area that a crop keeps
    ratio : least and greatest width over height of a crop
    flip : probability of a horizontal flip (0 where captions say left and right)
    jitter : strength of brightness, contrast, saturation and hue changes
    jitter_p, grey, blur : probabilities of colour jitter, grey-scale and Gaussian blur (sigma 0.1 to 2)
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    grey: float = 0.0
    blur: float = 0.0

    def __call__(
        self, image: Image.Image, size: int, rng: np.random.Generator, resample: str = "bicubic"
    ) -> Image.Image:
        """Return a view of `size` x `size` pixels."""
        return self.placed(image, size, rng, resample)[0]

    def placed(
        self, image: Image.Image, size: int, rng: np.random.Generator, resample: str = "bicubic"
    ) -> tuple[Image.Image, tuple[int, int, int, int], bool]:
        """Return a view, the crop of the image that it shows (left, top, right, bottom), and whether it is mirrored."""
        box = self.box(image.width, image.height, rng)
        image = image.resize((size, size), Image.Resampling[resample.upper()], box=box)
        mirrored = bool(rng.random() < self.flip)
        if mirrored:
            image = ImageOps.mirror(image)
        if rng.random() < self.jitter_p:
            image = self._colour(image, rng)
        if rng.random() < self.grey:
            image = image.convert("L").convert("RGB")
        if rng.random() < self.blur:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
        return image, box, mirrored

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw a crop (left, top, right, bottom); after ten misses, the largest centred one of allowed shape."""
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                left, top = int(rng.integers(0, width - wide + 1)), int(rng.integers(0, height - tall + 1))
                return left, top, left + wide, top + tall
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        wide = min(width, max(1, round(height * ratio)))
        tall = min(height, max(1, round(width / ratio)))
        left, top = (width - wide) // 2, (height - tall) // 2
        return left, top, left + wide, top + tall

    def _colour(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Brightness, contrast, saturation and hue, in random order."""
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for change in rng.permutation(4):
            strength = self.jitter[change]
            amount = rng.uniform(-strength, strength)
            if change < 3:
                image = enhancers[change](image).enhance(max(0.0, 1 + amount))
            elif strength:
                hue, saturation, value = image.convert("HSV").split()
                shifted = ((np.asarray(hue).astype(np.int16) + round(255 * amount)) % 256).astype(np.uint8)
                image = Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")
        return image


# "crop" is the view of few-shot training (CoOp's protocol, TPT), "light" open_clip's, "standard" CLIP's in SLIP with a
# flip, "strong" SLIP's and CLIP-rocket's
AUGMENTS: dict[str, Augment | None] = {
    "none": None,
    "crop": Augment(scale=(0.08, 1.0), flip=0.5),
    "light": Augment(),
    "standard": Augment(scale=(0.5, 1.0), flip=0.5),
    "strong": Augment(scale=(0.08, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2, blur=0.5),
}


def resolve_augment(augment: str | Augment | None) -> Augment | None:
    """Return an `Augment` from a name ("none", "crop", "light", "standard", "strong"), an `Augment` or None."""
    if augment is None or isinstance(augment, Augment):
        return augment
    return AUGMENTS[check_choice("augment", augment, AUGMENTS)]


def view(item: Item, preprocess: Preprocess, augment: Augment | None, rng: np.random.Generator) -> torch.Tensor:
    """Return the normalised pixels of one view of an item, shape (3, size, size).

    An item that holds a float tensor holds preprocessed pixels; they are taken as they are, and no view is drawn.

    Raises
    ------
    BadImage
        If the image cannot be used.
    """
    ready: object = item.image
    if hasattr(ready, "is_floating_point") and ready.is_floating_point():
        return ready  # type: ignore[return-value]
    if augment is None:
        return preprocess(item.source(), key=item.key)
    image = open_image(item, preprocess)
    made = augment(image, preprocess.config.size, rng, preprocess.config.interpolation)
    return preprocess.normalize(np.asarray(made))


def open_image(item: Item, preprocess: Preprocess) -> Image.Image:
    """Decode an item within the preprocessing's limits, at reduced size where it allows that."""
    least = preprocess.config.size if preprocess.fast else None
    return Image.fromarray(decode_pixels(item.source(), key=item.key, limits=preprocess.limits, min_side=least))
