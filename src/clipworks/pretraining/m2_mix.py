"""Geodesic mixup: training with negatives that lie between the image and the text of a pair.

Claim: as `losses/m2_mix`: better aligned and more uniform features after fine-tuning on pairs.

Formula: L = InfoNCE(I, T) + w [CE(Z_I) + CE(Z_T)], share l ~ Beta(b, b) drawn once per step, w = c or c / (1 + epoch).

Paper: Oh et al. 2023, Geodesic Multi-Modal Mixup for Robust Fine-Tuning (NeurIPS).
Differs from the paper: the scale of the contrastive loss is the encoder's own, which the paper fixes at 100 (where CLIP
has it; `freeze=["log_scale"]` keeps it there). It may be used from scratch, which the paper does not try.
Defaults: c = 0.05, tau2 = 0.07, b = 0.5 from the released code (b = 0.2 in its m3 setting, and there c = 0.01, images
and texts 0.05, both 0.1); lr 1e-5, weight decay 0.2, batch 128, 9 epochs belong to `train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ClipworksError, check_range
from ..registry import method
from ..training.augment import Augment
from ..training.recipe import ContrastiveRecipe, contrast

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder

DRAWN = ("share", "partner_share", "fading")  # numbers of a step


@method(card="m2-mix", level="M")
class M2MixRecipe(ContrastiveRecipe):
    """A training step with geodesic mixup.

    Parameters
    ----------
    weight : c, of the m2 term
    beta : of the Beta distribution that the share comes from; below 1 most batches are hardly mixed
    partner_beta : the same for the m3 terms
    temperature : of the m2 term
    images, texts, both : weights of the m3 terms
    epoch_steps : steps of an epoch; given, the weights fall as 1 / (1 + epoch)
    augment : how views are drawn; None takes the encoder's own preprocessing

    Raises
    ------
    ClipworksError
        If a weight is negative, or beta or the temperature is not above 0.

    Inputs
    ------
    image-text pairs; one image and one text pass per step, as plain CLIP

    Relations
    ---------
    `losses/m2_mix` is its loss. With all weights 0 it is plain contrastive training. `clip_refine` and `wise_ft` aim at
    the same: fine-tuning that keeps what was known.

    References
    ----------
    Oh et al. 2023, Geodesic Multi-Modal Mixup for Robust Fine-Tuning

    Examples
    --------
    >>> M2MixRecipe(weight=0.1, epoch_steps=100).fading(250)
    0.3333333333333333
    """

    def __init__(
        self,
        weight: float = 0.05,
        beta: float = 0.5,
        partner_beta: float = 0.5,
        temperature: float = 0.07,
        images: float = 0.0,
        texts: float = 0.0,
        both: float = 0.0,
        epoch_steps: int | None = None,
        augment: Augment | None = None,
    ):
        for name, value in (("beta", beta), ("partner_beta", partner_beta), ("temperature", temperature)):
            if not value > 0:
                raise ClipworksError(f"{name} must be above 0. Got {value}.")
        self.weights = {"weight": weight, "images": images, "texts": texts, "both": both}
        for name, value in self.weights.items():
            check_range(name, value, 0.0)
        super().__init__("m2_mix", augment, {"temperature": temperature})
        self.beta, self.partner_beta = beta, partner_beta
        self.epoch_steps = None if epoch_steps is None else int(check_range("epoch_steps", epoch_steps, 1))

    @property
    def settings(self) -> dict[str, Any]:
        own = {"beta": self.beta, "partner_beta": self.partner_beta, "epoch_steps": self.epoch_steps}
        return {**super().settings, **self.weights, **own}

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return pixels and tokens, the shares of this step, and how much of the weights is left."""
        found = super().batch(items, step, rng)
        drawn = (rng.beta(self.beta, self.beta), rng.beta(self.partner_beta, self.partner_beta), self.fading(step))
        return found | {k: torch.tensor(v, dtype=torch.float32) for k, v in zip(DRAWN, drawn, strict=True)}

    def fading(self, step: int) -> float:
        """Return 1 / (1 + epoch), or 1 without `epoch_steps`."""
        return 1.0 if self.epoch_steps is None else 1 / (1 + step // self.epoch_steps)

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {**super().features(encoder, batch), **{name: batch[name] for name in DRAWN}}

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the contrastive loss and the terms on mixed rows."""
        drawn = {name: features[name].detach() for name in DRAWN}
        found = contrast(self.loss, self.loss_name, {**features, **drawn}, **self.options, **self.weights)
        return {name: value if name == "infonce" else drawn["fading"] * value for name, value in found.items()}
