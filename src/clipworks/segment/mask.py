"""`Mask`: which name every pixel of an image has, with scores, as a picture, an array or COCO's run-length code."""

from __future__ import annotations

import colorsys
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import ClipworksError, check_choice, check_range

BACKGROUND = "background"
SUFFIXES = (".png", ".npz", ".json")
INK = 0.55  # share of the colour in an overlay


@dataclass
class Mask:
    """The answer of `segment` for one image.

    Attributes
    ----------
    labels : int32 (H, W), index into `names`
    names : the class names; with background handling the first is "background"
    scores : float32 (len(names), h, w), probabilities on a coarser grid that covers the image
    key : of the image
    """

    labels: np.ndarray
    names: list[str]
    scores: np.ndarray
    key: str = ""

    def of(self, name: str) -> np.ndarray:
        """Bool (H, W): the pixels of a name."""
        return self.labels == self.names.index(check_choice("name", name, self.names))

    @property
    def shares(self) -> dict[str, float]:
        """Name -> share of the image, largest first, without names that no pixel has."""
        count = np.bincount(self.labels.ravel(), minlength=len(self.names)) / max(self.labels.size, 1)
        return {self.names[i]: float(count[i]) for i in np.argsort(-count, kind="stable") if count[i]}

    def as_rows(self, top: int | None = None) -> list[dict[str, Any]]:
        """One dictionary per name found: key, name, share of the pixels, mean and largest score."""
        rows = []
        for name, share in list(self.shares.items())[:top]:
            score = self.scores[self.names.index(name)]
            row = {"key": self.key, "name": name, "share": round(share, 6), "mean": round(float(score.mean()), 6)}
            rows.append(row | {"largest": round(float(score.max()), 6)})
        return rows

    def overlay(self, image: Any, legend: bool = True) -> Image.Image:
        """Draw the mask over its image, with a legend of the names found below; background stays uncoloured.

        Parameters
        ----------
        image : PIL image, path, bytes or array, of the size that was segmented
        legend : whether to name the colours
        """
        from ..data.decode import decode_pixels

        pixels = decode_pixels(image)
        if pixels.shape[:2] != self.labels.shape:
            raise ClipworksError(f"image must have the mask's size {self.labels.shape}. Got {pixels.shape[:2]}.")
        colors = palette(len(self.names), self._first)
        drawn = (1 - INK) * pixels + INK * colors[self.labels]
        drawn = np.where((self.labels < self._first)[..., None], pixels, drawn).round().astype(np.uint8)
        edge = np.zeros(self.labels.shape, bool)
        edge[:-1] |= self.labels[:-1] != self.labels[1:]
        edge[:, :-1] |= self.labels[:, :-1] != self.labels[:, 1:]
        drawn[edge] = 255
        page = Image.fromarray(drawn)
        return self._with_legend(page, colors) if legend else page

    def save(self, path: str | Path) -> Path:
        """Write .png (indexed colours, a pixel's value is its index), .npz (all fields) or .json (COCO's code).

        Raises
        ------
        ClipworksError
            For another ending, or a .png of more than 256 names.
        """
        path = Path(path)
        check_choice("the ending of a mask", path.suffix.lower(), SUFFIXES)
        if path.suffix.lower() == ".png":
            check_range("names of a .png", len(self.names), 1, 256)
            page = Image.fromarray(self.labels.astype(np.uint8), "P")
            page.putpalette(palette(len(self.names), self._first).astype(np.uint8).tobytes())
            page.save(path)
        elif path.suffix.lower() == ".npz":
            with path.open("wb") as file:
                np.savez_compressed(file, labels=self.labels, scores=self.scores.astype(np.float16),
                                    names=np.array(self.names), key=np.array(self.key))  # fmt: skip
        else:
            path.write_text(json.dumps(self.as_coco(), ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read what `save` wrote as .npz."""
        with np.load(path, allow_pickle=False) as file:
            scores = file["scores"].astype(np.float32)
            return cls(file["labels"], file["names"].tolist(), scores, str(file["key"]))

    def as_coco(self) -> list[dict[str, Any]]:
        """One dictionary per name found, background aside: name, area in pixels, box x y width height, segmentation."""
        from .rle import encode

        found = []
        for name in self.names[self._first :]:
            mask = self.of(name)
            if mask.any():
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
                entry = {"name": name, "area": int(mask.sum()), "bbox": [int(v) for v in box]}
                found.append({"key": self.key, **entry, "segmentation": encode(mask)})
        return found

    @property
    def _first(self) -> int:
        """Index of the first name that is no background."""
        return int(bool(self.names) and self.names[0] == BACKGROUND)

    def _with_legend(self, page: Image.Image, colors: np.ndarray) -> Image.Image:
        from ..plot.sheet import INK as TEXT
        from ..plot.sheet import PAPER, _font

        names = [name for name in self.shares if name != BACKGROUND or not self._first]
        size = max(12, min(20, page.width // 32))
        font, places, x, y = _font(size), [], size // 2, size // 2
        for name in names:
            width = 2 * size + font.getlength(name)
            if x + width > page.width and x > size:
                x, y = size // 2, y + 3 * size // 2
            places.append((name, x, y))
            x += int(width) + size // 2
        below = y + 2 * size if names else 0
        made = Image.new("RGB", (page.width, page.height + below), PAPER)
        made.paste(page, (0, 0))
        draw = ImageDraw.Draw(made)
        for name, left, top in places:
            top += page.height
            fill = tuple(int(c) for c in colors[self.names.index(name)])
            draw.rectangle((left, top + size // 8, left + size, top + size // 8 + size), fill=fill)
            draw.text((left + 4 * size // 3, top), name, font=font, fill=TEXT)
        return made


def palette(count: int, first: int = 0) -> np.ndarray:
    """Colours (count, 3) that differ well between neighbours in the list; the `first` ones are black.

    Hues turn by the golden angle, brightness alternates.
    """
    colors = [colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.85, 0.6, 1)[i % 3], (0.95, 1, 0.7)[i % 3]) for i in range(count)]
    return 255 * np.array([(0, 0, 0)] * first + colors)[:count]
