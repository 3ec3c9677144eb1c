"""Labelled or captioned images for the methods of this room: checked, and in the form that the training loop takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.item import Item
from ..errors import ClipworksError, check_range
from ..zeroshot.templates import resolve_templates


@dataclass
class Shots:
    """Images that passed the checks.

    Attributes
    ----------
    items : images with `label`, the number of the class as text, or with `caption`
    table : label -> class name; None where the images have captions
    """

    items: list[Item]
    table: dict[str, str] | None

    def steps(self, per_shot: float) -> int:
        """Return the optimizer steps of a protocol that counts them per image of a class, at least one."""
        check_range("steps_per_shot", per_shot, 0)
        classes = len({item.label for item in self.items})
        return max(1, round(per_shot * len(self.items) / classes))

    def captioned(self, templates: str | Sequence[str], seed: int = 0) -> list[Item]:
        """Return the items with captions; a label speaks through one of the templates, drawn once."""
        if self.table is None:
            return self.items
        draw, sentences = np.random.default_rng(seed), resolve_templates(templates)
        chosen = draw.integers(len(sentences), size=len(self.items))
        return [
            Item(item.key, item.image, caption=sentences[t].replace("{}", self.table[str(item.label)]))
            for item, t in zip(self.items, chosen, strict=True)
        ]


def labelled(images: Sequence[Any], codes: np.ndarray, names: Sequence[str]) -> Shots:
    """Return shots of images with class numbers."""
    items = [Item(str(i), x, label=str(c)) for i, (x, c) in enumerate(zip(images, codes.tolist(), strict=True))]
    return Shots(items, {str(i): name for i, name in enumerate(names)})


def captioned(images: Sequence[Any], texts: Sequence[str]) -> Shots:
    """Return shots of images with a text each."""
    if blank := [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]:
        raise ClipworksError(f"y must hold a text for every image. Number {blank[0]} is {texts[blank[0]]!r}.")
    return Shots([Item(str(i), x, caption=t) for i, (x, t) in enumerate(zip(images, texts, strict=True))], None)


def check_images(images: Any) -> list[Any]:
    """Return images as a list, after the checks that need no decoding."""
    images = as_given(images)
    if isinstance(images, torch.Tensor) and images.is_floating_point():
        if images.ndim != 4 or images.shape[1] != 3:
            raise ClipworksError(f"images must have the shape (n, 3, H, W). Got {tuple(images.shape)}.")
        if not bool(torch.isfinite(images).all()):
            raise ClipworksError("images must be finite. Got NaN or infinity.")
    elif not hasattr(images, "__len__") or isinstance(images, str | bytes | bytearray | os.PathLike):
        raise ClipworksError(f"images must be a list of images. Got {type(images).__name__}.")
    if len(images) == 0:
        raise ClipworksError("images must hold at least one image. Got none.")
    images = images.numpy() if isinstance(images, torch.Tensor) and images.dtype == torch.uint8 else images
    return [image.source() if isinstance(image, Item) else image for image in images]


def as_given(images: Any) -> Any:
    """Return an array of preprocessed pixels as a tensor, everything else as it is."""
    real = isinstance(images, np.ndarray) and images.dtype.kind == "f"
    return torch.from_numpy(np.ascontiguousarray(images)) if real else images


def listed_captions(captions: Any, shots: Shots, templates: Sequence[str] = ()) -> list[list[str]]:
    """Return the captions of every image as lists of the same length; of None the templates around its class.

    Parameters
    ----------
    captions : a text or a list of texts per image, or None
    shots : images with labels
    templates : with "{}" for the name
    """
    table = shots.table or {}
    if captions is None:
        return [[t.replace("{}", table[str(item.label)]) for t in templates] for item in shots.items]
    if isinstance(captions, str) or not hasattr(captions, "__len__") or len(captions) != len(shots.items):
        got = len(captions) if hasattr(captions, "__len__") else type(captions).__name__
        raise ClipworksError(f"captions must hold an entry per image ({len(shots.items)}). Got {got}.")
    lists = [[own] if isinstance(own, str) else list(own) for own in captions]
    for number, own in enumerate(lists):
        if not own or len(own) != len(lists[0]) or not all(isinstance(t, str) and t.strip() for t in own):
            raise ClipworksError("captions must hold a text for every image, or the same number of texts for each. "
                                 f"Number {number} is {captions[number]!r}.")  # fmt: skip
    return lists
