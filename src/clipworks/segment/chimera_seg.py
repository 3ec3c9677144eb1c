"""Chimera-Seg: a body that learns to see sharply under a head that is the last, frozen part of CLIP.

Claim: part of CLIP is enough: a segmentation network whose features go through CLIP's last, frozen layers lands in the
space of the words, and the class token teaches what has no label: +0.9 and +1.2 hIoU over the best before (abstract).

Formula: x = LN(conv1x1(body));  x <- frozen last block(s) of CLIP;  x <- x + LightOut(x), 0 at first;
g = norm(projection(ln_post(x)));  g' = norm(g + W_o softmax((W_q g)(W_k T)^T / sqrt(d)) W_v T), W_o = 0 at first;
L = CE(g' T^T / tau) on pixels of seen classes + l1 (1 - mean over the k tokens nearest to c of cos(g_i, c))
  + l2 BCE(max_i g'_i T^T / tau, which seen classes are there),  c CLIP's class token, k from all tokens to a tenth;
score = cos(g', t) - gamma for seen classes.

Paper: Chen et al. 2025, Partial CLIP is Enough: Chimera-Seg for Zero-shot Semantic Segmentation (arXiv:2506.22032).
Differs from the paper: no code was released and only the abstract was at hand; the layers that are kept, the schedule,
the form of the last two losses and of the alignment, tau and all weights are ours. The body is a feature pyramid on the
frozen tower's own maps; patches go through the kept blocks without a class token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.item import Item
from ..encoders.layers import RULES, Rule
from ..errors import check_choice, check_range
from ..metrics.segmentation import IGNORE
from ..pretraining.parts import need_vit
from ..registry import method
from .common import Hidden, enter
from .frozenseg import is_seen
from .mask_decoder import PixelDecoder, last_tokens, map_channels, tower_maps
from .trained import TrainedDense

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

START, END = 1.0, 0.1  # share of the tokens that the class token teaches, at the first and at the last step


class Alignment(nn.Module):
    """Features look at the words of seen classes; a sum that starts from nothing.

    Parameters
    ----------
    dim : of the joint space
    """

    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, g: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Features (..., dim) and words (K, dim) to features."""
        weights = (self.q(g) @ self.k(words).T / math.sqrt(g.shape[-1])).softmax(-1)
        return g + self.out(weights @ self.v(words))


class ChimeraParts(nn.Module):
    """Body, the light layers around the frozen head, and the alignment.

    Parameters
    ----------
    channels : of the tower's maps, coarse to fine
    width : of the body
    tower : channels of the tower's tokens
    dim : of the joint space
    """

    def __init__(self, channels: Sequence[int], width: int, tower: int, dim: int):
        super().__init__()
        self.body = PixelDecoder(channels, width)
        self.light_in, self.norm = nn.Linear(width, tower), nn.LayerNorm(tower)
        self.light_out = nn.Linear(tower, tower)
        nn.init.zeros_(self.light_out.weight)
        nn.init.zeros_(self.light_out.bias)
        self.align = Alignment(dim)

    def forward(self, visual: Any, maps: Sequence[torch.Tensor], blocks: int, rule: Rule) -> torch.Tensor:
        """Unit features (B, h, w, dim) on the finest grid, before the alignment."""
        fine = self.body(maps)[1]
        tokens = self.norm(self.light_in(fine.flatten(2).transpose(1, 2)))
        x = kept_blocks(visual, tokens, blocks, rule)
        g = visual.project(x + self.light_out(x))
        return F.normalize(g, dim=-1).unflatten(1, fine.shape[2:])


@method(card="chimera-seg", level="MR")
class ChimeraSeg(TrainedDense):
    """A segmentation body under CLIP's frozen last layers.

    Parameters
    ----------
    encoder : a name, a path or an encoder with a class token (default: the bundled one)
    seen : of the names given to `fit` those that may be learned from; pixels of the others do not count, and their
        words are not read. None takes all
    blocks : how many of the tower's last blocks are the head
    rule : their attention: "qk" as they were trained, "qq", "kk", "vv", or "identity" (values alone)
    tau : temperature of the cosines in the losses
    distillation, alignment : weights of the class token's loss and of the image's classes' loss
    gamma : taken off the cosines of seen classes when images are segmented
    width : channels of the body
    steps, batch_size, lr : of AdamW with warm-up and cosine
    side : of the training crops in pixels (default: twice the encoder's image size)
    seed : of the start, the order and the crops

    Inputs
    ------
    images and label maps; any names afterwards

    Relations
    ---------
    `denseclip` compares the tower's own patches with words that look at the image. With light layers that do nothing
    the head gives CLIP's own dense features.

    References
    ----------
    Chen et al. 2025, Partial CLIP is Enough: Chimera-Seg for Zero-shot Semantic Segmentation (arXiv:2506.22032)

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> images, masks = torch.rand(3, 3, 16, 24), torch.zeros(3, 16, 24, dtype=torch.long)
    >>> masks[:, :, 12:] = 1
    >>> model = ChimeraSeg(toy_encoder(), steps=2, width=8).fit(images, masks, ["sky", "sea"])
    >>> model.predict(images).shape
    (3, 16, 24)
    """

    def __init__(
        self,
        encoder: Any = None,
        seen: Sequence[str] | None = None,
        blocks: int = 1,
        rule: str = "qk",
        tau: float = 0.07,
        distillation: float = 1.0,
        alignment: float = 1.0,
        gamma: float = 0.0,
        width: int = 128,
        steps: int = 1000,
        batch_size: int = 8,
        lr: float = 1e-3,
        side: int | None = None,
        seed: int = 0,
    ):
        self.encoder, self.seen, self.blocks, self.rule, self.tau = encoder, seen, blocks, rule, tau
        self.distillation, self.alignment, self.gamma, self.width = distillation, alignment, gamma, width
        self.steps, self.batch_size, self.lr, self.side, self.seed = steps, batch_size, lr, side, seed

    # -- what is learned -----------------------------------------------------------------------------------------

    def _bind(self, base: Encoder) -> None:
        need_vit(base, "chimera_seg", class_token=True)
        check_choice("rule", self.rule, RULES)
        check_range("blocks", self.blocks, 1, len(base.visual.blocks))
        check_range("tau", self.tau, 1e-6)
        seen = self.names_ if self.seen is None else [check_choice("seen", n, self.names_) for n in self.seen]
        check_range("the number of seen names", len(seen), 1)
        places = [self.names_.index(name) for name in seen]
        self._table = torch.full((IGNORE + 1,), IGNORE)
        self._table[places] = torch.arange(len(places))
        self._seen_words = self.words_[places]

    def _build(self, encoder: Encoder, names: Sequence[str]) -> nn.Module:
        channels = map_channels(encoder, self.sides)
        return ChimeraParts(channels, self.width, encoder.config.vision.width, encoder.dim)

    def _train(self, base: Encoder, items: Sequence[Item], progress: bool | None) -> None:
        self._step = 0
        super()._train(base, items, progress)
        del self._step

    def _losses(
        self, parts: Any, encoder: Encoder, images: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        labels, words = self._table.to(labels.device)[labels], self._seen_words.to(images.device)
        with torch.no_grad():
            hidden = enter(encoder, images, sides=self.sides, memory=False)
            last = last_tokens(hidden)
            maps, teacher = tower_maps(hidden, last), F.normalize(hidden.visual.project(last[:, 0]), dim=-1)
        g = parts(encoder.visual, maps, self.blocks, self.rule)
        logits = (F.normalize(parts.align(g, words), dim=-1) @ words.T / self.tau).movedim(-1, 1)
        share = kept_share(self._step, self.steps)
        self._step += 1
        return {
            "pixels": pixel_loss(logits, labels),
            "distillation": self.distillation * selective_distillation(g.flatten(1, 2), teacher, share),
            "alignment": self.alignment * image_loss(logits, labels),
        }

    # -- as a dense method ---------------------------------------------------------------------------------------

    def features(self, hidden: Hidden) -> torch.Tensor:
        """Unit features (B, h, w, dim)."""
        parts: Any = self.parts_
        g = parts(self.encoder_.visual, tower_maps(hidden), self.blocks, self.rule)
        return F.normalize(parts.align(g, self._seen_words.to(g)), dim=-1)

    def local(self, hidden: Hidden, words: torch.Tensor) -> torch.Tensor:
        """Cosines (B, K, h, w), less gamma for seen classes."""
        scores = super().local(hidden, words)
        return scores - self.gamma * is_seen(words, self._seen_words).to(scores)[:, None, None]


def kept_blocks(visual: Any, tokens: torch.Tensor, blocks: int, rule: Rule) -> torch.Tensor:
    """The last blocks of a tower on tokens (B, N, width) of any origin."""
    for block in visual.blocks[-blocks:]:
        tokens = tokens + block.attention(block.norm1(tokens), rule=rule)[0]
        tokens = tokens + block.mlp(block.norm2(tokens))
    return tokens


def pixel_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (B, K, h, w), brought to the labels' size, on pixels that have a label; 0 without any."""
    if not bool((labels != IGNORE).any()):
        return logits.sum() * 0
    whole = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(whole, labels, ignore_index=IGNORE)


def image_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the best pixel of every class, logits (B, K, h, w), with which classes are there."""
    there = F.one_hot(torch.where(labels == IGNORE, logits.shape[1], labels).flatten(1), logits.shape[1] + 1)
    return F.binary_cross_entropy_with_logits(logits.amax((2, 3)), there.amax(1)[:, :-1].to(logits))


def kept_share(step: int, steps: int, start: float = START, end: float = END) -> float:
    """Share of the tokens that are taught at a step: from `start` at the first to `end` at the last.

    >>> [round(kept_share(s, 3), 2) for s in range(3)]
    [1.0, 0.55, 0.1]
    """
    return start - (start - end) * min(step, steps - 1) / max(steps - 1, 1)


def selective_distillation(features: torch.Tensor, teacher: torch.Tensor, share: float) -> torch.Tensor:
    """One minus the mean cosine with the class token of the tokens nearest to it.

    Parameters
    ----------
    features : (B, N, dim), unit rows
    teacher : (B, dim), unit rows
    share : of the tokens that count, at least one
    """
    near = torch.einsum("bnd,bd->bn", features, teacher)
    return 1 - near.topk(max(1, round(share * near.shape[1])), dim=1).values.mean()
