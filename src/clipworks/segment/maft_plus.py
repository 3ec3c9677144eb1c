"""MAFT+: the image tower learns that a mask's score follows its quality, while words follow the image.

Claim: changing both sides of CLIP together, the image side by mask quality and the text side by what an image shows,
finds classes that were never trained better than a frozen CLIP does: 36.1 mIoU on ADE20K-150 (its repository).

Formula: F trunk's map, f_q mean of F under mask_q > 0 through CLIP's head; T = [words; void],
T' = T + LN(Linear(MHA(T, G + positions, G))), G = head at every cell (or LN(T + Linear(...)));
z_q = min(scale, 100) cos(f_q, T'),  p_q = softmax(z_q without void);
L_ma = SmoothL1(p_q(class of i), IoU(mask_q, segment i) brought to [0, 1] over q);
L_rc = SmoothL1(pool(relu F), pool(relu F of the tower as it was)), means of 1, 2, 4 parts a side, summed along both;
L = 2 CE + 5 mask + 5 dice + L_ma + 0.1 L_rc;  S(class) = sum_q p_q(class) (1 - void_q) sigmoid(mask_q).

Paper: Jiao et al. 2024, Collaborative Vision-Text Representation Optimizing for Open-Vocabulary Segmentation (ECCV).
Differs from the paper: a small decoder on the tower's own maps; for a ViT F is the last block's output with every patch
attending to itself (MaskCLIP's), for which no ConvNeXt is needed; a norm's output is sqrt(dim) long beside words of
length 1, so after one step of the paper's forms words are what the transfer says: by default the norm's gain starts at
0 and words move little by little; one pass of the tower per step serves both branches, the decoder's cut off from it.
Weights of the losses, heads and pools are the official code's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.item import Item
from ..errors import ClipworksError, check_choice
from ..registry import method
from .common import Hidden, enter
from .mask_decoder import (
    MaskDecoder,
    WordHead,
    map_channels,
    mask_pool,
    semantic_map,
    share,
    sine_positions,
    tower_maps,
)
from .mask_losses import MaskCriterion, at_points, draw_points, proposal_losses, segments, soft_iou
from .trained import TrainedDense

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

TRANSFERS = ("gain", "panoptic", "semantic", "none")
HEADS = 8  # of the words' attention (official; fewer where the joint space is not a multiple)
SCALES = (1, 2, 4)  # of the compensation (official)
POINTS = 3136  # pixels of an image at which masks are compared with segments


class Transfer(nn.Module):
    """Content-dependent transfer: words look at an image's cells and move.

    Parameters
    ----------
    dim : of the joint space
    form : "panoptic", T + LN(Linear(.)) with a Linear of zeros at first; "gain", the same with a norm whose gain is 0
        at first, not the Linear; or "semantic", LN(T + Linear(.))
    """

    def __init__(self, dim: int, form: str = "gain"):
        super().__init__()
        heads = next(h for h in (HEADS, 4, 2, 1) if dim % h == 0)
        self.form, self.attention = form, nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        if form == "panoptic":
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        elif form == "gain":
            nn.init.zeros_(self.norm.weight)

    def forward(self, words: torch.Tensor, cells: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Words (K, dim) to (B, K, dim) by cells (B, N, dim), whose places (N, dim) stand on the keys alone."""
        words = words.expand(len(cells), -1, -1)
        seen = self.linear(self.attention(words, cells + places, cells, need_weights=False)[0])
        return self.norm(words + seen) if self.form == "semantic" else words + self.norm(seen)


class MaftParts(nn.Module):
    """The proposals' decoder with its head, whose "no object" is the void word too, and the words' transfer."""

    def __init__(self, decoder: MaskDecoder, head: WordHead, transfer: Transfer | None):
        super().__init__()
        self.decoder, self.head, self.transfer = decoder, head, transfer


@method(card="maft-plus", level="MR")
class MAFTPlus(TrainedDense):
    """Fine-tune the image tower by mask quality and shift class words by the image.

    Parameters
    ----------
    encoder : a name, a path or an encoder (default: the bundled one)
    transfer : how words follow the image: "gain" (words move little by little), "panoptic", "semantic", or "none"
    quality : weight of the mask-aware loss (1)
    compensation : weight of the loss that keeps the tower near what it was (0.1)
    tower : whether the image tower learns, at a tenth of the rate; its last norm and projection never do
    queries : proposals
    width : channels of the decoder
    steps, batch_size, lr : of AdamW with warm-up and cosine (paper: 60,000 steps of 8 at 1e-4)
    side : of the training crops in pixels (default: twice the encoder's image size)
    seed : of the start, the order and the crops

    Inputs
    ------
    images and label maps; any names afterwards

    Relations
    ---------
    With `transfer="none"`, `quality=0` and `compensation=0` it is a frozen CLIP that names masks by the mean of its
    features under them. `ovseg` names crops in the place of features.

    References
    ----------
    Jiao et al. 2024, Collaborative Vision-Text Representation Optimizing for Open-Vocabulary Segmentation (ECCV)

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> images, masks = torch.rand(3, 3, 16, 24), torch.zeros(3, 16, 24, dtype=torch.long)
    >>> masks[:, :, 12:] = 1
    >>> model = MAFTPlus(toy_encoder(), steps=2, queries=3, width=8).fit(images, masks, ["sky", "sea"])
    >>> model.predict(images).shape
    (3, 16, 24)
    """

    def __init__(
        self,
        encoder: Any = None,
        transfer: str = "gain",
        quality: float = 1.0,
        compensation: float = 0.1,
        tower: bool = True,
        queries: int = 20,
        width: int = 128,
        steps: int = 1000,
        batch_size: int = 8,
        lr: float = 1e-4,
        side: int | None = None,
        seed: int = 0,
    ):
        self.encoder, self.transfer, self.quality, self.compensation = encoder, transfer, quality, compensation
        self.tower, self.queries, self.width, self.steps = tower, queries, width, steps
        self.batch_size, self.lr, self.side, self.seed = batch_size, lr, side, seed

    # -- what is learned -----------------------------------------------------------------------------------------

    def _build(self, encoder: Encoder, names: Sequence[str]) -> nn.Module:
        check_choice("transfer", self.transfer, TRANSFERS)
        decoder = MaskDecoder(map_channels(encoder, self.sides), width=self.width, queries=self.queries)
        transfer = None if self.transfer == "none" else Transfer(encoder.dim, self.transfer)
        return MaftParts(decoder, WordHead(self.width, encoder.dim), transfer)

    def _learns(self, encoder: Encoder) -> Sequence[str]:
        if not self.tower or not (self.quality or self.compensation):
            return ()
        still = ("visual.projection.", "visual.norm_post.", "visual.memory.", "visual.pool.")
        names = [name for name, _ in encoder.named_parameters()]
        return ["!visual.*", *(f"{s}*" for s in still if any(name.startswith(s) for name in names))]

    def _rates(self, encoder: Encoder) -> Mapping[str, float]:
        return {"visual.*": 0.1} if self._learns(encoder) else {}

    def _train(self, base: Encoder, items: Sequence[Item], progress: bool | None) -> None:
        self._teacher = copy.deepcopy(base)
        try:
            super()._train(base, items, progress)
        finally:
            del self._teacher

    def _losses(
        self, parts: Any, encoder: Encoder, images: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        hidden = enter(encoder, images, sides=self.sides)
        maps = [m.detach() for m in tower_maps(hidden)]
        words = self.words_.to(images.device)
        proposals = parts.decoder(maps)
        losses = proposal_losses(proposals, lambda q: parts.head(q, words), labels, MaskCriterion())
        trunk = value_map(hidden)
        if self.quality:
            likely = self._named(parts, encoder, hidden, trunk, proposals.masks.detach(), words).softmax(-1)
            losses["quality"] = self.quality * quality_loss(likely, proposals.masks.detach(), labels)
        if self.compensation:
            with torch.no_grad():
                before = value_map(enter(self._teacher.to(images.device), images, memory=False))
            losses["compensation"] = self.compensation * compensation_loss(trunk, before)
        return losses

    # -- naming --------------------------------------------------------------------------------------------------

    def _named(
        self, parts: Any, encoder: Encoder, hidden: Hidden, trunk: torch.Tensor, masks: torch.Tensor,
        words: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Logits (B, Q, K) of CLIP for masks (B, Q, h, w), without void."""
        vectors = F.normalize(mask_vectors(hidden, masks, trunk), dim=-1)
        rows = parts.head.rows(words)
        if parts.transfer is None:
            moved = rows.expand(len(vectors), -1, -1)
        else:
            cells = cell_vectors(hidden, trunk).flatten(1, 2)
            places = sine_positions(trunk.shape[2], trunk.shape[3], 4 * -(-cells.shape[-1] // 4))[:, : cells.shape[-1]]
            moved = parts.transfer(rows, F.normalize(cells, dim=-1), places.to(cells))
        scale = encoder.log_scale.detach().exp().clamp(max=100)
        return scale * torch.einsum("bqd,bkd->bqk", vectors, F.normalize(moved, dim=-1))[..., :-1]

    # -- as a dense method ---------------------------------------------------------------------------------------

    def features(self, hidden: Hidden) -> torch.Tensor:
        """A map (B, h, w, dim) of the tuned tower, not normalised."""
        return cell_vectors(hidden, value_map(hidden))

    def local(self, hidden: Hidden, words: torch.Tensor) -> torch.Tensor:
        """The semantic map (B, K, h, w)."""
        parts: Any = self.parts_
        found = parts.decoder(tower_maps(hidden))
        void = parts.head(found.queries, self.words_).softmax(-1)[..., -1:]
        likely = self._named(parts, self.encoder_, hidden, value_map(hidden), found.masks, words.to(void)).softmax(-1)
        return semantic_map(likely * (1 - void), found.masks)

    def probabilities(self, scores: torch.Tensor, scale: float) -> torch.Tensor:
        """Shares of the semantic map; `scale` is for cosines."""
        return share(scores)


def value_map(hidden: Hidden) -> torch.Tensor:
    """The trunk's output (B, width, h, w): in the last block patches attend to themselves; of a ResNet its last map."""
    if not hasattr(hidden.visual, "blocks"):
        return hidden.inputs[-1].transpose(1, 2).unflatten(2, hidden.grid)
    tokens = hidden.finish(hidden.attend("identity"))[:, hidden.prefix :]
    return tokens.transpose(1, 2).unflatten(2, hidden.grid)


def cell_vectors(hidden: Hidden, trunk: torch.Tensor) -> torch.Tensor:
    """What a tower says of every cell of a trunk's map (B, width, h, w): (B, h, w, dim), not normalised."""
    recall = () if hidden.embedded is None else (hidden.embedded,)
    return hidden.visual.project(trunk.flatten(2).transpose(1, 2), *recall).unflatten(1, hidden.grid)


def mask_vectors(hidden: Hidden, masks: torch.Tensor, trunk: torch.Tensor | None = None) -> torch.Tensor:
    """What a tower says of masks: means of its trunk's map under each, through its head; not normalised.

    Parameters
    ----------
    hidden : of the images
    masks : (B, Q, h, w), logits
    trunk : (B, width, h, w), by default `value_map` of the images

    Returns
    -------
    (B, Q, dim)
    """
    pooled = mask_pool(value_map(hidden) if trunk is None else trunk, masks)
    if hidden.embedded is None:
        return hidden.visual.project(pooled)
    stem = hidden.embedded.transpose(1, 2).unflatten(2, hidden.grid)
    return hidden.visual.project(pooled, mask_pool(stem, masks))


def quality_loss(likely: torch.Tensor, masks: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """SmoothL1 between a mask's probability of a segment's class and its IoU with the segment, brought to [0, 1].

    Parameters
    ----------
    likely : (B, Q, K), probabilities of every mask
    masks : (B, Q, h, w), logits; no gradient
    labels : int64 (B, H, W), 255 where there is none
    """
    found = []
    for one, maps, truth in zip(likely, masks.detach(), labels, strict=True):
        points = draw_points(truth, POINTS)
        if not len(points):
            continue
        classes, targets = segments(truth.flatten()[points])
        overlap = soft_iou(at_points(maps, points, (truth.shape[0], truth.shape[1])).sigmoid(), targets.to(maps))
        found.append(F.smooth_l1_loss(one[:, classes], unit_range(overlap), reduction="none").mean(0))
    return torch.cat(found).mean() if found else likely.sum() * 0


def unit_range(values: torch.Tensor) -> torch.Tensor:
    """Columns (Q, M) brought to [0, 1] over their rows; 0 where all are alike.

    >>> unit_range(torch.tensor([[0.2, 0.5], [0.6, 0.5]]))
    tensor([[0., 0.],
            [1., 0.]])
    """
    low, high = values.amin(0), values.amax(0)
    return (values - low) / (high - low).clamp(min=1e-8)


def compensation_loss(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """SmoothL1 between what two maps (B, C, h, w) hold in pools of several sizes, their negative parts left out."""
    return F.smooth_l1_loss(strip_sums(now.relu()), strip_sums(before.relu()))


def strip_sums(maps: torch.Tensor, scales: Sequence[int] = SCALES) -> torch.Tensor:
    """Means over w // s pixels each way, summed over rows and over columns, of every scale, in one row: (B, n).

    A map that is not square is brought to its longer side first.

    >>> strip_sums(torch.full((1, 1, 4, 4), 3.0), (1, 2))
    tensor([[3., 3., 6., 6., 6., 6.]])
    """
    side = max(maps.shape[-2:])
    if maps.shape[-1] != maps.shape[-2]:
        maps = F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)
    if side < max(scales):
        raise ClipworksError(f"a map must have at least {max(scales)} cells along a side. Got {side}.")
    parts = []
    for scale in scales:
        pooled = F.avg_pool2d(maps, side // scale)
        parts += [pooled.sum(2).flatten(1), pooled.sum(3).flatten(1)]
    return torch.cat(parts, dim=1)
