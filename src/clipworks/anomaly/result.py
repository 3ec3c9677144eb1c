"""`AnomalyMap`: where in one image something is unusual, how unusual the image is, and what counts as defective."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from ..errors import ClipworksError, check_choice, check_range

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".npz", ".json")
# colours of the heat from the usual to twice the threshold; the third stands for the threshold itself
COLOURS = np.array([[40, 60, 140], [80, 190, 200], [250, 220, 70], [245, 130, 30], [200, 20, 30]], np.float32)


@dataclass
class Region:
    """One connected region above the threshold: its box in pixels (right and lower ends excluded), peak and size."""

    x0: int
    y0: int
    x1: int
    y1: int
    peak: float
    area: int


@dataclass
class AnomalyMap:
    """The answer of an anomaly detector for one image.

    Attributes
    ----------
    key : name of the image
    heat : array (H, W) in the image's own pixels, float32, higher where it is less normal
    score : how unusual the whole image is
    threshold : images that score above it are defective
    pixel_threshold : pixels above it belong to a defect
    floor : heat of a usual pixel, the lower end of the colours
    picture : the image as it was given (path, bytes, PIL image, array), for drawing; None draws on grey
    """

    key: str
    heat: np.ndarray
    score: float
    threshold: float
    pixel_threshold: float
    floor: float = 0.0
    picture: Any = None

    @property
    def defective(self) -> bool:
        return bool(self.score > self.threshold)

    @property
    def mask(self) -> np.ndarray:
        """True where a pixel belongs to a defect; (H, W)."""
        return self.heat > self.pixel_threshold

    def regions(self, least: int = 1) -> list[Region]:
        """Connected regions (8 neighbours) of the mask with at least `least` pixels, the highest peak first."""
        check_range("least", least, 1)
        labelled, _ = ndimage.label(self.mask, structure=np.ones((3, 3)))
        found = []
        for number, place in enumerate(ndimage.find_objects(labelled), 1):
            inside = labelled[place] == number
            if (area := int(inside.sum())) >= least:
                rows, columns = place
                peak = float(self.heat[place][inside].max())
                found.append(Region(columns.start, rows.start, columns.stop, rows.stop, peak, area))
        return sorted(found, key=lambda r: -r.peak)

    def as_row(self) -> dict[str, Any]:
        """Plain values for JSON or a table."""
        regions = [{k: round(v, 6) if isinstance(v, float) else v for k, v in vars(r).items()} for r in self.regions()]
        return {"key": self.key, "defective": self.defective, "score": round(self.score, 6),
                "threshold": round(self.threshold, 6), "regions": regions}  # fmt: skip

    def draw(self, *, boxes: bool = True, strength: float = 0.7) -> Image.Image:
        """The image with the heat over it, transparent where all is usual, and boxes around the regions.

        Parameters
        ----------
        boxes : whether regions are outlined
        strength : opacity of the strongest heat, in [0, 1]
        """
        check_range("strength", strength, 0, 1)
        span = max(self.pixel_threshold - self.floor, 1e-12)
        level = np.clip((self.heat - self.floor) / (2 * span), 0, 1)
        place = level * (len(COLOURS) - 1)
        below = np.minimum(place.astype(int), len(COLOURS) - 2)
        share = (place - below)[..., None]
        colours = (1 - share) * COLOURS[below] + share * COLOURS[below + 1]
        opacity = strength * np.clip(2 * level, 0, 1)[..., None]
        page = Image.fromarray(np.uint8((1 - opacity) * self._background() + opacity * colours + 0.5))
        if boxes:
            pen = ImageDraw.Draw(page)
            width = max(1, round(min(page.size) / 150))
            for region in self.regions():
                box = (region.x0 - width, region.y0 - width, region.x1 + width - 1, region.y1 + width - 1)
                pen.rectangle(box, outline="#ffffff", width=width)
        return page

    def save(self, path: str | Path) -> Path:
        """Write a picture (.png, .jpg, .webp), the arrays (.npz) or the values (.json), and return the path."""
        path = Path(path)
        check_choice("the ending of an anomaly map", path.suffix.lower(), SUFFIXES)
        if path.suffix.lower() == ".npz":
            np.savez_compressed(path, heat=self.heat, score=self.score, threshold=self.threshold,
                                pixel_threshold=self.pixel_threshold)  # fmt: skip
        elif path.suffix.lower() == ".json":
            path.write_text(json.dumps(self.as_row(), indent=1) + "\n", encoding="utf-8")
        else:
            self.draw().save(path, quality=92)
        return path

    def _background(self) -> np.ndarray:
        if self.picture is None:
            return np.full((*self.heat.shape, 3), 128, np.float32)
        from ..data.decode import decode

        image = decode(self.picture, key=self.key)
        if image.size != self.heat.shape[::-1]:
            raise ClipworksError(f"picture must have the size of the heat, {self.heat.shape[::-1]}. Got {image.size}.")
        return np.asarray(image, np.float32)
