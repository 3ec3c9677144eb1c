"""Vectors of boxes, and which name a box bears: cut out, pooled from a dense map, or asked of a trained prompter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..data.decode import decode_pixels
from ..encoders.preprocess import _resize
from ..errors import ClipworksError
from ..zeroshot.classifier import class_vectors
from .common import Dense, enter

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


class Reader(Protocol):
    """Anything that gives vectors of boxes, such as a trained `pretraining.cloc.Prompter`."""

    def regions(self, encoder: Any, pixels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Preprocessed pixels (B, 3, H, W) and boxes (B, M, 4), shares of width and height, to rows (B, M, dim)."""
        ...


def roi_align(maps: torch.Tensor, boxes: torch.Tensor, size: int = 1) -> torch.Tensor:
    """Mean of a map over boxes, or over `size` x `size` parts of each, by bilinear samples (RoIAlign, aligned).

    Each part is sampled at the middle of equal pieces no larger than a cell, so a box on cell borders gives the plain
    mean of the cells that it covers. Bilinear interpolation and the mean act on rows and columns apart: two small
    matrices per box, differentiable in the map and in the boxes.

    Parameters
    ----------
    maps : (B, h, w, channels)
    boxes : (B, M, 4), left, top, right, bottom, shares of width and height
    size : parts per side

    Returns
    -------
    (B, M, size, size, channels), rows from top to bottom

    References
    ----------
    He et al. 2017, Mask R-CNN (ICCV)

    Examples
    --------
    >>> maps = torch.arange(16.0).reshape(1, 4, 4, 1)
    >>> roi_align(maps, torch.tensor([[[0.0, 0.0, 0.5, 0.5]]])).flatten()  # the mean of 0, 1, 4 and 5
    tensor([2.5000])
    """
    if maps.ndim != 4 or boxes.ndim != 3 or boxes.shape[0] != len(maps) or boxes.shape[2] != 4:
        raise ClipworksError(f"maps (B, h, w, channels) and boxes (B, M, 4) must agree. Got {tuple(maps.shape)}, "
                             f"{tuple(boxes.shape)}.")  # fmt: skip
    down = _samples(boxes[..., 1], boxes[..., 3], maps.shape[1], size).to(maps.dtype)
    across = _samples(boxes[..., 0], boxes[..., 2], maps.shape[2], size).to(maps.dtype)
    return torch.einsum("bmiy,byxc,bmjx->bmijc", down, maps, across)


def _samples(low: torch.Tensor, high: torch.Tensor, cells: int, size: int) -> torch.Tensor:
    """Matrices (B, M, size, cells) of one axis: how much each cell counts in each part."""
    part = (high - low) * cells / size
    pieces = (part.detach() - 1e-4).ceil().clamp(min=1)  # a part of 3.00001 cells has three
    number = torch.arange(int(pieces.max()) if pieces.numel() else 1, device=low.device)
    shift = (number + 0.5) / pieces[..., None]  # within a part
    parts = torch.arange(size, device=low.device)[:, None]
    at = low[..., None, None] * cells + part[..., None, None] * (parts + shift[..., None, :]) - 0.5
    at = at.clamp(0, cells - 1)
    near = (1 - (at[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)
    used = (number < pieces[..., None])[..., None, :, None]
    return (near * used).sum(-2) / pieces[..., None, None]


def region_rows(
    image: Any,
    boxes: Any,
    encoder: Encoder,
    *,
    reader: str | Dense | Reader = "crop",
    side: int | None = None,
    batch_size: int = 32,
) -> torch.Tensor:
    """Encode boxes of an image.

    Parameters
    ----------
    image : path, bytes, PIL image or uint8 array (H, W, 3)
    boxes : (M, 4), left, top, right, bottom, shares of width and height (`data.regions.from_pixels` makes them)
    encoder : the encoder
    reader : "crop" (each box cut out and encoded), a dense method by name or with settings (its map is pooled over the
        box), or a trained reader such as CLOC's prompter
    side : side in pixels to which the whole image is brought for a dense map (default: twice the encoder's image size)
    batch_size : boxes cut out per pass

    Returns
    -------
    float32 (M, dim), rows of length 1, on the CPU

    Raises
    ------
    BadImage, ClipworksError
        If the image cannot be used, or a box is none.
    """
    pixels = decode_pixels(image)
    places = torch.as_tensor(np.asarray(boxes, dtype=np.float32)).reshape(-1, 4)
    low, high = places[:, :2], places[:, 2:]
    if not bool(((low >= 0) & (low < high) & (high <= 1 + 1e-6)).all()):
        raise ClipworksError("boxes must be [left, top, right, bottom] in shares of width and height, with 0 <= left < "
                             f"right <= 1. Got {places.tolist()[:3]}.")  # fmt: skip
    if not len(places):
        return torch.zeros(0, encoder.dim)
    with encoder._inference():
        rows = _read(pixels, places, encoder, reader, side, batch_size)
    return F.normalize(rows.float(), dim=-1).cpu().clone()


def _read(
    pixels: np.ndarray, boxes: torch.Tensor, encoder: Any, reader: Any, side: int | None, batch_size: int
) -> torch.Tensor:
    size, preprocess = encoder.image_size, encoder.preprocess
    if isinstance(reader, str) and reader == "crop":
        image = Image.fromarray(pixels)
        scaled = (boxes * torch.tensor([image.width, image.height] * 2)).clamp(min=0).tolist()
        cut = [image.resize((size, size), Image.Resampling.BICUBIC, box=_inside(box, image)) for box in scaled]
        views = torch.stack([preprocess.normalize(np.asarray(view)) for view in cut])
        return torch.cat([encoder.encode_image(part.to(encoder.device)) for part in views.split(batch_size)])
    if hasattr(reader, "regions"):
        whole = preprocess.normalize(_resize(pixels, size, size, "bicubic"))[None].to(encoder.device, encoder.dtype)
        return reader.regions(encoder, whole, boxes[None].to(encoder.device))[0]
    from .segmenter import dense_method

    method, side = dense_method(reader), side or 2 * size
    whole = torch.from_numpy(_resize(pixels, side, side, "bicubic")).permute(2, 0, 1)[None] / 255
    hidden = enter(encoder, whole, blocks=method.blocks, sides=method.sides)
    return roi_align(method.features(hidden), boxes[None].to(encoder.device))[0, :, 0, 0]


def _inside(box: Sequence[float], image: Image.Image) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    return left, top, min(right, image.width), min(bottom, image.height)


def classify_regions(
    image: Any,
    boxes: Any,
    names: Sequence[str],
    encoder: Encoder,
    *,
    reader: str | Dense | Reader = "crop",
    templates: str | Sequence[str] = "default",
    side: int | None = None,
) -> torch.Tensor:
    """Give every box probabilities of the names; a box is taken as true, nothing is detected.

    Parameters
    ----------
    image, boxes, encoder, reader, side : as for `region_rows`
    names : class names
    templates : sentences for the names, as for `classify`

    Returns
    -------
    float32 (M, K), rows sum to 1

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> image, boxes = np.zeros((20, 30, 3), np.uint8), [[0.0, 0.0, 0.5, 1.0]]
    >>> toy = toy_encoder(tokenizer=CLIPTokenizer())
    >>> classify_regions(image, boxes, ["cat", "dog"], toy, reader="maskclip").shape
    torch.Size([1, 2])
    """
    words = class_vectors(names, encoder, templates=templates)
    rows = region_rows(image, boxes, encoder, reader=reader, side=side)
    return (encoder.logit_scale * rows @ words.T).softmax(-1)
