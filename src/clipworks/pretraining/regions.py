"""What recipes of regions share: views whose boxes are known, pieces cut from them, batches of boxes with words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ..data.regions import COLUMN, regions_of, seen
from ..errors import check_range
from ..training.augment import Augment, open_image
from ..training.gather import gather
from ..training.recipe import ContrastiveRecipe
from .parts import ModuleRecipe

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder

SQUARE = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))  # the largest centred square, as CLIP's own preprocessing cuts
WHOLE = Augment(scale=(1.0, 1.0), ratio=(1e-3, 1e3))  # the whole image, squashed
ALL = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class View:
    """A square view of an image, and where it came from.

    Attributes
    ----------
    image : the view
    crop : left, top, right, bottom of what the view shows, in pixels of the source
    mirrored : whether it was flipped left to right
    source : the decoded image
    """

    image: Image.Image
    crop: tuple[int, int, int, int]
    mirrored: bool
    source: Image.Image

    def box(self, box: Sequence[float]) -> tuple[tuple[float, float, float, float], float]:
        """Return a box, shares of the source, as shares of the view, and which share of it is left."""
        wide, tall = self.source.size
        pixels = [side * share for side, share in zip((wide, tall, wide, tall), box, strict=True)]
        return seen(pixels, self.crop, self.mirrored)

    def cut(self, box: Sequence[float], size: int, rule: str) -> Image.Image:
        """Return what a box, shares of the view, shows, from the source's own pixels, at `size` x `size`."""
        left, top, right, bottom = box
        if self.mirrored:
            left, right = 1 - right, 1 - left
        x, y, wide, tall = *self.crop[:2], self.crop[2] - self.crop[0], self.crop[3] - self.crop[1]
        place = (x + left * wide, y + top * tall, min(x + right * wide, self.source.width),
                 min(y + bottom * tall, self.source.height))  # fmt: skip
        made = self.source.resize((size, size), Image.Resampling[rule.upper()], box=place)
        return ImageOps.mirror(made) if self.mirrored else made


def placed(item: Item, preprocess: Any, augment: Augment | None, size: int, draw: np.random.Generator) -> View:
    """Draw a view of an item; without an augmentation what the preprocessing shows, a centred square or all of it."""
    config = preprocess.config
    if augment is None:
        augment = SQUARE if config.resize == "shortest" and config.crop == "center" else WHOLE
    source = open_image(item, preprocess)
    return View(*augment.placed(source, size, draw, config.interpolation), source)


def encode_kept(
    encode: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, kept: torch.Tensor, dim: int
) -> torch.Tensor:
    """Encode the entries of (n, M, ...) that are kept, bool (n, M); the rows (n, M, dim) of the others are 0."""
    rows = torch.zeros(*kept.shape, dim, device=values.device)
    if bool(kept.any()):
        rows[kept] = encode(values[kept]).to(rows.dtype)
    return rows


class _Pooled(ContrastiveRecipe):
    """The contrast of images and captions for image vectors that were computed already (`pooled`)."""

    def encode(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if "pooled" not in batch:
            return super().encode(encoder, batch)
        return {"image": F.normalize(batch["pooled"].float(), dim=-1), "text": encoder.encode_text(batch["tokens"])}


class RegionRecipe(ModuleRecipe):
    """Base of the recipes that train on images with captions and regions.

    Parameters
    ----------
    regions : most regions of an image in a step; of more a random choice, or the surest
    surest : whether the surest are taken
    column : column of the data that holds them, see `data.regions`
    template : sentence around their words
    least : share of a region that must be left in the view
    smallest : share of the view that a region must cover
    augment : how views are drawn; None takes what the encoder's own preprocessing shows
    loss : registered contrastive loss of images and captions
    seed : of the start of the recipe's modules
    """

    def __init__(
        self,
        regions: int = 4,
        *,
        surest: bool = False,
        column: str = COLUMN,
        template: str = "{}",
        least: float = 0.5,
        smallest: float = 0.0,
        augment: Augment | None = None,
        loss: str = "infonce",
        seed: int = 0,
    ):
        super().__init__(_Pooled(loss, augment), seed)
        self.regions, self.surest, self.column = int(check_range("regions", regions, 1)), surest, column
        self.template, self.augment = template, augment
        self.least, self.smallest = check_range("least", least, 0.0, 1.0), check_range("smallest", smallest, 0.0, 1.0)

    def views_of(self, items: Sequence[Item], draws: Sequence[np.random.Generator]) -> list[View]:
        """Return one view per item, decoded in the threads of the run."""
        preprocess = self.plain.bound.preprocess
        run = map if self.plain.pool is None else self.plain.pool.map
        size = preprocess.config.size
        return list(run(lambda item, draw: placed(item, preprocess, self.augment, size, draw), items, draws))

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Normalise pictures of one size to (n, 3, H, W)."""
        return torch.stack([self.plain.bound.preprocess.normalize(np.asarray(image)) for image in images])

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return `pixels`, `tokens`, and of M regions per image `boxes` (n, M, 4), `words` (n, M, L) and `labels`."""
        draws = rng.spawn(len(items))
        views = self.views_of(items, draws)
        tokens = self.plain.bound.tokenize(self.plain.texts(items, draws))
        found = {"pixels": self.pixels([view.image for view in views]), "tokens": tokens}
        return {**found, **self.regions_in(items, views, draws)}

    def regions_in(
        self, items: Sequence[Item], views: Sequence[View], draws: Sequence[np.random.Generator]
    ) -> dict[str, torch.Tensor]:
        """Return boxes in the views, token ids of their words, and labels, equal for equal words; -1 fills up."""
        boxes = torch.tensor(ALL).repeat(len(items), self.regions, 1)
        labels = torch.full((len(items), self.regions), -1)
        texts = [[""] * self.regions for _ in items]
        for number, (item, view, draw) in enumerate(zip(items, views, draws, strict=True)):
            for slot, (box, text) in enumerate(self.chosen(item, view, draw)):
                boxes[number, slot] = torch.tensor(box)
                texts[number][slot] = self.template.format(text)
                labels[number, slot] = text_number(text)
        words = self.plain.bound.tokenize([text for row in texts for text in row])
        return {"boxes": boxes, "words": words.unflatten(0, (len(items), self.regions)), "labels": labels}

    def chosen(self, item: Item, view: View, draw: np.random.Generator) -> list[tuple[tuple[float, ...], str]]:
        """Return the boxes, in the view, and words of an item's regions that a step takes."""
        there = []
        for region in regions_of(item, self.column):
            box, left = view.box(region.box)
            area = (box[2] - box[0]) * (box[3] - box[1])
            if area > 0 and left >= self.least and area >= self.smallest:
                there.append((region.score, box, region.text))
        if self.surest:
            there.sort(key=lambda entry: -entry[0])
        elif len(there) > self.regions:
            there = [there[i] for i in sorted(draw.permutation(len(there))[: self.regions])]
        return [(box, text) for _, box, text in there[: self.regions]]

    def words_of(self, encoder: Encoder, batch: dict[str, Any]) -> torch.Tensor:
        """Return unit rows (n, M, dim) of the regions' words; those that fill up are 0."""
        return encode_kept(encoder.encode_text, batch["words"], batch["labels"] >= 0, encoder.dim)

    def contrast(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the loss of images and captions alone."""
        return self.plain.losses({k: v for k, v in features.items() if k in ("image", "text", "scale", "bias")})


def kept_rows(features: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    """Gather (n, M, ...) features of all processes and return the rows whose label is not below 0, with `labels`."""
    labels = gather(features["labels"])
    return {name: gather(features[name])[labels >= 0] for name in names} | {"labels": labels[labels >= 0]}


def text_number(text: str) -> int:
    """Return a number of 56 bits that is the same for the same words, on every machine.

    >>> text_number("A red car ") == text_number("a red car") != text_number("a blue car")
    True
    """
    return int.from_bytes(hashlib.sha256(text.strip().lower().encode()).digest()[:7], "big")
