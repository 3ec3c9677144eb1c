"""FrozenSeg: a frozen CLIP names, a frozen model that sees borders helps to draw, and only a mask decoder learns.

Claim: features of a second frozen model (the paper's SAM), put into queries and CLIP's map, and its own masks at test
time, find classes that were never trained: 34.4 mIoU on ADE20K where FC-CLIP has 34.1, but 25.9 PQ for 26.8.

Formula: x <- x + MHA(LN(x), s, s) for CLIP's map x and the second model's cells s;  behind every layer
q <- q + W MaskPool(s, mask_q);  in = softmax(z cos(head(q), T)),  void apart;  out = softmax(scale cos(f_q, T)), f_q
the mean of CLIP's map under mask_q;  p = in^(1-a) out^a for seen classes, in^(1-b) out^b for others, times (1 - void);
S(class) = sum_q p_q(class) sigmoid(mask_q); with masks of the second model, of which those count that show an unseen
class with a probability above 0.5:  S <- (1 - 0.2) S + 0.2 S' for unseen classes.

Paper: Chen et al. 2024, FrozenSeg: Harmonizing Frozen Foundation Models for Open-Vocabulary Segmentation
(arXiv:2409.03525); its base is FC-CLIP, Yu et al. 2023, Convolutions Die Hard (NeurIPS).
Differs from the paper: any provider of `segment.affinity` is the second model, by default the tower's own stem; a small
decoder of one scale, so the map is injected once and the queries behind each layer; both injections start from nothing
and have no norm behind the sum, so that without them it is the base; a ViT's map is the last block's with every patch
attending to itself; an asked word is seen if its vector is that of a fitted name; no proposal, no mixing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..encoders.layers import Attention
from ..errors import ClipworksError, check_range
from ..registry import method
from .affinity import features_of, provider
from .common import Hidden, enter
from .mask_decoder import MaskDecoder, Proposals, WordHead, map_channels, mask_pool, semantic_map, share, tower_maps
from .mask_losses import MaskCriterion, proposal_losses
from .pmp import mask_vectors
from .trained import TrainedDense

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

HEADS = 4
SCALE = 1 / 0.07  # of the decoder's cosines at the start
SAME = 0.99  # cosine of an asked word with a fitted one from which on it is seen
QUALITY, STABLE, SMALLEST, LARGEST = 0.8, 0.7, 100, 50  # of the second model's masks: IoU, stability, pixels, number


class QueryInjector(nn.Module):
    """What the second model sees under a query's mask, added to the query.

    Parameters
    ----------
    channels : of the second model's map
    width : of the queries
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear = nn.Linear(channels, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, queries: torch.Tensor, maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Queries (B, Q, width), the map (B, channels, h, w) and masks (B, Q, h', w') to queries."""
        return queries + self.linear(mask_pool(maps, masks.detach()))


class FeatureInjector(nn.Module):
    """CLIP's cells look at the second model's.

    Parameters
    ----------
    width : channels of CLIP's map
    channels : of the second model's
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm, self.cells = nn.LayerNorm(width), nn.Linear(channels, width)
        self.attention = Attention(width, HEADS)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.attention.out.bias)

    def forward(self, x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Maps (B, width, h, w) and (B, channels, h', w') to one like the first."""
        tokens, cells = (m.flatten(2).transpose(1, 2) for m in (x, maps))
        seen = self.attention(self.norm(tokens), self.cells(cells))[0]
        return x + seen.transpose(1, 2).unflatten(2, x.shape[2:])


class FrozenSegParts(nn.Module):
    """The decoder with its head and scale, and the injectors."""

    def __init__(self, decoder: MaskDecoder, head: WordHead, clip: int, channels: int, width: int):
        super().__init__()
        self.decoder, self.head = decoder, head
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        self.into_map = FeatureInjector(clip, channels)
        self.into_queries = nn.ModuleList(QueryInjector(channels, width) for _ in decoder.layers)

    def forward(self, maps: Sequence[torch.Tensor], second: torch.Tensor) -> Proposals:
        """Proposals from CLIP's maps, coarse to fine, and the second model's (B, channels, h, w)."""
        first = self.into_map(maps[0], second)

        def change(number: int, queries: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
            return self.into_queries[number](queries, second, masks)

        return self.decoder([first, *maps[1:]], change)

    def logits(self, queries: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """(B, Q, width) and unit rows (K, dim) to (B, Q, K + 1), the last column is void."""
        return self.log_scale.exp().clamp(max=100) * self.head(queries, words)


@method(card="frozenseg", level="M")
class FrozenSeg(TrainedDense):
    """A mask decoder on a frozen CLIP and a second frozen model.

    Parameters
    ----------
    encoder : a name, a path or an encoder (default: the bundled one)
    spatial : the second model: "own" (the tower's stem) or "hf:organisation/name", see `segment.affinity`
    seen, unseen : a and b, weight of CLIP's probabilities in the geometric mean, for classes that were trained and for
        others
    proposals : a SAM (`prompts.open_sam`) whose own masks are mixed in; None mixes none
    mix : weight of these for unseen classes
    queries : proposals of the decoder (paper: 250)
    width : channels of the decoder
    steps, batch_size, lr : of AdamW with warm-up and cosine (paper: 368,750 steps of 16 at 1e-4)
    side : of the training crops in pixels (default: twice the encoder's image size)
    seed : of the start, the order and the crops

    Inputs
    ------
    images and label maps; any names afterwards

    Relations
    ---------
    Without the injectors it is FC-CLIP. `pmp` puts words into the queries, `maft_plus` tunes the tower.

    References
    ----------
    Chen et al. 2024, FrozenSeg: Harmonizing Frozen Foundation Models for Open-Vocabulary Segmentation

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> images, masks = torch.rand(3, 3, 16, 24), torch.zeros(3, 16, 24, dtype=torch.long)
    >>> masks[:, :, 12:] = 1
    >>> model = FrozenSeg(toy_encoder(), steps=2, queries=3, width=8).fit(images, masks, ["sky", "sea"])
    >>> model.predict(images).shape
    (3, 16, 24)
    """

    def __init__(
        self,
        encoder: Any = None,
        spatial: str = "own",
        seen: float = 0.4,
        unseen: float = 0.8,
        proposals: str | None = None,
        mix: float = 0.2,
        queries: int = 20,
        width: int = 128,
        steps: int = 1000,
        batch_size: int = 8,
        lr: float = 1e-3,
        side: int | None = None,
        seed: int = 0,
    ):
        self.encoder, self.spatial, self.seen, self.unseen = encoder, spatial, seen, unseen
        self.proposals, self.mix, self.queries, self.width = proposals, mix, queries, width
        self.steps, self.batch_size, self.lr, self.side, self.seed = steps, batch_size, lr, side, seed

    # -- what is learned -----------------------------------------------------------------------------------------

    def _bind(self, base: Encoder) -> None:
        for name in ("seen", "unseen", "mix"):
            check_range(name, getattr(self, name), 0, 1)
        if not isinstance(self.spatial, str):
            raise ClipworksError(f"spatial must be 'own' or 'hf:organisation/name'. Got {self.spatial!r}.")
        self._provider = provider(self.spatial)

    @torch.no_grad()
    def _build(self, encoder: Encoder, names: Sequence[str]) -> nn.Module:
        size, channels = encoder.image_size, map_channels(encoder, self.sides)
        black = torch.zeros(1, 3, size, size)
        second = self._second(enter(encoder, black, sides=self.sides, memory=False)).shape[1]
        decoder = MaskDecoder(channels, width=self.width, queries=self.queries, heads=HEADS)
        return FrozenSegParts(decoder, WordHead(self.width, encoder.dim, scale=1.0), channels[0], second, self.width)

    def _second(self, hidden: Hidden) -> torch.Tensor:
        """The second model's map (B, channels, h, w), without gradient."""
        with torch.no_grad():
            return features_of(self._provider, hidden).permute(0, 3, 1, 2).detach()

    def _losses(
        self, parts: Any, encoder: Encoder, images: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            hidden = enter(encoder, images, sides=self.sides, memory=False)
            maps = tower_maps(hidden)
        words = self.words_.to(images.device)
        found = parts(maps, self._second(hidden).to(maps[0]))
        return proposal_losses(found, lambda queries: parts.logits(queries, words), labels, MaskCriterion())

    # -- as a dense method ---------------------------------------------------------------------------------------

    def _proposed(self, hidden: Hidden) -> Proposals:
        parts: Any = self.parts_
        maps = tower_maps(hidden)
        return parts(maps, self._second(hidden).to(maps[0]))

    def features(self, hidden: Hidden) -> torch.Tensor:
        """A map (B, h, w, dim) of the decoder's embeddings, each weighted by its mask; not normalised."""
        parts: Any = self.parts_
        found = self._proposed(hidden)
        embedded = F.normalize(parts.head.embed(found.queries), dim=-1)
        return torch.einsum("bqd,bqhw->bhwd", embedded, found.masks.sigmoid())

    def local(self, hidden: Hidden, words: torch.Tensor) -> torch.Tensor:
        """The semantic map (B, K, h, w)."""
        parts: Any = self.parts_
        found = self._proposed(hidden)
        logits = parts.logits(found.queries, words)
        void = logits.softmax(-1)[..., -1:]
        own, clip = logits[..., :-1].softmax(-1), self._clip(hidden, found.masks, words).to(logits)
        likely = geometric_ensemble(own, clip, is_seen(words, self.words_), self.seen, self.unseen)
        return semantic_map(likely * (1 - void), found.masks)

    def whole(self, average: torch.Tensor, image: torch.Tensor, encoder: Any, words: torch.Tensor) -> torch.Tensor:
        """The semantic map (K, h, w) of an image, with the second model's masks mixed in."""
        if self.proposals is None or not self.mix:
            return average
        masks = self._masks(image)
        if not len(masks):
            return average
        hidden = enter(encoder, image[None], sides=self.sides)
        drawn = torch.from_numpy(masks).to(average)
        likely = self._clip(hidden, 2 * drawn[None] - 1, words)[0].to(average)
        covered = F.interpolate(drawn[None], average.shape[-2:], mode="area")[0]
        return mixed(average, covered, likely, is_seen(words, self.words_), self.mix)

    def _masks(self, image: torch.Tensor) -> np.ndarray:
        """The second model's own masks of an image (3, H, W), bool (N, H, W), the largest first."""
        from .prompts import open_sam
        from .proposals import point_masks

        if not hasattr(self, "_sam"):
            self._sam = open_sam(str(self.proposals))
        size = (image.shape[1], image.shape[2])
        found = point_masks(self._sam(255 * image.cpu()), size, quality=QUALITY, stable=STABLE)
        areas = found.sum((1, 2))
        order = np.argsort(-areas, kind="stable")[:LARGEST]
        return found[order[areas[order] >= SMALLEST]]

    def _clip(self, hidden: Hidden, masks: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, Q, K) of CLIP's features under masks, without void."""
        vectors = F.normalize(mask_vectors(hidden, masks).float(), dim=-1)
        return (min(self.encoder_.logit_scale, 100.0) * vectors @ words.to(vectors).T).softmax(-1)

    def probabilities(self, scores: torch.Tensor, scale: float) -> torch.Tensor:
        """Shares of the semantic map; `scale` is for cosines."""
        return share(scores)


def is_seen(words: torch.Tensor, fitted: torch.Tensor) -> torch.Tensor:
    """Which of asked words are fitted names, by their unit rows (K, dim) and (F, dim): bool (K,).

    >>> is_seen(torch.eye(3)[:2], torch.eye(3)[1:])
    tensor([False,  True])
    """
    return (words.float() @ fitted.to(words.device).float().T).amax(1) > SAME


def geometric_ensemble(
    own: torch.Tensor, clip: torch.Tensor, seen: torch.Tensor, a: float = 0.4, b: float = 0.8
) -> torch.Tensor:
    """own^(1-a) clip^a for seen classes, own^(1-b) clip^b for others; (..., K), not brought to sum 1.

    >>> own, clip = torch.tensor([0.25, 0.25]), torch.tensor([1.0, 1.0])
    >>> geometric_ensemble(own, clip, torch.tensor([True, False]), 0.0, 0.5)
    tensor([0.2500, 0.5000])
    """
    power = torch.where(seen, a, b).to(own)
    return own ** (1 - power) * clip**power


def mixed(
    semantic: torch.Tensor, masks: torch.Tensor, likely: torch.Tensor, seen: torch.Tensor, mix: float = 0.2,
    sure: float = 0.5,
) -> torch.Tensor:  # fmt: skip
    """A semantic map (K, h, w) with masks of another model mixed in, for unseen classes alone.

    Parameters
    ----------
    semantic : (K, h, w)
    masks : (N, h, w), in [0, 1]
    likely : (N, K), probabilities of the masks
    seen : bool (K,)
    mix : weight of the masks; 0 gives the map back
    sure : probability of the best unseen class above which a mask counts; without any the map is given back
    """
    kept = likely.masked_fill(seen, 0).amax(1) > sure
    if not bool(kept.any()) or not mix:
        return semantic
    part = torch.einsum("nk,nhw->khw", likely[kept], masks[kept])
    return torch.where(seen[:, None, None], semantic, (1 - mix) * semantic + mix * part)
