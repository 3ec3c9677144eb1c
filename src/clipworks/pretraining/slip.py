"""SLIP: the contrastive loss with words beside self-supervision between two strong views of the image.

Claim: a SimCLR term on the image tower improves zero-shot accuracy (YFCC15M, ViT-B/16, ImageNet: CLIP 37.6, SLIP 42.8)
at the price of two more image passes per step.

Formula: L = InfoNCE(weak view, caption) + w NT-Xent(g(strong view 1), g(strong view 2)), g = three-layer head on the
image feature before its projection, temperature 0.1.

Paper: Mu, Kirillov, Wagner and Xie 2022, SLIP: Self-supervision meets Language-Image Pre-training (ECCV).
Differs from the paper: nothing in the loss; rows of all processes are gathered with gradient, which the released code
leaves out for the CLIP term.
Defaults: w = 1, head 4096 and 256, views from the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import check_range
from ..registry import get_method, method
from ..training.augment import AUGMENTS, Augment
from ..training.gather import gather
from ..training.recipe import ContrastiveRecipe
from .parts import ModuleRecipe, head, need_vit, unprojected

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder

WEAK = Augment(scale=(0.5, 1.0))


@method(card="contrastive-foundations", level="M")
class SlipRecipe(ModuleRecipe):
    """A training step on one weak view with its caption and two strong views with each other.

    Parameters
    ----------
    weight : of the self-supervised term (SLIP: 1)
    hidden, out : channels of the head (4096 and 256)
    weak, strong : how the two kinds of views are drawn
    loss : registered contrastive loss
    seed : of the head's start

    Raises
    ------
    ClipworksError
        If weight is negative, or the image tower is not a transformer.

    Inputs
    ------
    image-text pairs; three image passes per step

    Relations
    ---------
    With weight=0 it is plain contrastive training on the weak view. `improved_baselines` uses strong views for the
    contrast with words instead; its paper finds that a plain CLIP with the same views catches up.

    References
    ----------
    Mu, Kirillov, Wagner and Xie 2022, SLIP

    Examples
    --------
    >>> SlipRecipe(weight=0.5).settings["weight"]
    0.5
    """

    def __init__(
        self,
        weight: float = 1.0,
        hidden: int = 4096,
        out: int = 256,
        weak: Augment = WEAK,
        strong: Augment = AUGMENTS["strong"],  # type: ignore[assignment]
        loss: str = "infonce",
        seed: int = 0,
    ):
        super().__init__(ContrastiveRecipe(loss), seed)
        self.weight, self.hidden, self.out = check_range("weight", weight, 0.0), hidden, out
        self.weak, self.strong = weak, strong

    def build(self, encoder: Encoder) -> None:
        need_vit(encoder, "SLIP")
        self.head = head(encoder.config.vision.width, self.hidden, self.out, 3) if self.weight else None

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return `pixels`, `first`, `second` of shape (n, 3, H, W) and `tokens`."""
        draws = rng.spawn(len(items))
        kinds = (self.weak, self.strong, self.strong) if self.weight else (self.weak,)
        names = ("pixels", "first", "second")
        found: dict[str, Any] = dict(zip(names, self.views(items, draws, kinds), strict=False))
        found["tokens"] = self.plain.bound.tokenize(self.plain.texts(items, draws))
        return found

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return rows of both sides, the scale, and the head's rows of the strong views."""
        found = self.plain.features(encoder, batch)
        if self.head is not None:
            for name in ("first", "second"):
                output = encoder.visual.run(batch[name])
                found[name] = self.head(unprojected(encoder.visual, output))
        return found

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the contrastive loss and the weighted self-supervised one."""
        found = self.plain.losses(features)
        if self.head is not None:
            views = gather(features["first"]), gather(features["second"])
            found["simclr"] = self.weight * get_method("simclr", "losses")(*views)
        return found
