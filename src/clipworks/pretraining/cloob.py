"""CLOOB: training with Hopfield retrieval and InfoLOOB, at a temperature that is not learned.

Claim: embeddings replaced by what they retrieve from the batch, and a contrast whose denominator leaves the positive
out, make a better CLIP on small and medium data (better than CLIP on all of eight zero-shot sets).

Formula: L = tau (LOOB(h(x; X), h(y; X)) + LOOB(h(y; Y), h(x; Y))), h(r; Z) = normalise(softmax(beta r Z^T) Z).

Paper: Fürst et al. 2022, CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP (NeurIPS).
Differs from the paper: rows of all processes are gathered with gradient; the cosine schedule has no restarts.
Defaults: 1 / tau = 30 and beta = 8, the recipe for Conceptual Captions (14.3 and 14.3 for YFCC).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ClipworksError, check_range
from ..registry import get_method, method
from ..training.augment import Augment
from ..training.recipe import ContrastiveRecipe

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


@method(card="cloob", level="M")
class CloobRecipe(ContrastiveRecipe):
    """A training step with the CLOOB loss at a fixed scale.

    Parameters
    ----------
    inv_tau : factor on the similarities, constant; the encoder's own scale does not learn
    beta : factor on the similarities of the retrieval
    augment : how views are drawn; None takes the encoder's own preprocessing

    Raises
    ------
    ClipworksError
        If inv_tau or beta is not above 0.

    Inputs
    ------
    image-text pairs; the retrieval sees the whole batch, so its size is part of the method

    Relations
    ---------
    `losses/cloob` is its loss. Use is plain CLIP: no retrieval, cosine similarity; the encoder's scale is set to
    `inv_tau`, for probabilities.

    References
    ----------
    Fürst et al. 2022, CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP

    Examples
    --------
    >>> CloobRecipe(inv_tau=14.3).settings["inv_tau"]
    14.3
    """

    def __init__(self, inv_tau: float = 30.0, beta: float = 8.0, augment: Augment | None = None):
        for name, value in (("inv_tau", inv_tau), ("beta", beta)):
            if not check_range(name, value, 0.0):
                raise ClipworksError(f"{name} must be above 0. Got {value}.")
        super().__init__(get_method("cloob", "losses"), augment, {"beta": beta})
        self.inv_tau = inv_tau

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "inv_tau": self.inv_tau}

    def bind(self, encoder: Encoder, pool: Any) -> None:
        super().bind(encoder, pool)
        with torch.no_grad():
            encoder.log_scale.fill_(math.log(self.inv_tau))

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        found = super().features(encoder, batch)
        return {**found, "scale": found["scale"].detach().new_tensor(self.inv_tau)}
