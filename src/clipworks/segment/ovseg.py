"""OVSeg: masks are proposed, and CLIP names each one from its crop, with learned tokens where the crop is blank.

Claim: what is weak in naming masks with CLIP is CLIP on blanked-out images; fine-tuning it on masked crops, or learning
tokens for the blank patches alone, repairs that: 29.6 mIoU on ADE20K-150 without its labels (its repository).

Formula: proposals of a decoder, p_q = softmax(100 cos(query, [words; none])); crop of mask_q, blank outside;
x_j <- m_j x_j + (1 - m_j) P_0j before the positions, and again with P_d behind block d < depth, m_j = 1 where the mask
touches patch j;  c_q = softmax(scale cos(crop, words));  p = p_q^(1 - l) c_q^l;
S(class) = sum_q p(class) sigmoid(mask_q). P learns by the symmetric contrast of crops and words, all else frozen.

Paper: Liang et al. 2023, Open-Vocabulary Semantic Segmentation with Mask-adapted CLIP (CVPR).
Differs from the paper: the proposals come from a small decoder on the frozen tower's own maps, not from a MaskFormer of
its own; the pairs are segments with their names, and with `nouns` the proposal that CLIP finds nearest to each noun of
a caption (words are handed over, not parsed); pairs of a batch that share a word are all right answers; a crop is
blanked after it is resized, so that no pixel mixes both; the tower itself is not fine-tuned; l is 0.5 for every data
set (official: chosen on each), depth, start and threshold are the official code's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.item import Item
from ..errors import ClipworksError, check_range
from ..metrics.segmentation import IGNORE
from ..pretraining.parts import need_vit
from ..registry import method
from ..zeroshot.classifier import class_vectors
from .common import Hidden, enter
from .mask_decoder import MaskDecoder, WordHead, map_channels, semantic_map, share, tower_maps
from .mask_losses import MaskCriterion, proposal_losses
from .trained import TrainedDense

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

BINARY = 0.4  # probability from which on a pixel belongs to a proposal (official)
STD = 0.02  # of the tokens' start (official)
SMALLEST = 0.01  # share of a crop's pixels that a training segment must have
SENTENCE = "a photo of a {}."  # around a noun (mined pairs)


class MaskPrompts(nn.Module):
    """Learned tokens for the blank patches of a masked crop.

    Parameters
    ----------
    depth : blocks that see them; those behind the first block take the place of what they have become
    patches : of the tower's grid
    width : channels of a token
    """

    def __init__(self, depth: int, patches: int, width: int):
        super().__init__()
        self.tokens = nn.Parameter(STD * torch.randn(depth, patches, width))

    def forward(self, visual: Any, pixels: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Vectors (B, dim) of preprocessed crops (B, 3, size, size), not normalised; `keep` (B, patches) is 0 or 1."""
        stem = visual.stem(pixels)
        keep = keep.to(stem)[..., None]
        blank = (1 - keep) * self.tokens[:, None].to(stem)
        embedded = keep * stem.flatten(2).transpose(1, 2) + blank[0]
        maps = embedded.transpose(1, 2).unflatten(2, stem.shape[-2:])
        if len(blank) == 1:
            return visual.run(embeddings=maps).pooled
        x = visual.run(embeddings=maps, stop=1).tokens
        for number, block in enumerate(visual.blocks[1:], 1):
            if number < len(blank):
                x = torch.cat([x[:, :1], keep * x[:, 1:] + blank[number]], dim=1)
            x = block(x)[0]
        return visual.project(x[:, 0], embedded.mean(1))


class OVSegParts(nn.Module):
    """The proposals' decoder with its head, and the tokens."""

    def __init__(self, decoder: MaskDecoder, head: WordHead, prompts: MaskPrompts):
        super().__init__()
        self.decoder, self.head, self.prompts = decoder, head, prompts


@method(card="ovseg", level="MR")
class OVSeg(TrainedDense):
    """Proposals, named by CLIP from masked crops with mask prompts.

    Parameters
    ----------
    encoder : a name, a path or an encoder with a class token (default: the bundled one)
    balance : l, weight of CLIP's probabilities against the decoder's in the geometric mean, from 0 to 1
    depth : blocks that see the learned tokens; 0 leaves blank patches as they are
    queries : proposals
    width : channels of the decoder
    steps, batch_size, lr : of the decoder (paper: 120,000 steps of 32 at 6e-5)
    prompt_steps, prompt_lr : of the tokens (official: 5 epochs at 0.05)
    side : of the training crops in pixels (default: twice the encoder's image size)
    seed : of the start, the order and the crops

    Inputs
    ------
    images and label maps; nouns of captions where there are some; any names afterwards

    Relations
    ---------
    `maft_plus` changes the tower in the place of the crops. With `depth=0` and `balance=1` it is plain CLIP on masked
    crops.

    References
    ----------
    Liang et al. 2023, Open-Vocabulary Semantic Segmentation with Mask-adapted CLIP (CVPR)

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> images, masks = torch.rand(3, 3, 16, 24), torch.zeros(3, 16, 24, dtype=torch.long)
    >>> masks[:, :, 12:] = 1
    >>> model = OVSeg(toy_encoder(), depth=2, steps=2, prompt_steps=2, queries=3, width=8)
    >>> model.fit(images, masks, ["sky", "sea"]).predict(images).shape
    (3, 16, 24)
    """

    def __init__(
        self,
        encoder: Any = None,
        balance: float = 0.5,
        depth: int = 3,
        queries: int = 20,
        width: int = 128,
        steps: int = 1000,
        batch_size: int = 8,
        lr: float = 1e-3,
        prompt_steps: int = 200,
        prompt_lr: float = 0.05,
        side: int | None = None,
        seed: int = 0,
    ):
        self.encoder, self.balance, self.depth, self.queries, self.width = encoder, balance, depth, queries, width
        self.steps, self.batch_size, self.lr = steps, batch_size, lr
        self.prompt_steps, self.prompt_lr, self.side, self.seed = prompt_steps, prompt_lr, side, seed

    # -- what is learned -----------------------------------------------------------------------------------------

    def fit(
        self, images: Any, masks: Any, names: Sequence[str], *, nouns: Sequence[Sequence[str]] | None = None,
        progress: bool | None = None,
    ) -> OVSeg:  # fmt: skip
        """Learn from images whose pixels have names.

        Parameters
        ----------
        images, masks, names, progress : as for `TrainedDense.fit`
        nouns : for every image the nouns of its caption; the tokens then learn from the proposals nearest to them too
        """
        self._nouns = nouns
        try:
            return super().fit(images, masks, names, progress=progress)
        finally:
            del self._nouns

    def _build(self, encoder: Encoder, names: Sequence[str]) -> nn.Module:
        need_vit(encoder, "ovseg", class_token=True)
        check_range("balance", self.balance, 0, 1)
        check_range("depth", self.depth, 0, len(encoder.visual.blocks))
        grid, width = encoder.visual.grid, encoder.config.vision.width
        decoder = MaskDecoder(map_channels(encoder, self.sides), width=self.width, queries=self.queries)
        prompts = MaskPrompts(max(1, self.depth), grid[0] * grid[1], width)
        return OVSegParts(decoder, WordHead(self.width, encoder.dim), prompts)

    def _losses(
        self, parts: Any, encoder: Encoder, images: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Losses of the proposals; class cross-entropy 1, masks 20, dice 1 as in MaskFormer."""
        with torch.no_grad():
            maps = tower_maps(enter(encoder, images, sides=self.sides, memory=False))
        words = self.words_.to(images.device)
        criterion = MaskCriterion(1.0, 20.0, 1.0, gamma=2.0, alpha=0.25)
        return proposal_losses(parts.decoder(maps), lambda queries: parts.head(queries, words), labels, criterion)

    def _train(self, base: Encoder, items: Sequence[Item], progress: bool | None) -> None:
        parts: Any = self._built(base)
        self._run(base, items, parts, self._losses, progress)
        losses = self.losses_
        if self.depth and self.prompt_steps:
            words, pairs = self.words_, list(items)
            if self._nouns is not None:
                further, mined = self._mined(base, items)
                words, pairs = torch.cat([words, further.to(words)]), pairs + mined

            def contrast(prompts: Any, encoder: Encoder, images: torch.Tensor, labels: torch.Tensor) -> dict:
                return self._contrast(prompts, encoder, images, labels, words.to(images.device))

            prompts = parts.prompts.requires_grad_(True)
            self._run(base, pairs, prompts, contrast, progress, steps=self.prompt_steps, lr=self.prompt_lr,
                      weight_decay=0.0, classes=len(words))  # fmt: skip
            losses = {**losses, "contrast": self.losses_["loss"]}
        self._take(base, parts, losses)

    def _contrast(
        self, prompts: Any, encoder: Encoder, images: torch.Tensor, labels: torch.Tensor, words: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The contrast of a batch's segments, as masked crops, with their words."""
        crops, classes = [], []
        for image, truth in zip(images, labels, strict=True):
            for label in truth.unique().tolist():
                mask = truth == label
                if label != IGNORE and float(mask.float().mean()) >= SMALLEST:
                    crops.append(masked_crop(image, mask, encoder))
                    classes.append(label)
        if not classes:
            return {"contrast": prompts.tokens.sum() * 0}
        pixels, keeps = zip(*crops, strict=True)
        vectors = F.normalize(prompts(encoder.visual, torch.stack(pixels), torch.stack(keeps)), dim=-1)
        scale = encoder.log_scale.detach().exp()
        return {"contrast": word_contrast(vectors, words, torch.tensor(classes, device=images.device), scale)}

    def _mined(self, base: Encoder, items: Sequence[Item]) -> tuple[torch.Tensor, list[Item]]:
        """Vectors of the further words, and items whose label maps hold the proposal of every noun."""
        nouns: Any = self._nouns
        if len(nouns) != len(items):
            raise ClipworksError(f"nouns must be a list of words for every image ({len(items)}). Got {len(nouns)}.")
        vocabulary = sorted({noun for found in nouns for noun in found})
        if not vocabulary:
            return self.words_[:0], []
        check_range("the number of names and nouns together", len(self.names_) + len(vocabulary), 1, IGNORE)
        rows = class_vectors(vocabulary, base, templates=SENTENCE).to(base.dtype)
        made = []
        for item, own in zip(items, nouns, strict=True):
            if not own:
                continue
            pixels = torch.from_numpy(np.asarray(item.decode()).copy()).permute(2, 0, 1) / 255
            wanted = [vocabulary.index(noun) for noun in own]
            masks, vectors = self._proposed(base, pixels)
            labels = np.full(tuple(pixels.shape[1:]), IGNORE, np.uint8)
            for place, best in zip(wanted, nearest(vectors, rows[wanted]).tolist(), strict=True):
                labels[masks[best].numpy()] = len(self.names_) + place
            made.append(Item(f"{item.key}, nouns", item.image, columns={"labels": labels}))
        return rows, made

    @torch.no_grad()
    def _proposed(self, base: Encoder, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The proposals of an image (3, H, W) that are somewhere, bool (Q, H, W), and their crops' unit vectors."""
        patch, size = base.config.vision.patch_size, image.shape[1:]
        sides = [max(patch, round(n * 2 * base.image_size / min(size) / patch) * patch) for n in size]
        resized = F.interpolate(image[None].to(base.dtype), sides, mode="bilinear", antialias=True)
        parts: Any = self.parts_
        found = parts.decoder(tower_maps(enter(base, resized, sides=self.sides, memory=False)))
        masks = (F.interpolate(found.masks, size, mode="bilinear", align_corners=False)[0].sigmoid() > BINARY).cpu()
        masks = masks[masks.flatten(1).any(1)]
        if not len(masks):
            masks = torch.ones(1, *size, dtype=torch.bool)
        return masks, F.normalize(self._named(image, masks), dim=-1).cpu()

    # -- as a dense method ---------------------------------------------------------------------------------------

    def _named(self, image: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Vectors (Q, dim) of an image (3, H, W) under masks, bool (Q, H, W), of which each is somewhere."""
        encoder, image = self.encoder_, image.to(masks.device)
        crops, keeps = zip(*(masked_crop(image, mask, encoder) for mask in masks), strict=True)
        keep = torch.stack(keeps) if self.depth else torch.ones_like(torch.stack(keeps))
        parts: Any = self.parts_
        return parts.prompts(encoder.visual, torch.stack(crops).to(encoder.device), keep)

    def features(self, hidden: Hidden) -> torch.Tensor:
        """A map (B, h, w, dim) of the decoder's embeddings, each weighted by its mask; not normalised."""
        parts: Any = self.parts_
        found = parts.decoder(tower_maps(hidden))
        return parts.head.painted(found)

    def local(self, hidden: Hidden, words: torch.Tensor) -> torch.Tensor:
        """The semantic map (B, K, h, w)."""
        parts: Any = self.parts_
        found = parts.decoder(tower_maps(hidden))
        likely = parts.head(found.queries, words).softmax(-1)[..., :-1]
        scale = self.encoder_.logit_scale
        size = hidden.images.shape[-2:]
        for number, (image, maps) in enumerate(zip(hidden.images, found.masks, strict=True)):
            masks = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0].sigmoid() > BINARY
            there = masks.flatten(1).any(1)
            clip = torch.ones_like(likely[number])
            if self.balance and bool(there.any()):
                vectors = F.normalize(self._named(image, masks[there]).float(), dim=-1)
                clip[there] = (scale * vectors @ words.to(vectors).T).softmax(-1).to(clip)
            likely[number] = ensemble(likely[number], clip, self.balance)
        return semantic_map(likely, found.masks)

    def probabilities(self, scores: torch.Tensor, scale: float) -> torch.Tensor:
        """Shares of the semantic map; `scale` is for cosines."""
        return share(scores)


def masked_crop(image: torch.Tensor, mask: torch.Tensor, encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """The box of a mask, preprocessed and blank outside of it, and which patches it touches.

    Parameters
    ----------
    image : (3, H, W), RGB in [0, 1]
    mask : bool (H, W), somewhere True
    encoder : says size, mean and deviation

    Returns
    -------
    (3, size, size), exactly 0 outside of the mask; float (patches,) of 0 and 1
    """
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    size, config = encoder.image_size, encoder.config.preprocess
    mean, std = (torch.tensor(v, device=image.device)[:, None, None] for v in (config.mean, config.std))
    crop = image[:, box[0], box[1]][None].float()
    pixels = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
    inside = F.interpolate(mask[box][None, None].float(), (size, size), mode="nearest-exact")[0]
    return (inside * (pixels - mean) / std).to(encoder.dtype), patch_mask(inside[0], encoder.config.vision.patch_size)


def patch_mask(mask: torch.Tensor, patch: int) -> torch.Tensor:
    """1 for every patch that a mask (H, W) of 0 and 1 touches: the ceiling of its mean; (patches,).

    >>> patch_mask(torch.tensor([[0.0, 0, 0, 0], [0, 1, 0, 0]]), 2)
    tensor([1., 0.])
    """
    return F.avg_pool2d(mask[None, None], patch).ceil().flatten()


def ensemble(own: torch.Tensor, clip: torch.Tensor, balance: float) -> torch.Tensor:
    """The geometric mean own^(1 - l) clip^l, not brought to sum 1.

    >>> ensemble(torch.tensor([0.25]), torch.tensor([1.0]), 0.5)
    tensor([0.5000])
    """
    return own ** (1 - balance) * clip**balance


def word_contrast(
    vectors: torch.Tensor, words: torch.Tensor, classes: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """Half of the cross-entropies both ways between unit vectors (n, dim) and the words (K, dim) of their classes.

    Words are those in the batch; all vectors of a word are its right answers, in equal shares.
    """
    found, places = classes.unique(return_inverse=True)
    logits = scale * vectors @ words[found].to(vectors).T
    right = F.one_hot(places, len(found)).to(logits)
    to_images = -(right / right.sum(0) * logits.log_softmax(0)).sum(0).mean()
    return (F.cross_entropy(logits, places) + to_images) / 2


def nearest(vectors: torch.Tensor, nouns: torch.Tensor) -> torch.Tensor:
    """For every noun (N, dim) the proposal (Q, dim) of the greatest cosine, both of unit rows: int64 (N,)."""
    return (nouns.to(vectors) @ vectors.T).argmax(1)
