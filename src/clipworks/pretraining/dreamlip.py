"""DreamLIP: sentences of long captions as several positives, each also tied to the patches it resembles.

Claim: one by one, the sentences of machine-written long captions teach more than the caption as a whole, and tying each
to its patches adds to that (COCO zero-shot R@1: long captions whole 30.2 / 21.4, sentences 35.7 / 25.6, sentences with
short captions 40.8 / 29.4, all with grouping 42.8 / 30.4).

Formula: L = l1 mean_k InfoNCE(g, T_k) + l2 InfoNCE({G_k}, {T_k}), the second over all (K + 1) B rows, so other
sentences of the same image are negatives;  G_k = normalise(sum_p w_kp V_p), w_kp = s_kp / sum_p s_kp, s = T_k . V_p
brought to [0, 1] over the patches and set to 0 below delta.

Paper: Zheng et al. 2024, DreamLIP: Language-Image Pre-training with Long Captions (ECCV).
Differs from the paper: patches go through the tower's own projection (the released tower leaves them unprojected) and
the second loss shares the scale of the first.
Defaults: K = 6 sentences beside the image's own caption, delta 0, both weights 1 from the released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..errors import check_choice, check_range
from ..registry import method
from ..training.augment import Augment
from ..training.recipe import contrast
from .caption_pools import CaptionPools
from .parts import need_vit

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

NORMS = ("min-max", "softmax")


@method(card="dreamlip", level="M")
class DreamlipRecipe(CaptionPools):
    """A training step with K sentences per image beside its own caption.

    Parameters
    ----------
    pools : image key -> long or short captions; None takes them from the `columns` of the items
    columns : columns of the data that hold them
    sentences_per_image : number K of sentences drawn per step; 0 leaves the own caption alone
    multi_positive, grouping : weights of the two losses; grouping=0 leaves the patches out
    delta : similarity, between 0 and 1, below which a patch does not count; below 0 it is 1 / patches
    norm : how similarities are brought to [0, 1] over the patches, "min-max" or "softmax"
    augment : how views are drawn; None takes the encoder's own preprocessing

    Raises
    ------
    ClipworksError
        If a number is out of range, norm is unknown, or the image tower has no patches.

    Inputs
    ------
    image-text pairs with long captions per image

    Relations
    ---------
    With sentences_per_image=0 and grouping=0 it is plain CLIP on the own captions. `caption_pools` is its sampler.

    References
    ----------
    Zheng et al. 2024, DreamLIP: Language-Image Pre-training with Long Captions

    Examples
    --------
    >>> text, patches = torch.eye(4)[None, :1], torch.eye(4)[None]
    >>> group_patches(text, patches)[0].tolist()  # only the patch that the text names
    [[[1.0, 0.0, 0.0, 0.0]]]
    """

    def __init__(
        self,
        pools: Mapping[str, Sequence[str]] | None = None,
        columns: Sequence[str] = (),
        sentences_per_image: int = 6,
        multi_positive: float = 1.0,
        grouping: float = 1.0,
        delta: float = 0.0,
        norm: str = "min-max",
        augment: Augment | None = None,
    ):
        count = 1 + int(check_range("sentences_per_image", sentences_per_image, 0))
        super().__init__(pools, columns, texts_per_image=count, keep_original=True, sentences=True, augment=augment)
        self.multi_positive = check_range("multi_positive", multi_positive, 0.0)
        self.grouping = check_range("grouping", grouping, 0.0)
        self.delta, self.norm = check_range("delta", delta, None, 1.0), check_choice("norm", norm, NORMS)

    @property
    def settings(self) -> dict[str, Any]:
        own = {"multi_positive": self.multi_positive, "grouping": self.grouping, "delta": self.delta, "norm": self.norm}
        return {**super().settings, **own}

    def encode(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return rows, and with grouping the patches' mixture for each text, (n, K + 1, dim)."""
        if not self.grouping:
            return super().encode(encoder, batch)
        need_vit(encoder, "DreamLIP's grouping")
        output = encoder.visual.run(batch["pixels"])
        text = encoder.encode_text(batch["tokens"].flatten(0, -2))
        text = text.unflatten(0, batch["tokens"].shape[:-1])
        patches = F.normalize(encoder.visual.project(output.patches).float(), dim=-1)
        grouped = group_patches(text if text.ndim == 3 else text[:, None], patches, self.delta, self.norm)[0]
        return {"image": F.normalize(output.pooled.float(), dim=-1), "text": text, "grouped": grouped}

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weighted losses; rows are put sample by sample, the texts of one image together."""
        plain = {name: value for name, value in features.items() if name != "grouped"}
        found = {name: self.multi_positive * value for name, value in super().losses(plain).items()}
        if self.grouping:
            pairs = {"image": features["grouped"].flatten(0, 1), "text": features["text"].flatten(0, -2)}
            value = contrast(self.loss, self.loss_name, {**plain, **pairs}, **self.options)[self.loss_name]
            found["grouping"] = self.grouping * value
        return found


def group_patches(
    text: torch.Tensor, patches: torch.Tensor, delta: float = 0.0, norm: str = "min-max"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix the patches that resemble each text.

    Parameters
    ----------
    text : unit rows of shape (n, K, dim)
    patches : unit rows of shape (n, P, dim)
    delta, norm : as in `DreamlipRecipe`

    Returns
    -------
    unit rows of shape (n, K, dim), and the weights (n, K, P), which are not negative and sum to 1
    """
    similarity = text @ patches.transpose(1, 2)
    count = patches.shape[1]
    if norm == "softmax":
        share = similarity.softmax(-1)
    else:
        low, high = similarity.amin(-1, keepdim=True), similarity.amax(-1, keepdim=True)
        # patches that are all alike (or one alone) count alike
        share = torch.where(high > low, (similarity - low) / (high - low).clamp(min=1e-12), torch.ones_like(similarity))
    floor = min(1 / count if delta < 0 else delta, 1.0)
    kept = share.masked_fill(share < floor, 0.0)
    # softmax may leave nothing above a high delta; the best patch then stays
    best = torch.zeros_like(share).scatter_(-1, share.argmax(-1, keepdim=True), 1.0)
    kept = torch.where(kept.sum(-1, keepdim=True) > 0, kept, best)
    weights = kept / kept.sum(-1, keepdim=True)
    return F.normalize(weights @ patches, dim=-1), weights
