"""What the detectors share: images as squares, features of patches, memories of bounded size, smooth maps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from ..encoders.layers import layer_index
from ..errors import BadImage, ClipworksError, check_range
from ..metrics.conformal import conformal_quantile

SAME = 1e-3  # unit rows closer than this are equal up to float32's rounding
SMOOTHING = 4 / 224  # standard deviation of the smoothing as a share of the image's side: 4 pixels of 224


@dataclasses.dataclass
class Views:
    """Some images on their way into a detector.

    Attributes
    ----------
    keys : their names
    pixels : (n, 3, side, side)
    sizes : width and height of every image as it was
    pictures : the images as they were given; None for tensors of pixels
    errors : images that could not be used
    """

    keys: list[str]
    pixels: torch.Tensor
    sizes: list[tuple[int, int]]
    pictures: list[Any]
    errors: list[BadImage] = dataclasses.field(default_factory=list)


def views(images: Any, encoder: Any, side: int, batch_size: int = 16, on_error: str = "raise") -> Iterator[Views]:
    """Yield images in batches, squeezed whole into squares: nothing at the edges is cropped away.

    Parameters
    ----------
    images : one image or many as `Encoder.images` takes them, anything `open_source` opens (folder, list, table ...),
        or float pixels (n, 3, H, W), preprocessed
    encoder : its preprocessing says how pixels are normalised
    side : of the squares, in pixels
    batch_size : images per batch
    on_error : "raise" at the first image that cannot be used, or "report" it
    """
    check_range("batch_size", batch_size, 1)
    if isinstance(images, torch.Tensor) or (isinstance(images, np.ndarray) and images.dtype.kind == "f"):
        yield from _pixels(torch.as_tensor(images), side, batch_size)
        return
    from ..data.decode import decode
    from ..data.loader import load_batches
    from ..encoders.preprocess import Preprocess

    config = dataclasses.replace(encoder.config.preprocess, size=side, resize="squash", crop="none")
    prepare, sizes = Preprocess(config), {}

    def square(image: Any, key: str) -> torch.Tensor:
        picture = decode(image, key=key)
        sizes[key] = picture.size
        return prepare(picture, key)

    for batch in load_batches(_items(images), square, batch_size, on_error=on_error):
        shapes = [sizes.pop(key) for key in batch.keys]
        yield Views(batch.keys, batch.pixels, shapes, [item.image for item in batch.items], batch.errors)


def _pixels(pixels: torch.Tensor, side: int, batch_size: int) -> Iterator[Views]:
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ClipworksError(f"pixels must have the shape (n, 3, H, W). Got {tuple(pixels.shape)}.")
    pixels = pixels.float()
    if not bool(torch.isfinite(pixels).all()):
        raise ClipworksError("pixels must be finite. Got NaN or infinity.")
    size = (pixels.shape[3], pixels.shape[2])
    for start in range(0, len(pixels), batch_size):
        part = pixels[start : start + batch_size]
        if size != (side, side):
            part = F.interpolate(part, (side, side), mode="bicubic", antialias=True)
        yield Views([str(start + i) for i in range(len(part))], part, [size] * len(part), [None] * len(part))


def _items(images: Any) -> Iterable[Any]:
    """Items of one image in memory, a list of images, or a source."""
    from PIL import Image

    from ..data.item import Item
    from ..data.sources import open_source

    if isinstance(images, Image.Image | bytes):
        images = [images]
    if isinstance(images, np.ndarray):
        images = list(images) if images.ndim == 4 else [images]
    if isinstance(images, list | tuple) and any(isinstance(i, Image.Image | bytes | np.ndarray) for i in images):
        return [Item(str(i), image) for i, image in enumerate(images)]
    return open_source(images)


def grids(encoder: Any, pixels: torch.Tensor, layers: Sequence[int | str] | None = None) -> list[torch.Tensor]:
    """Feature maps (n, channels, h, w) of an image tower, finest first.

    Parameters
    ----------
    encoder : an `Encoder`
    pixels : (n, 3, side, side)
    layers : blocks (or stages of a ResNet) by number, or maps of a convolutional stem by the side of their cells, such
        as "stem8"; None takes the middle of the tower: stem maps of 8 and 16 pixels, stages 1 and 2 of a ResNet, blocks
        at half and three quarters of the depth of a plain transformer
    """
    tower = encoder.visual
    chosen = default_layers(tower) if layers is None else list(layers)
    stem = [int(name[4:]) for name in chosen if isinstance(name, str) and name[:4] == "stem" and name[4:].isdigit()]
    depth = 4 if tower.config.kind == "resnet" else tower.config.depth
    blocks = [layer_index("layers", name, depth) for name in chosen if isinstance(name, int)]
    if not chosen or len(stem) + len(blocks) < len(chosen):
        raise ClipworksError(f"layers must hold numbers of blocks, or names such as 'stem8'. Got {layers!r}.")
    seams: dict[str, Any] = {"output_stem": stem} if stem else {}
    output = tower.run(pixels.to(encoder.device, encoder.dtype), output_layers=blocks, **seams)
    maps = [output.stem[side] for side in stem]
    for number in blocks:
        x = output.layers[number]
        if x.ndim == 3:
            x = x[:, output.prefix :].transpose(1, 2).unflatten(2, output.grid)
        maps.append(x)
    return sorted((m.float() for m in maps), key=lambda m: -m.shape[2])


def default_layers(tower: Any) -> list[int | str]:
    """The layers of medium depth: neither edges and colours nor what the image shows as a whole."""
    if hasattr(getattr(tower, "stem", None), "maps"):
        return ["stem8", "stem16"]
    if tower.config.kind == "resnet":
        return [1, 2]
    depth = tower.config.depth
    return sorted({(depth - 1) // 2, (3 * depth - 1) // 4})


def stacked(maps: Sequence[torch.Tensor], neighbourhood: int = 3) -> torch.Tensor:
    """Maps averaged over neighbours, brought to the finest grid, every one of unit length, side by side: unit rows.

    Parameters
    ----------
    maps : (n, channels, h, w) each, finest first
    neighbourhood : side of the square that is averaged around every cell, odd

    Returns
    -------
    (n, h, w, channels of all)
    """
    side = maps[0].shape[-2:]
    parts = []
    for x in maps:
        x = F.avg_pool2d(x, neighbourhood, 1, neighbourhood // 2, count_include_pad=False)
        if x.shape[-2:] != side:
            x = F.interpolate(x, side, mode="bilinear", align_corners=False)
        parts.append(F.normalize(x, dim=1))
    return (torch.cat(parts, 1) / math.sqrt(len(parts))).permute(0, 2, 3, 1)


class CoreSet:
    """Rows that represent a stream of rows, never more than `limit` of them.

    After the doubling algorithm (Charikar et al. 1997, Incremental Clustering and Dynamic Information Retrieval): a row
    enters if it is farther than `radius` from all that are kept; when there are too many, the radius grows and the kept
    ones are thinned out. Where the paper doubles the radius, it grows here until about `FILLED` of the room is used: in
    many dimensions distances are nearly equal, and twice the radius would leave a handful.

    Parameters
    ----------
    limit : most rows that are kept

    Attributes
    ----------
    rows : the kept rows (n, dim), farther than `radius` apart
    reach : every row ever seen is within it of a kept one: the sum of the radii of all thinnings
    """

    FILLED = 0.75

    def __init__(self, limit: int):
        self.limit = int(check_range("limit", limit, 1))
        self.radius = self.reach = 0.0
        self.rows: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Show it unit rows (m, dim)."""
        for part in rows.split(max(self.limit, 256)):
            if self.rows is not None:
                part = part[distances(part, self.rows, squared=False) > max(self.radius, SAME)]
            if self.radius > 0:
                part = part[thinned(part @ part.T, self.radius)]
            self.rows = part if self.rows is None else torch.cat([self.rows, part])
            if len(self.rows) > self.limit:
                self.rows = self._thin(self.rows)

    def _thin(self, rows: torch.Tensor) -> torch.Tensor:
        """Find the smallest radius, to a hundredth of its range, that leaves `FILLED` of the limit, and apply it."""
        cosines = rows @ rows.T
        low, high = self.radius, 2.0  # all unit rows are within 2 of each other
        kept = thinned(cosines, high)
        for _ in range(12):
            middle = (low + high) / 2
            found = thinned(cosines, middle)
            if len(found) > max(1, self.FILLED * self.limit):
                low = middle
            else:
                high, kept = middle, found
        self.radius = high
        self.reach += high
        return rows[kept]


def thinned(cosines: torch.Tensor, radius: float) -> torch.Tensor:
    """Numbers of unit rows, first come first kept, that are farther than `radius` apart, from their cosines (n, n)."""
    close = (cosines >= 1 - radius**2 / 2).numpy()
    gone = np.zeros(len(close), bool)
    kept = []
    for number, near in enumerate(close):
        if not gone[number]:
            kept.append(number)
            gone |= near
    return torch.tensor(kept, dtype=torch.long)


def distances(queries: torch.Tensor, memory: torch.Tensor, squared: bool = True, chunk: int = 4096) -> torch.Tensor:
    """Distance (n,) of unit rows to the nearest of a memory's: half the squared one, 1 - cosine, or the plain one."""
    parts = [(q @ memory.T).amax(1) for q in queries.split(chunk)] or [queries.new_empty(0)]
    found = (1 - torch.cat(parts)).clamp(min=0)
    return found if squared else (2 * found).sqrt()


class Memory:
    """Features of good images, a core set per fold, so that an image can be judged by those of the other folds.

    Parameters
    ----------
    limit : most rows over all folds
    folds : into how many parts the images are dealt out
    """

    def __init__(self, limit: int, folds: int):
        check_range("limit", limit, folds)
        self.parts = [CoreSet(limit // folds) for _ in range(folds)]

    def add(self, rows: torch.Tensor, fold: int) -> None:
        self.parts[fold].add(rows)

    def rows(self, without: int | None = None) -> torch.Tensor:
        """All kept rows, or those that did not come from a fold."""
        return torch.cat([p.rows for i, p in enumerate(self.parts) if p.rows is not None and i != without])

    def distances(self, queries: torch.Tensor, without: int | None = None) -> torch.Tensor:
        """1 - cosine (...) of unit rows (..., dim) to the nearest kept one."""
        return distances(queries.reshape(-1, queries.shape[-1]), self.rows(without)).view(queries.shape[:-1])


def smooth(maps: torch.Tensor, side: int, sigma: float = SMOOTHING) -> np.ndarray:
    """Bring maps (n, h, w) to side x side (bilinear) and smooth them by a Gaussian of sigma * side pixels."""
    large = F.interpolate(maps[:, None].float(), (side, side), mode="bilinear", align_corners=False)[:, 0].numpy()
    return ndimage.gaussian_filter(large, (0, sigma * side, sigma * side), mode="nearest") if sigma else large


def quantile(scores: np.ndarray, rate: float) -> float:
    """The score that at most `rate` of further images like these exceed, on average; the largest if they are few.

    >>> quantile(np.arange(99.0), 0.05)
    94.0
    """
    return min(conformal_quantile(scores, rate), float(np.max(scores)))
