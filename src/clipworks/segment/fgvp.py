"""Fine-grained visual prompting: which of some regions an expression means, by drawing each of them on the picture.

Claim: CLIP follows what is drawn on a picture, and blurring all that lies outside a precise mask points best: 52.0 /
53.3 / 62.1 % of RefCOCO / + / g with crop and reverse blur, where a red circle gives 43.9 / 45.3 / 57.3 and crop and
blurred box 45.8 / 47.9 / 59.3 (ViT-B/32 + RN50x16, relations read, boxes of a detector, SAM's masks).

Formula: I_n = m_n I + (1 - m_n) G_sigma(I) and other drawings of region n;  l_n = sum over encoders and drawings of
exp(scale) cos(v(I_n), t);  with a bank of negative expressions  l_n <- l_n - mean_c l_n(c);  the answer is argmax l_n.

Paper: Yang et al. 2023, Fine-Grained Visual Prompting (NeurIPS).
Differs from the paper: lines are drawn inside the region; the blur is the exact integral of a Gaussian and not cut off;
a picture is brought to a square before it is encoded, so that no region is cropped away; relations between several
nouns (left of, bigger than) are not read. Masks and boxes are given; `segment.proposals` makes masks with a SAM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.decode import decode_pixels
from ..encoders.preprocess import _resize
from ..errors import ClipworksError, check_choice, check_range
from ..registry import method
from ..zeroshot.classifier import class_vectors
from ..zeroshot.sentences import as_vectors, softmax
from .visual_prompts import PROMPTS, STYLE, Style, box_region, gaussian_blur, outline, visual_prompt

if TYPE_CHECKING:
    from PIL import Image

    from ..encoders.encoder import Encoder

FITS = ("squash", "pad", "crop")


@dataclass
class Referral:
    """What an expression means among some regions.

    Attributes
    ----------
    expression : in words
    scores : float64 (N,), the logits of the regions as they were given
    boxes : float64 (N, 4), left, top, right, bottom in pixels
    """

    expression: str
    scores: np.ndarray
    boxes: np.ndarray

    @property
    def order(self) -> np.ndarray:
        """Numbers of the regions, best first."""
        return np.argsort(-self.scores, kind="stable")

    @property
    def best(self) -> int:
        """Number of the region that is meant."""
        return int(self.order[0])

    @property
    def probabilities(self) -> np.ndarray:
        """Softmax over the regions."""
        return softmax(self.scores)

    def as_rows(self) -> list[dict[str, Any]]:
        """One dictionary per region, best first: region, score, probability, box."""
        sure = self.probabilities
        return [{"region": int(n), "score": round(float(self.scores[n]), 6), "probability": round(float(sure[n]), 6),
                 "box": self.boxes[n].tolist()} for n in self.order]  # fmt: skip

    def overlay(self, image: Any, thickness: int = 3) -> Image.Image:
        """The image with a line around the best box."""
        from PIL import Image

        pixels = decode_pixels(image)
        region = box_region(pixels.shape[0], pixels.shape[1], self.boxes[self.best])
        return Image.fromarray(outline(pixels, region, thickness, STYLE.line))


@method(card="fgvp", level="MR")
def fgvp(
    image: Any,
    expression: str,
    encoder: Encoder | Sequence[Encoder],
    *,
    boxes: Any = None,
    masks: Any = None,
    prompts: Sequence[str] | None = None,
    bank: Sequence[str] = (),
    templates: str | Sequence[str] = "a photo of {}",
    fit: str = "squash",
    style: Style = STYLE,
    batch_size: int = 32,
) -> Referral:
    """Rank the regions of an image by how well each fits an expression.

    Parameters
    ----------
    image : path, bytes, PIL image or uint8 array (H, W, 3)
    expression : what is looked for ("the dog on the left")
    encoder : one, or several whose logits are added; one with a larger scale then counts for more
    boxes : (N, 4), left, top, right, bottom in pixels; left out, those around the masks
    masks : bool (N, H, W); an empty one is its box
    prompts : drawings whose logits are added, see `segment.visual_prompts` (default: crop and reverse blur, of the
        masks where there are some, else of the boxes)
    bank : expressions about other images: what a region says to them on average is taken off its score. None of them
        may tell of this image's regions
    templates : sentences around expressions, as for `classify`
    fit : how a picture becomes square: "squash", "pad" with its mean colour, or "crop" (the encoder's own way, which
        loses what lies at the ends of the longer side)
    style : colours, lines, blur
    batch_size : pictures per pass

    Returns
    -------
    Referral

    Raises
    ------
    BadImage
        If the image cannot be used.
    ClipworksError
        If regions, prompts or another argument cannot be used.

    Inputs
    ------
    one image with candidate regions; nothing is trained

    Relations
    ---------
    `retrieval/comclip` shows regions too, to compare whole images with captions. With "circle-line" alone this is the
    red circle of Shtedritski et al. 2023, with "crop" and "box-blur" the isolated proposals of ReCLIP.

    References
    ----------
    Yang et al. 2023, Fine-Grained Visual Prompting (NeurIPS)

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> picture, places = np.zeros((20, 30, 3), np.uint8), np.array([[0.0, 0, 10, 20], [12, 4, 30, 20]])
    >>> fgvp(picture, "dog", toy_encoder(), boxes=places).scores.shape
    (2,)
    """
    check_range("batch_size", batch_size, 1)
    if not isinstance(expression, str) or not expression.strip():
        raise ClipworksError(f"expression must be words. Got {expression!r}.")
    pixels = decode_pixels(image)
    places, regions = candidates(pixels.shape[:2], boxes, masks)
    if prompts is None:
        prompts = ("crop", "box-blur" if regions is None else "mask-blur")
    said = [expression, *bank]
    distinct = list(dict.fromkeys(said))
    scores = np.zeros(len(places))
    for one in encoder if isinstance(encoder, list | tuple) else (encoder,):
        text = class_vectors(distinct, one, templates=templates).numpy()[[distinct.index(words) for words in said]]
        for prompt in prompts:
            drawn = prompted_vectors(
                pixels, one, places, prompt, masks=regions, fit=fit, style=style, batch_size=batch_size
            )
            scores += referring_scores(float(one.logit_scale) * (drawn @ text.T).astype(np.float64))
    return Referral(expression, scores, places)


def referring_scores(logits: np.ndarray) -> np.ndarray:
    """Scores (N,) from logits (N, 1 + C): the expression's, less the mean of the bank's where there is one.

    >>> referring_scores(np.array([[3.0, 1.0, 2.0], [2.0, 0.0, 0.0]])).tolist()
    [1.5, 2.0]
    """
    if np.ndim(logits) != 2 or not np.shape(logits)[1]:
        raise ClipworksError(f"logits must have the shape (N, 1 + C), the expression first. Got {np.shape(logits)}.")
    return logits[:, 0] - (logits[:, 1:].mean(1) if logits.shape[1] > 1 else 0)


def prompted_vectors(
    pixels: np.ndarray,
    encoder: Any,
    boxes: np.ndarray,
    prompt: str,
    *,
    masks: np.ndarray | None = None,
    fit: str = "squash",
    style: Style = STYLE,
    batch_size: int = 32,
) -> np.ndarray:
    """Unit rows (N, dim): the picture with one region after the other pointed out.

    Parameters
    ----------
    pixels : uint8 (H, W, 3)
    encoder : with `images` and `image_size`
    boxes, masks : as `candidates` gives them
    prompt : one of `PROMPTS`
    fit, style, batch_size : as for `fgvp`
    """
    check_choice("prompts", prompt, PROMPTS)
    check_choice("fit", fit, FITS)
    blurred = gaussian_blur(pixels, style.sigma) if prompt.endswith("-blur") else None

    def drawn() -> Iterator[np.ndarray]:
        for n, box in enumerate(boxes):
            mask = None if masks is None else masks[n]
            yield squared(visual_prompt(pixels, box, prompt, mask, style, blurred), fit, encoder.image_size)

    pictures, rows = drawn(), []
    while batch := list(islice(pictures, batch_size)):
        rows.append(as_vectors("images", encoder.images(batch, batch_size=batch_size)))
    return np.concatenate(rows)


def squared(picture: np.ndarray, fit: str, side: int) -> np.ndarray:
    """A picture (H, W, 3) that an encoder's centre crop takes nothing from, unless "crop" asks for that."""
    if fit == "crop":
        return picture
    height, width = picture.shape[:2]
    if fit == "pad":
        longer = max(height, width)
        top, left = (longer - height) // 2, (longer - width) // 2
        ground = np.empty((longer, longer, 3), np.uint8)
        ground[:] = np.rint(picture.reshape(-1, 3).mean(0))
        ground[top : top + height, left : left + width] = picture
        picture = ground
    return _resize(picture, side, side, "bicubic")


def candidates(size: tuple[int, int], boxes: Any, masks: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Boxes float64 (N, 4) and masks bool (N, H, W) of the regions; an empty mask is filled with its box.

    Parameters
    ----------
    size : height and width of the image
    boxes, masks : as for `fgvp`; one of them is needed
    """
    regions = None if masks is None else _regions(size, masks)
    if boxes is None:
        if regions is None:
            raise ClipworksError("boxes or masks must be given: they are what the expression chooses from.")
        places = np.array([mask_box(region) for region in regions if region.any()])
        if len(places) < len(regions):
            raise ClipworksError("masks must not be empty where boxes are not given.")
        return places, regions
    try:
        places = np.array(boxes, np.float64)
    except (TypeError, ValueError):
        raise ClipworksError(f"boxes must be numbers. Got {type(boxes).__name__}.") from None
    count = "N" if regions is None else len(regions)
    if places.ndim != 2 or places.shape[1] != 4 or not len(places) or count not in ("N", len(places)):
        raise ClipworksError(f"boxes must have the shape ({count}, 4), at least one. Got {places.shape}.")
    if not np.isfinite(places).all() or (places[:, 2:] <= places[:, :2]).any():
        wrong = next(box for box in places if not np.isfinite(box).all() or (box[2:] <= box[:2]).any())
        raise ClipworksError(f"boxes must be finite, with left below right and top below bottom. Got {wrong.tolist()}.")
    for n, box in enumerate(places):
        inside = box_region(*size, box)
        if regions is not None and not regions[n].any():
            regions[n] = inside
    return places, regions


def _regions(size: tuple[int, int], masks: Any) -> np.ndarray:
    """A copy of masks as bool (N, H, W)."""
    regions = np.asarray(masks)
    if regions.ndim != 3 or regions.shape[1:] != tuple(size) or not len(regions):
        raise ClipworksError(f"masks must have the shape (N, {size[0]}, {size[1]}), at least one. Got {regions.shape}.")
    if regions.dtype != bool and not np.isin(regions, (0, 1)).all():
        raise ClipworksError("masks must hold 0 and 1 alone.")
    return regions.astype(bool)


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the pixels of a mask.

    >>> mask_box(np.array([[0, 0, 0], [0, 1, 1]], bool))
    (1.0, 1.0, 3.0, 2.0)
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
