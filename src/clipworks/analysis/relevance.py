"""`Relevance`: the result of an explanation, and what the ways of explaining share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import ClipworksError, check_choice

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".npz")
FOR, AGAINST = np.array([215, 30, 30], np.float32), np.array([30, 80, 215], np.float32)  # red, blue


@dataclass
class Relevance:
    """What in an image a text speaks of.

    Attributes
    ----------
    key : name of the image
    text : the text
    heat : array (H, W) in the image's own pixels; above 0 speaks for the text, below 0 against it
    similarity : cosine of image and text
    method : the way it was found
    picture : the image as it was given, for drawing
    """

    key: str
    text: str
    heat: np.ndarray
    similarity: float
    method: str
    picture: Any = None

    def draw(self, strength: float = 0.75) -> Image.Image:
        """The image, red where it speaks for the text and blue where it speaks against it."""
        from ..data.decode import decode

        height, width = self.heat.shape
        image = Image.new("RGB", (width, height), "#808080") if self.picture is None else decode(self.picture)
        grey = np.asarray(image.convert("L").convert("RGB"), np.float32)
        level = self.heat / max(float(np.abs(self.heat).max()), 1e-12)
        opacity = strength * np.abs(level)[..., None]
        colour = np.where(level[..., None] > 0, FOR, AGAINST)
        return Image.fromarray(np.uint8((1 - opacity) * grey + opacity * colour + 0.5))

    def save(self, path: str | Path) -> Path:
        """Write the picture (.png, .jpg, .webp) or the array (.npz), and return the path."""
        path = Path(path)
        check_choice("the ending of a relevance map", path.suffix.lower(), SUFFIXES)
        if path.suffix.lower() == ".npz":
            np.savez_compressed(path, heat=self.heat, similarity=self.similarity)
        else:
            self.draw().save(path, quality=92)
        return path


def check_pairs(pixels: torch.Tensor, words: torch.Tensor, encoder: Any) -> torch.Tensor:
    """Return the unit vectors of the texts (n, dim), one per image, or raise where they do not fit the images."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
        raise ClipworksError(f"pixels must have the shape (n, 3, H, W), n at least 1. Got {tuple(pixels.shape)}.")
    if words.shape != (len(pixels), encoder.dim):
        raise ClipworksError(
            f"words must have one vector per image, {(len(pixels), encoder.dim)}. Got {tuple(words.shape)}."
        )
    if not bool(torch.isfinite(pixels).all() and torch.isfinite(words).all()):
        raise ClipworksError("pixels and words must be finite. Got NaN or infinity.")
    return F.normalize(words.float(), dim=1).to(encoder.device)


def transformer(encoder: Any) -> Any:
    """The image tower, or raise where it has no attention between tokens."""
    if not hasattr(encoder.visual, "blocks"):
        raise ClipworksError("encoder must have an image transformer for attention to be followed; use 'occlusion'.")
    return encoder.visual


def readout(flow: torch.Tensor, output: Any, pool: torch.Tensor | None) -> torch.Tensor:
    """Relevance (n, h, w) of the patches to what is pooled, from that of every token to every token (n, N, N).

    Read in the row of a class token, in the rows that an attention pool looks at (`pool`, (n, N)), or in their mean.
    """
    if pool is not None:
        row = torch.einsum("bn,bnm->bm", pool, flow)
    elif output.class_token:
        row = flow[:, 0]
    else:
        row = flow[:, output.prefix :].mean(1)
    return row[:, output.prefix :].unflatten(1, output.grid)
