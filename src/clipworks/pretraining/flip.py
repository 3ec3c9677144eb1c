"""FLIP: contrastive training on a random part of each image's patches.

Claim: dropping half of the patches halves the cost of the image tower; at equal time more pairs are seen and larger
batches fit, for an accuracy at or above that of training on all patches (LAION-400M, ImageNet zero-shot, FLIP ViT-L/16
74.3 %). A short stage without dropping then closes the gap between training and use.

Formula: keep k = int(L (1 - r)) of the L patches of each image, uniformly without replacement, after positions are
added; never the class token; the text is whole. L = InfoNCE.

Paper: Li, Fan, Hu, Feichtenhofer and He 2023, Scaling Language-Image Pre-training via Masking (CVPR).
Differs from the paper: the pool is that of the tower that is trained (the paper averages the patches), and the
learning rate is not scaled with the batch.
Defaults: r = 0.5 from the released code (0.75 is its faster setting).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ClipworksError, check_range
from ..registry import method
from ..training.augment import Augment
from ..training.recipe import ContrastiveRecipe

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder


@method(card="contrastive-foundations", level="M")
class FlipRecipe(ContrastiveRecipe):
    """A training step on randomly kept patches.

    Parameters
    ----------
    drop : share r of the patches that are dropped, in [0, 1) (FLIP: 0.5 or 0.75)
    loss : registered loss or function, as in `ContrastiveRecipe`
    augment : how views are drawn; None takes the encoder's own preprocessing
    options : further keyword arguments of the loss

    Raises
    ------
    ClipworksError
        If drop is out of range or leaves no patch, or the image tower is not a transformer.

    Inputs
    ------
    image-text pairs

    Relations
    ---------
    With drop=0 every patch stays and the step is the plain one. `a_clip` chooses the patches by attention instead.
    "Unmasked tuning" is a second, short `train` of the result with the default recipe at a small learning rate.

    References
    ----------
    Li, Fan, Hu, Feichtenhofer and He 2023, Scaling Language-Image Pre-training via Masking

    Examples
    --------
    >>> keep = random_patches([np.random.default_rng(i) for i in range(2)], 196, 0.5)
    >>> keep.shape
    torch.Size([2, 98])
    """

    def __init__(
        self,
        drop: float = 0.5,
        loss: str | Callable[..., Any] = "infonce",
        augment: Augment | None = None,
        options: dict[str, Any] | None = None,
    ):
        super().__init__(loss, augment, options)
        self.drop = check_range("drop", drop, 0.0, 1.0)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "drop": self.drop}

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return `pixels`, `tokens`, and `keep` of shape (n, k): the patches that are encoded."""
        draws = rng.spawn(len(items))
        found = {"pixels": self.pixels(items, draws), "tokens": self.bound.tokenize(self.texts(items, draws))}
        if self.drop:
            found["keep"] = random_patches(draws, patch_count(self.bound), self.drop)
        return found

    def encode(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        seams = {"keep": batch["keep"]} if "keep" in batch else {}
        image = encoder.encode_image(batch["pixels"], **seams)
        return {"image": image, "text": encoder.encode_text(batch["tokens"])}


def patch_count(encoder: Encoder) -> int:
    """Number of patches of the encoder's images; only a transformer has patches to drop."""
    vision = encoder.config.vision
    if vision.kind != "vit":
        raise ClipworksError(f"dropping patches needs an image tower of kind 'vit'. Got {vision.kind!r}.")
    return vision.grid[0] * vision.grid[1]


def random_patches(draws: Sequence[np.random.Generator], patches: int, drop: float) -> torch.Tensor:
    """Return which patches each sample keeps, in ascending order.

    Parameters
    ----------
    draws : one generator per sample
    patches : number of patches L
    drop : share that is dropped; int(L * (1 - drop)) stay

    Returns
    -------
    int64 tensor of shape (n, kept)
    """
    # the small term keeps 10 * (1 - 0.9) from becoming 0.999... and losing a patch
    kept = int(patches * (1 - drop) + 1e-9)
    if kept < 1:
        raise ClipworksError(f"drop={drop} leaves none of the {patches} patches. At most {1 - 1 / patches:.4g} may go.")
    order = np.stack([draw.random(patches) for draw in draws]).argpartition(kept - 1, axis=1)[:, :kept]
    return torch.from_numpy(np.sort(order, axis=1))
