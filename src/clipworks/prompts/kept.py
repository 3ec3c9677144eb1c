"""`Kept`: what a method needs of images, computed once, and the many forms in which images are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.item import Item, as_items
from ..data.loader import load_batches
from ..encoders.precision import exact_convolutions
from ..errors import ClipworksError
from ..training.augment import Augment, view
from ..types import Features

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

BATCH = 32


@dataclass
class Kept:
    """What is kept of n images in V views.

    Attributes
    ----------
    tensors : by name, each (n, V, ...), on the CPU
    keeps : "features", "stem" or what a method calls its own
    fingerprint : of the encoder that looked
    """

    tensors: dict[str, torch.Tensor]
    keeps: str
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def views(self) -> int:
        return next(iter(self.tensors.values())).shape[1]

    def take(self, rows: np.ndarray, views: np.ndarray, device: Any) -> dict[str, torch.Tensor]:
        """One view of each of some images, {name: (len(rows), ...)}."""
        index, number = torch.from_numpy(rows), torch.from_numpy(views)
        return {name: value[index, number].to(device) for name, value in self.tensors.items()}


Look = Callable[..., dict[str, torch.Tensor]]


def keep_images(
    images: Any, encoder: Encoder, look: Look, keeps: str, views: int, seed: int, crops: Augment
) -> Kept:
    """Bring images in any form to what a method keeps of them.

    Parameters
    ----------
    images : `Kept`, `Features`, vectors, pixels, or one or many images
    encoder : that looks at them
    look : from (encoder, pixels) to named tensors, one row per image
    keeps : what the method needs
    views : per image; the first is the image itself, the others are random crops, mirrored or not
    seed : of the crops; the same image gives the same crops alone and among others
    crops : how they are drawn; of pixels only size, place and mirroring
    """
    if isinstance(images, Kept):
        if images.keeps != keeps or images.fingerprint != encoder.fingerprint:
            raise ClipworksError(
                f"images must have been kept as {keeps} by the encoder {encoder.fingerprint[:12]}. "
                f"Got {images.keeps} of {images.fingerprint[:12]}."
            )
        return images
    vectors = _vectors(images)
    if vectors is not None:
        return _given_vectors(images, vectors, encoder, keeps)
    parts: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad(), exact_convolutions(encoder.device):
        for number in range(views):
            found: dict[str, list[torch.Tensor]] = {}
            for pixels in _pixels(images, encoder, number, seed, crops):
                for name, value in look(encoder, pixels.to(encoder.device)).items():
                    found.setdefault(name, []).append(value.detach().cpu())
            for name, pieces in found.items():
                parts.setdefault(name, []).append(torch.cat(pieces))
    if not parts:
        raise ClipworksError("images must hold at least one image. Got none.")
    return Kept({name: torch.stack(pieces, 1) for name, pieces in parts.items()}, keeps, encoder.fingerprint)


def _vectors(images: Any) -> torch.Tensor | None:
    """The vectors (n, dim) or (n, V, dim), if that is what is given."""
    if isinstance(images, Features):
        return torch.from_numpy(np.array(images.vectors, np.float32))
    real = isinstance(images, torch.Tensor) and images.is_floating_point()
    if real or (isinstance(images, np.ndarray) and images.dtype.kind == "f"):
        found = torch.as_tensor(images).detach()
        return found if found.ndim in (2, 3) else None
    return None


def _given_vectors(images: Any, vectors: torch.Tensor, encoder: Encoder, keeps: str) -> Kept:
    if keeps != "features":
        raise ClipworksError(
            "images must be images or pixels (n, 3, H, W): this method reaches into the image tower. "
            f"Got vectors of shape {tuple(vectors.shape)}."
        )
    if isinstance(images, Features) and images.fingerprint not in ("", encoder.fingerprint):
        raise ClipworksError(
            f"images must be features of this encoder, {encoder.fingerprint[:12]}. Got {images.fingerprint[:12]}."
        )
    if vectors.shape[-1] != encoder.dim or not vectors.numel() or not bool(torch.isfinite(vectors).all()):
        raise ClipworksError(
            f"images given as vectors must be finite and of shape (n, {encoder.dim}) or (n, views, {encoder.dim}). "
            f"Got shape {tuple(vectors.shape)}."
        )
    unit = F.normalize(vectors if vectors.dtype == torch.float64 else vectors.float(), dim=-1)
    return Kept({"image": unit if unit.ndim == 3 else unit[:, None]}, keeps, encoder.fingerprint)


def _pixels(images: Any, encoder: Encoder, number: int, seed: int, crops: Augment) -> Iterator[torch.Tensor]:
    """Pixels of one view of all images, in batches."""
    if isinstance(images, torch.Tensor | np.ndarray) and torch.as_tensor(images).is_floating_point():
        pixels = torch.as_tensor(images).detach()
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not bool(torch.isfinite(pixels).all()):
            raise ClipworksError(
                f"images given as pixels must be finite and of shape (n, 3, H, W). Got shape {tuple(pixels.shape)}."
            )
        for batch in pixels.split(BATCH) if len(pixels) else ():
            yield batch if number == 0 else crop(batch, crops, np.random.default_rng([seed, number]))
        return
    items = as_items(images)

    def prepare(image: Any, key: str) -> torch.Tensor:
        rng = np.random.default_rng([seed, number])
        return view(Item(key, image), encoder.preprocess, crops if number else None, rng)

    for loaded in load_batches(items, prepare, BATCH):
        yield loaded.pixels


def crop(pixels: torch.Tensor, crops: Augment, rng: np.random.Generator) -> torch.Tensor:
    """The same random crop of all of a batch (n, 3, H, W), brought back to its size, mirrored or not."""
    height, width = pixels.shape[-2:]
    left, top, right, bottom = crops.box(width, height, rng)
    part = pixels[..., top:bottom, left:right]
    made = F.interpolate(part, (height, width), mode="bicubic", antialias=True)
    return made.flip(-1) if rng.random() < crops.flip else made
