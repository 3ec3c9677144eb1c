"""CLIP-rocket's recipe: plain CLIP with weak and strong views of image and text, two pairs of projectors, smoothing.

Claim: with such a recipe plain CLIP catches up with every self-supervised loss that was added to it, and is better than
itself without by up to 25 % (relative, zero-shot suite).

Formula: L = (L_g + A L_l) / (1 + A);  L_g = InfoNCE of the weak views by linear projectors;  L_l = mean over the A x A
pairs of strong views of InfoNCE with label smoothing e by non-linear projectors; each with a scale of its own.

Paper: Fini et al. 2023, Improved baselines for vision-language pre-training (TMLR).
Differs from the paper: the local text pass has no dropout or stochastic depth (0 in its YFCC setting). Synonyms are an
argument; without them their share of the draws goes to no change. Rows are gathered with gradient. Its extra baselines
are losses (BarLIP, SiamLIP and SwALIP).
Defaults: A = 2, stop words out with 0.8, synonyms .4, swaps .4, deletions .2, smoothing 0.1, local scale from 1 / 0.1,
projectors of 4096 and 256 from the released code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import check_range
from ..registry import get_method, method
from ..training.augment import AUGMENTS, Augment
from ..training.recipe import ContrastiveRecipe, contrast
from .parts import ModuleRecipe, head, need_vit, unprojected, unprojected_text
from .word_noise import deleted, swapped, with_synonyms, without_stop_words

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder

WEAK = Augment(scale=(0.5, 1.0))
OPERATIONS = {"synonym": 0.4, "swap": 0.4, "delete": 0.2}


@method(card="improved-baselines", level="M")
class ImprovedRecipe(ModuleRecipe):
    """A training step on one weak and several strong views of image and text.

    Parameters
    ----------
    strong_views : number A of strong views of image and of text; 0 is plain contrastive training
    stop_words : probability of leaving stop words out of the weak text (they always go in the strong ones)
    synonyms : word -> words that may take its place
    smoothing : label smoothing of the strong pairs
    hidden, out : channels of the non-linear projectors
    weak, strong : how the two kinds of image views are drawn
    seed : of the projectors' start

    Attributes
    ----------
    log_scale : logarithm of the local scale, trained

    Raises
    ------
    ClipworksError
        If strong_views, stop_words or smoothing is out of range, or the image tower is not a transformer.

    Inputs
    ------
    image-text pairs; 1 + A image and text passes per step

    Relations
    ---------
    The encoder itself holds the global projectors and is used as plain CLIP. `local` gives features of the non-linear
    ones; an ensemble of both scores must take its weight from validation data or be fixed in advance (0.5).

    References
    ----------
    Fini et al. 2023, Improved baselines for vision-language pre-training

    Examples
    --------
    >>> ImprovedRecipe(strong_views=1).settings["strong_views"]
    1
    """

    def __init__(
        self,
        strong_views: int = 2,
        stop_words: float = 0.8,
        synonyms: Mapping[str, Sequence[str]] | None = None,
        smoothing: float = 0.1,
        hidden: int = 4096,
        out: int = 256,
        weak: Augment = WEAK,
        strong: Augment = AUGMENTS["strong"],  # type: ignore[assignment]
        seed: int = 0,
    ):
        super().__init__(ContrastiveRecipe("infonce"), seed)
        self.strong_views = int(check_range("strong_views", strong_views, 0))
        self.stop_words = check_range("stop_words", stop_words, 0.0, 1.0)
        self.smoothing = check_range("smoothing", smoothing, 0.0, 1.0)
        self.synonyms, self.hidden, self.out, self.weak, self.strong = synonyms or {}, hidden, out, weak, strong
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.1)))

    def build(self, encoder: Encoder) -> None:
        need_vit(encoder, "this recipe")
        vision, text = encoder.config.vision, encoder.config.text
        self.image_head = head(vision.width, self.hidden, self.out, 3)
        self.text_head = head(text.width, self.hidden, self.out, 3)

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return weak `pixels` and `tokens`, and `strong` (n, A, 3, H, W) with `strong_tokens` (n, A, L)."""
        draws = rng.spawn(len(items))
        weak, *strong = self.views(items, draws, [self.weak, *[self.strong] * self.strong_views])
        captions = self.plain.texts(items, draws)
        tokenize, count = self.plain.bound.tokenize, self.strong_views
        mild = [self.weak_text(t, d) for t, d in zip(captions, draws, strict=True)]
        found = {"pixels": weak, "tokens": tokenize(mild)}
        if count:
            noisy = [self.strong_text(t, d) for t, d in zip(captions, draws, strict=True) for _ in range(count)]
            found["strong"] = torch.stack(strong, 1)
            found["strong_tokens"] = tokenize(noisy).unflatten(0, (len(items), count))
        return found

    def weak_text(self, text: str, draw: np.random.Generator) -> str:
        """Leave the stop words out, or not."""
        return without_stop_words(text) if draw.random() < self.stop_words else text

    def strong_text(self, text: str, draw: np.random.Generator) -> str:
        """Leave the stop words out and change the words in one of three ways."""
        text = without_stop_words(text)
        operation = draw.choice(list(OPERATIONS), p=list(OPERATIONS.values()))
        if operation == "synonym":
            return with_synonyms(text, draw, self.synonyms)
        return swapped(text, draw) if operation == "swap" else deleted(text, draw)

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return global rows and scale, and local rows (n, A, out) with their own scale."""
        found = self.plain.features(encoder, batch)
        if self.strong_views:
            shape = batch["strong"].shape[:2]
            image, text = self.local(encoder, batch["strong"].flatten(0, 1), batch["strong_tokens"].flatten(0, 1))
            found |= {"local_image": image.unflatten(0, shape), "local_text": text.unflatten(0, shape)}
            found["local_scale"] = self.log_scale.clamp(0.0, math.log(100.0)).exp().reshape(())
        return found

    def local(self, encoder: Encoder, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return unit rows of the non-linear projectors for images and for texts."""
        image = self.image_head(unprojected(encoder.visual, encoder.visual.run(pixels)))
        text = self.text_head(unprojected_text(encoder.text, tokens, encoder.text.run(tokens)))
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weighted global loss and that of all pairs of strong views."""
        loss = get_method("improved_baselines", "losses")
        return contrast(loss, "improved_baselines", features, smoothing=self.smoothing)
