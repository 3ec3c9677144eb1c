"""PMP: masks are proposed for the words that are asked, as the queries read them behind every layer of the decoder.

Claim: a mask that was never proposed cannot be named; proposals that depend on the words gain 1 to 3 mIoU over current
two-stage models on five benchmarks (abstract).

Formula: t_k = W LN(word_k);  behind layer d  Q <- Q + g_d MHA(LN(Q), t, t), g_d = 0 at first;
mask_q = <mlp(Q_q), pixels>;  p_q = softmax(100 cos(query, [words; none])),  c_q = softmax(scale cos(f_q, words)),
f_q = mean of CLIP's map under mask_q;  S(class) = sum_q p_q(class)^(1 - l) c_q(class)^l sigmoid(mask_q).

Paper: Li et al. 2024, Prompt-Guided Mask Proposal for Two-Stage Open-Vocabulary Segmentation (arXiv:2412.10292).
Differs from the paper: no code was released and only the abstract was at hand. Ours are: one vector per word, the place
behind each layer, the norm inside the sum and the gate (a host decoder is left as it is at the start), words shown
beside those of a batch and drawn anew at every step, long lists in parts whose proposals are merged. The host is a
small decoder on the frozen tower's maps; stage two names masks by CLIP's features under them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..encoders.layers import Attention
from ..errors import check_range
from ..metrics.segmentation import IGNORE
from ..registry import method
from .common import Hidden, enter
from .maft_plus import mask_vectors
from .mask_decoder import MaskDecoder, Proposals, WordHead, map_channels, semantic_map, share, tower_maps
from .mask_losses import MaskCriterion, proposal_losses
from .ovseg import ensemble
from .proposals import without_doubles
from .trained import TrainedDense

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

HEADS = 4
OVERLAP = 0.7  # IoU above which the lesser of two proposals of different parts of a list is a double


class Reader(nn.Module):
    """Queries read words: a gated sum that starts from nothing.

    Parameters
    ----------
    width, heads : of the queries
    """

    def __init__(self, width: int, heads: int = HEADS):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, queries: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Queries (B, Q, width) and words (B, K, width) to queries."""
        return queries + self.gate * self.attention(self.norm(queries), text)[0]


class PMPParts(nn.Module):
    """The decoder with its head, the words' way to it and a reader for every layer."""

    def __init__(self, decoder: MaskDecoder, head: WordHead, dim: int, width: int):
        super().__init__()
        self.decoder, self.head = decoder, head
        self.text = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.readers = nn.ModuleList(Reader(width) for _ in decoder.layers)

    def forward(self, maps: Sequence[torch.Tensor], words: torch.Tensor) -> Proposals:
        """Proposals for words (K, dim), or (B, K, dim) where every image has its own."""
        text = self.text(words).expand(len(maps[0]), -1, -1)
        return self.decoder(maps, lambda number, queries, _: self.readers[number](queries, text))


@method(card="pmp", level="M")
class PMP(TrainedDense):
    """Proposals that follow the words, named by the decoder and by CLIP's features under each mask.

    Parameters
    ----------
    encoder : a name, a path or an encoder (default: the bundled one)
    balance : l, weight of CLIP's probabilities against the decoder's in the geometric mean, from 0 to 1
    shown : names that are shown in training beside those of the batch, drawn anew at every step; None shows all
    chunk : words that the decoder is shown at a time; a longer list is asked in parts
    queries : proposals
    width : channels of the decoder
    steps, batch_size, lr : of AdamW with warm-up and cosine
    side : of the training crops in pixels (default: twice the encoder's image size)
    seed : of the start, the order and the crops

    Inputs
    ------
    images and label maps; any names afterwards. Proposals belong to the list of names: those of another are others

    Relations
    ---------
    With gates of 0 it is a decoder that does not know the words, whose masks are named as FC-CLIP names them.
    `denseclip` lets words look at the image, `maft_plus` moves them; here masks look at the words.

    References
    ----------
    Li et al. 2024, Prompt-Guided Mask Proposal for Two-Stage Open-Vocabulary Segmentation (arXiv:2412.10292)

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> images, masks = torch.rand(3, 3, 16, 24), torch.zeros(3, 16, 24, dtype=torch.long)
    >>> masks[:, :, 12:] = 1
    >>> model = PMP(toy_encoder(), steps=2, queries=3, width=8).fit(images, masks, ["sky", "sea"])
    >>> model.predict(images).shape
    (3, 16, 24)
    """

    def __init__(
        self,
        encoder: Any = None,
        balance: float = 0.5,
        shown: int | None = 8,
        chunk: int = 200,
        queries: int = 20,
        width: int = 128,
        steps: int = 1000,
        batch_size: int = 8,
        lr: float = 1e-3,
        side: int | None = None,
        seed: int = 0,
    ):
        self.encoder, self.balance, self.shown, self.chunk = encoder, balance, shown, chunk
        self.queries, self.width, self.steps = queries, width, steps
        self.batch_size, self.lr, self.side, self.seed = batch_size, lr, side, seed

    # -- what is learned -----------------------------------------------------------------------------------------

    def _build(self, encoder: Encoder, names: Sequence[str]) -> nn.Module:
        check_range("balance", self.balance, 0, 1)
        check_range("chunk", self.chunk, 1)
        if self.shown is not None:
            check_range("shown", self.shown, 0)
        decoder = MaskDecoder(map_channels(encoder, self.sides), width=self.width, queries=self.queries, heads=HEADS)
        return PMPParts(decoder, WordHead(self.width, encoder.dim), encoder.dim, self.width)

    def _losses(
        self, parts: Any, encoder: Encoder, images: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            maps = tower_maps(enter(encoder, images, sides=self.sides, memory=False))
        chosen, labels = shown_names(labels, len(self.names_), self.shown)
        words = self.words_.to(images.device)[chosen]
        return proposal_losses(parts(maps, words), lambda q: parts.head(q, words), labels, MaskCriterion())

    # -- as a dense method ---------------------------------------------------------------------------------------

    def features(self, hidden: Hidden) -> torch.Tensor:
        """A map (B, h, w, dim) of the decoder's embeddings for the fitted names, each weighted by its mask."""
        parts: Any = self.parts_
        found = parts(tower_maps(hidden), self.words_)
        return parts.head.painted(found)

    def local(self, hidden: Hidden, words: torch.Tensor) -> torch.Tensor:
        """The semantic map (B, K, h, w)."""
        parts: Any = self.parts_
        maps, words = tower_maps(hidden), words.to(self.words_)
        asked = [parts(maps, part) for part in words.split(self.chunk)]
        masks = torch.cat([one.masks for one in asked], dim=1)
        likely = parts.head(torch.cat([one.queries for one in asked], dim=1), words).softmax(-1)[..., :-1]
        if self.balance:
            likely = ensemble(likely, self._clip(hidden, masks, words), self.balance)
        if len(asked) > 1:
            likely = likely * merged(masks, likely)[..., None]
        return semantic_map(likely, masks)

    def _clip(self, hidden: Hidden, masks: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, Q, K) of CLIP's features under masks."""
        vectors = F.normalize(mask_vectors(hidden, masks).float(), dim=-1)
        return (self.encoder_.logit_scale * vectors @ words.to(vectors).T).softmax(-1).to(masks)

    def probabilities(self, scores: torch.Tensor, scale: float) -> torch.Tensor:
        """Shares of the semantic map; `scale` is for cosines."""
        return share(scores)


def shown_names(labels: torch.Tensor, names: int, shown: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Names of a batch and some others, in order, and the labels counted among these.

    Parameters
    ----------
    labels : int64 (B, H, W), 255 where there is none
    names : how many there are
    shown : how many of the others are drawn, by torch's generator; None takes all
    """
    if shown is None:
        return torch.arange(names), labels
    present = labels.unique()
    present = present[present != IGNORE].cpu()
    order = torch.randperm(names)
    others = order[~torch.isin(order, present)][:shown]
    chosen = torch.cat([present, others]).sort().values
    if not len(chosen):
        chosen = order[:1]
    table = torch.full((IGNORE + 1,), IGNORE, dtype=labels.dtype)
    table[chosen] = torch.arange(len(chosen), dtype=labels.dtype)
    return chosen, table.to(labels.device)[labels]


def merged(masks: torch.Tensor, likely: torch.Tensor, overlap: float = OVERLAP) -> torch.Tensor:
    """1 for every proposal (B, Q) that stays, 0 for doubles of one that is surer of a class.

    Parameters
    ----------
    masks : (B, Q, h, w), logits
    likely : (B, Q, K)
    overlap : IoU above which two are the same
    """
    kept = torch.zeros(masks.shape[:2])
    for number, (maps, sure) in enumerate(zip(masks, likely, strict=True)):
        places = without_doubles((maps > 0).cpu().numpy(), sure.amax(-1).cpu().numpy(), overlap)
        kept[number, torch.from_numpy(places)] = 1
    return kept.to(masks)
