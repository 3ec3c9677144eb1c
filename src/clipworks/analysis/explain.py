"""`explain`: which parts of an image a text speaks of to the model, and how far such an explanation can be trusted.

Three published ways, each a method of its own; deletion and insertion scores say which of them is right about a given
image: they blank out, or bring back, the most relevant places first and watch the similarity.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_choice, check_range
from .relevance import SUFFIXES, Relevance

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

METHODS = ("occlusion", "gradient_attention", "attention_rollout")


@dataclass
class Faithfulness:
    """How the similarity changes while an image is taken away or brought back, the most relevant places first.

    Attributes
    ----------
    deletion : area under the curve of deletion, in shares of the whole image's similarity: lower is better
    insertion : the same of insertion: higher is better
    deleted, inserted : the two curves; the first values are those of the whole and of the blurred image
    """

    deletion: float
    insertion: float
    deleted: np.ndarray
    inserted: np.ndarray


def explain(
    image: Any,
    text: str,
    *,
    method: str = "occlusion",
    encoder: str | Encoder | None = None,
    image_size: int | None = None,
    out: str | Path | None = None,
) -> Relevance:
    """Show what in an image a text speaks of, to the model.

    Parameters
    ----------
    image : path, encoded bytes, PIL image or uint8 array (H, W, 3)
    text : any sentence
    method : "occlusion" (any tower), "gradient_attention" or "attention_rollout" (transformers)
    encoder : a model's name, a path or an encoder (default: the bundled one)
    image_size : side in pixels to which the image is squeezed (default: the encoder's)
    out : file for the picture (.png, .jpg, .webp) or the array (.npz)

    Returns
    -------
    Relevance
    """
    from ..anomaly.common import views
    from ..encoders.loading import resolve
    from ..plot.sheet import check_place
    from ..registry import get_method

    check_choice("method", method, METHODS)
    if not isinstance(text, str) or not text.strip():
        raise ClipworksError(f"text must be words. Got {text!r}.")
    place = None if out is None else check_place(out, "out", SUFFIXES)
    model: Any = resolve(encoder)
    words = model.texts([text])
    batch = next(views(image, model, _side(model, image_size), batch_size=2))
    if len(batch.keys) != 1:
        raise ClipworksError(f"image must be one image. Got {image!r:.80}, which holds several.")
    heat = get_method(f"analysis/explain_{method}")(model, batch.pixels, words)[0]
    width, height = batch.sizes[0]
    large = F.interpolate(heat[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
    with torch.no_grad():
        similarity = float(model.encode_image(batch.pixels).float() @ words[0].to(model.device))
    found = Relevance(batch.keys[0], text, large.numpy(), similarity, method, batch.pictures[0])
    if place is not None:
        found.save(place)
    return found


def _side(encoder: Any, image_size: int | None) -> int:
    return int(encoder.image_size if image_size is None else check_range("image_size", image_size, 1))


def faithfulness(
    encoder: Any, pixels: torch.Tensor, words: torch.Tensor, heat: torch.Tensor, *, steps: int = 16
) -> Faithfulness:
    """Deletion and insertion (Petsiuk et al. 2018, RISE), of cells of a map in the order of their relevance.

    Parameters
    ----------
    encoder : an `Encoder`
    pixels : one image (3, H, W), preprocessed
    words : vector of the text (dim,)
    heat : relevance (h, w) of cells
    steps : images per curve; each takes or brings the next 1 / steps of the cells

    Notes
    -----
    What is taken away becomes the image's blurred copy, in deletion as in insertion: grey would be an edge to see. The
    curves are divided by the whole image's similarity less the blurred one's where that is positive.
    """
    check_range("steps", steps, 1, heat.numel())
    if pixels.ndim != 3 or heat.ndim != 2:
        raise ClipworksError("pixels must be one image (3, H, W) and heat its map (h, w). "
                             f"Got {tuple(pixels.shape)} and {tuple(heat.shape)}.")  # fmt: skip
    blurred = blur(pixels[None])[0]
    order = heat.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    share = (rank.float() / len(order)).view(1, 1, *heat.shape)
    place = F.interpolate(share, pixels.shape[1:], mode="nearest")[0]
    marks = torch.linspace(0, 1, steps + 1)
    taken = torch.stack([torch.where(place < m, blurred, pixels) for m in marks])
    brought = torch.stack([torch.where(place < m, pixels, blurred) for m in marks])
    with torch.no_grad():
        word = F.normalize(words, dim=-1).to(encoder.device)
        deleted, inserted = ((encoder.encode_image(x).float() @ word).cpu().double().numpy() for x in (taken, brought))
    low, span = float(inserted[0]), float(deleted[0] - inserted[0])
    deleted, inserted = ((curve - low) / (span if span > 1e-6 else 1.0) for curve in (deleted, inserted))
    deletion, insertion = (float(np.mean((curve[1:] + curve[:-1]) / 2)) for curve in (deleted, inserted))
    return Faithfulness(deletion, insertion, deleted, inserted)


def trust_of(
    found: Relevance, encoder: str | Encoder | None = None, image_size: int | None = None, *, steps: int = 16
) -> Faithfulness:
    """Deletion and insertion of an explanation that `explain` gave; arguments as there and as for `faithfulness`."""
    from ..anomaly.common import views
    from ..encoders.loading import resolve

    model: Any = resolve(encoder)
    (batch,) = views(found.picture, model, _side(model, image_size))
    heat = F.adaptive_avg_pool2d(torch.from_numpy(found.heat)[None, None], 8)[0, 0]
    return faithfulness(model, batch.pixels[0], model.texts([found.text])[0], heat, steps=steps)


def blur(pixels: torch.Tensor, share: float = 1 / 8) -> torch.Tensor:
    """Images (n, 3, H, W) averaged twice over squares of a share of their side: shapes go, colours stay."""
    side = max(3, int(pixels.shape[-1] * share) // 2 * 2 + 1)
    for _ in range(2):
        pixels = F.avg_pool2d(pixels, side, 1, side // 2, count_include_pad=False)
    return pixels
