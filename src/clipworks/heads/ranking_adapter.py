"""Ranking adapter: order images by an instruction in words, learned from scalar targets and from all pairs of a batch.

Claim: a small adapter on frozen tokens orders images by what an instruction asks for ("number of dogs", "image
quality"), and judging pairs beside the regression helps (KonIQ-10k: correlations above 0.91).

Formula: T = [instruction; 32 learned tokens];  twice z <- z + attention(z), z <- z + attention(z to T);  two encoder
layers;  r_i = MLP(sum over tokens of norm(z_i)).  For a pair, 16 learned queries q over the tokens of both images
together, a = softmax(q K^T / sqrt(d)):  o_ij = a_i V_i - a_j V_j;  g_ij = MLP(sum over queries of W o_ij);
L = mean_ij BCE(g_ij, 1[y_i > y_j]) + 0.2 mean_i log(1 + smoothL1(r_i, y_i)).

Paper: Yu et al. 2025, Ranking-aware Adapter for Text-driven Image Ordering with CLIP (ICLR).
Differs from the paper: tokens may be of any encoder (there a ConvNeXt-Large); one vector per image is one token. Inside
the adapter layers attention has a norm before it and no feed-forward part, which the card leaves open. The softmax over
both images is put together from each one's own, o_ij = w_ij m_i - w_ji m_j with w_ij = sigmoid(l_i - l_j) of the
log-sums l and the own means m, which is exact and saves 2 L attentions per pair. Targets are divided by their standard
deviation while learning. The extra term for zero against non-zero counts is left out. Other defaults: released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn import functional as F

from ..errors import ClipworksError, check_range
from ..registry import method
from ..types import Features
from .common import as_array


@method(card="ranking-adapter", level="M")
class RankingAdapter(RegressorMixin, BaseEstimator):
    """Order images by an instruction.

    Parameters
    ----------
    text : tokens of the instruction (M, width) or one vector; a list of them for several instructions; None: only
        the learned tokens say what to look for
    tokens, relations : learned tokens beside the instruction (32), learned queries of the pairs (16)
    adapter_layers, encoder_layers : 2 and 2
    attention_heads : of every attention; the largest number up to it that divides the width is taken
    dropout : in the encoder layers, while learning
    rank_weight, regression_weight : of the two losses
    negatives : share of a batch that are images of other instructions, with target 0
    ties : whether ties and the diagonal count as "not greater" (release); False leaves them out
    steps, batch_size, lr, weight_decay : of AdamW; pairs grow with the square of the batch
    seed : of the first weights, the batches and the dropout

    Attributes
    ----------
    network_ : the adapter; instructions_ : checked instructions; scale_ : standard deviation of the targets
    losses_ : loss of every step

    Inputs
    ------
    patch tokens (n, L, width) of a frozen tower before its projection, or one vector per image (n, dim), with a scalar
    target per image; all images must have the same number of tokens, since the score is a sum over them

    Relations
    ---------
    With rank_weight=0 it is plain regression. It orders where the classifiers of this area choose, so it is no `Head`.

    References
    ----------
    Yu et al. 2025, Ranking-aware Adapter for Text-driven Image Ordering with CLIP

    Examples
    --------
    >>> x, y = np.array([[0.1, 1.0], [0.5, 0.8], [0.9, 0.2], [1.0, 0.1]]), np.array([0.0, 1.0, 2.0, 3.0])
    >>> adapter = RankingAdapter(text=np.ones((1, 2)), steps=60, lr=5e-3, dropout=0.0).fit(x, y)
    >>> np.argsort(adapter.predict(x))
    array([0, 1, 2, 3])
    """

    def __init__(
        self,
        text: Any = None,
        tokens: int = 32,
        relations: int = 16,
        adapter_layers: int = 2,
        encoder_layers: int = 2,
        attention_heads: int = 8,
        dropout: float = 0.1,
        rank_weight: float = 1.0,
        regression_weight: float = 0.2,
        negatives: float = 0.2,
        ties: bool = True,
        steps: int = 300,
        batch_size: int = 8,
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        seed: int = 0,
    ):
        self.text, self.tokens, self.relations = text, tokens, relations
        self.adapter_layers, self.encoder_layers, self.attention_heads = adapter_layers, encoder_layers, attention_heads
        self.dropout, self.rank_weight, self.regression_weight = dropout, rank_weight, regression_weight
        self.negatives, self.ties, self.steps, self.batch_size = negatives, ties, steps, batch_size
        self.lr, self.weight_decay, self.seed = lr, weight_decay, seed

    def fit(self, x: Any, y: Any = None, *, instruction: Any = None) -> RankingAdapter:
        """Learn from images with targets.

        Parameters
        ----------
        x : tokens (n, L, width), vectors (n, dim) or `Features`
        y : n targets (default: the labels of the features)
        instruction : which instruction each target answers, n positions in `text` (default: the first)
        """
        for name, low, high in (("tokens", 0, None), ("relations", 1, None), ("adapter_layers", 0, None),
                                ("encoder_layers", 0, None), ("attention_heads", 1, None), ("dropout", 0, 1),
                                ("rank_weight", 0, None), ("regression_weight", 0, None), ("negatives", 0, 0.9),
                                ("steps", 1, None), ("batch_size", 2, None), ("lr", 0, None)):  # fmt: skip
            check_range(name, getattr(self, name), low, high)
        y = x.labels if y is None and isinstance(x, Features) else y
        rows = check_tokens("x", x)
        target = np.asarray(y, np.float64) if y is not None else np.empty(0)
        if target.shape != (len(rows),) or not np.isfinite(target).all():
            raise ClipworksError(f"y must hold one finite number per image ({len(rows)}). Got shape {target.shape}.")
        self.instructions_ = check_instructions(self.text)
        if not self.instructions_[0].shape[1] and self.tokens == 0:
            raise ClipworksError("tokens must be at least 1 without text: there is nothing to look for.")
        which = self._which(instruction, len(rows))
        self.tokens_in_, self.n_features_in_ = rows.shape[1], rows.shape[2]
        self.scale_ = float(target.std()) or 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network_ = RankingNetwork(
                rows.shape[2],
                self.instructions_[0].shape[1] or rows.shape[2],
                self.tokens,
                self.relations,
                self.adapter_layers,
                self.encoder_layers,
                self.attention_heads,
                self.dropout,
            )
            self.losses_ = self._train(torch.from_numpy(rows), torch.from_numpy(target / self.scale_).float(), which)
        return self

    def _train(self, x: torch.Tensor, y: torch.Tensor, which: np.ndarray) -> np.ndarray:
        dice, network, losses = np.random.default_rng(self.seed), self.network_.train(), []
        optimiser = torch.optim.AdamW(network.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        for _ in range(self.steps):
            asked = int(which[dice.integers(len(which))])
            own, other = np.flatnonzero(which == asked), np.flatnonzero(which != asked)
            strange = int(self.negatives * self.batch_size) if len(other) else 0
            rows = dice.permutation(own)[: self.batch_size - strange]
            rows = np.append(rows, dice.permutation(other)[:strange])
            target = torch.where(torch.from_numpy(which[rows]) == asked, y[rows], 0.0)
            z = network(x[rows], torch.from_numpy(self.instructions_[asked]))
            loss = self.regression_weight * regression_loss(network.score(z), target)
            if self.rank_weight:
                loss = loss + self.rank_weight * ranking_loss(network.pairs(z), target, self.ties)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        network.eval()
        return np.array(losses)

    @torch.no_grad()
    def predict(self, x: Any, instruction: Any = None) -> np.ndarray:
        """Return one score per image, in units of the targets; sort by it."""
        check_is_fitted(self, "network_")
        rows = check_tokens("x", x)
        if rows.shape[1:] != (self.tokens_in_, self.n_features_in_):
            wanted = f"{self.tokens_in_} tokens of {self.n_features_in_} features as in fit"
            raise ClipworksError(f"x must have {wanted}. X has {rows.shape[2]} features. Got shape {rows.shape}.")
        which, found = self._which(instruction, len(rows)), np.empty(len(rows))
        for asked in np.unique(which):
            words = torch.from_numpy(self.instructions_[asked])
            for part in np.array_split(np.flatnonzero(which == asked), math.ceil((which == asked).sum() / 64)):
                found[part] = self.network_.score(self.network_(torch.from_numpy(rows[part]), words)).numpy()
        return self.scale_ * found

    def score(self, x: Any, y: Any = None, instruction: Any = None) -> float:  # type: ignore[override]
        """Return Spearman's rank correlation of scores and targets."""
        y = x.labels if y is None and isinstance(x, Features) else y
        return float(spearmanr(self.predict(x, instruction), y)[0])

    def _which(self, instruction: Any, count: int) -> np.ndarray:
        which = np.zeros(count, int) if instruction is None else np.asarray(instruction)
        if which.shape != (count,) or which.dtype.kind not in "iu":
            raise ClipworksError(f"instruction must hold one position per image ({count}). Got shape {which.shape}.")
        if count and not 0 <= which.min() <= which.max() < len(self.instructions_):
            raise ClipworksError(f"instruction must be positions in text, 0 .. {len(self.instructions_) - 1}. "
                                 f"Got {which.min()} .. {which.max()}.")  # fmt: skip
        return which


class RankingNetwork(nn.Module):
    """The adapter with its two branches; `forward` gives the tokens that both read."""

    def __init__(
        self, width: int, words: int, tokens: int, relations: int, adapters: int, encoders: int, heads: int, drop: float
    ):
        super().__init__()
        heads = max(h for h in range(1, heads + 1) if width % h == 0)
        self.heads = heads
        self.prompt = nn.Parameter(0.02 * torch.randn(tokens, 1))  # one number per token, over the whole width
        self.own = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(adapters))
        self.cross = nn.ModuleList(
            nn.MultiheadAttention(width, heads, kdim=words, vdim=words, batch_first=True) for _ in range(adapters)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * adapters))
        self.join = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, width, drop, batch_first=True) for _ in range(encoders)
        )
        self.regression = nn.ModuleList([nn.LayerNorm(width), _mlp(width, 2)])
        self.queries = nn.Parameter(0.02 * torch.randn(relations, width))
        self.keys = nn.Linear(width, width)  # shared by keys and values
        self.out = nn.Linear(width, width)
        self.ranking = nn.Sequential(nn.LayerNorm(width), _mlp(width, 3))

    def forward(self, z: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Tokens (N, L, width) of images, given the tokens (M, words) of an instruction."""
        prompt = self.prompt.expand(-1, words.shape[1] or z.shape[2])
        told = torch.cat([words, prompt]) if words.shape[1] else prompt
        told = told.expand(len(z), -1, -1)
        for i, (own, cross) in enumerate(zip(self.own, self.cross, strict=True)):
            y = self.norms[2 * i](z)
            z = z + own(y, y, y, need_weights=False)[0]
            z = z + cross(self.norms[2 * i + 1](z), told, told, need_weights=False)[0]
        z = self.join(z)
        for layer in self.encoder:
            z = layer(z)
        return z

    def score(self, z: torch.Tensor) -> torch.Tensor:
        """One number per image, from its own tokens alone; shape (N,)."""
        norm, mlp = self.regression
        return mlp(norm(z).sum(1))[:, 0]

    def differences(self, z: torch.Tensor) -> torch.Tensor:
        """What the relational queries see in image i less what they see in j; shape (N, N, relations, width)."""
        count, length, width = z.shape
        inside = self.keys(z).view(count, length, self.heads, -1)
        queries = self.queries.view(-1, self.heads, inside.shape[-1])
        logits = torch.einsum("rhd,nlhd->nrhl", queries, inside) / inside.shape[-1] ** 0.5
        means = torch.einsum("nrhl,nlhd->nrhd", logits.softmax(-1), inside)
        mass = logits.logsumexp(-1)[..., None]  # of an image in the softmax over both
        share = torch.sigmoid(mass[:, None] - mass[None])
        found = share * means[:, None] - share.transpose(0, 1) * means[None]
        return found.reshape(count, count, -1, width)

    def pairs(self, z: torch.Tensor) -> torch.Tensor:
        """Logits that image i is greater than j; shape (N, N)."""
        return self.ranking(self.out(self.differences(z)).sum(2))[..., 0]


def ranking_loss(pairs: torch.Tensor, target: torch.Tensor, ties: bool = True) -> torch.Tensor:
    """Mean binary cross-entropy of all ordered pairs with 1[y_i > y_j]; without `ties`, of pairs that differ."""
    greater = (target[:, None] > target[None]).float()
    if ties:
        return F.binary_cross_entropy_with_logits(pairs, greater)
    differ = target[:, None] != target[None]
    loss = F.binary_cross_entropy_with_logits(pairs, greater, reduction="none")
    return (loss * differ).sum() / differ.sum().clamp(min=1)


def regression_loss(score: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of log(1 + smooth L1), whose gradient fades for far-off targets."""
    return F.smooth_l1_loss(score, target, reduction="none").log1p().mean()


def check_tokens(argument: str, given: Any) -> np.ndarray:
    """Return tokens (n, L, width) in float32; one vector per image is one token."""
    try:
        rows = np.asarray(as_array(given), np.float32)
    except (TypeError, ValueError) as error:
        raise ClipworksError(f"{argument} must be tokens (n, L, width) or vectors (n, dim): {error}.") from error
    rows = rows[:, None] if rows.ndim == 2 else rows
    if rows.ndim != 3 or not rows.size or not np.isfinite(rows).all():
        raise ClipworksError(f"{argument} must be finite tokens (n, L, width) or vectors (n, dim), at least one. "
                             f"Got shape {np.shape(as_array(given))}.")  # fmt: skip
    return rows


def check_instructions(text: Any) -> list[np.ndarray]:
    """Return the tokens (M, width) of every instruction; one of no tokens and no width where there is no text."""
    if text is None:
        return [np.empty((0, 0), np.float32)]
    several: Sequence[Any] = text if isinstance(text, list | tuple) else [text]
    found = []
    for entry in several:
        rows = np.asarray(as_array(entry), np.float32)
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
            raise ClipworksError(f"text must be finite tokens (M, width), at least one. Got shape {rows.shape}.")
        found.append(rows)
    if not found or len({rows.shape[1] for rows in found}) != 1:
        raise ClipworksError(f"text must hold instructions of one width. Got {[rows.shape[1] for rows in found]}.")
    return found


def _mlp(width: int, layers: int) -> nn.Sequential:
    parts = [(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*(layer for part in parts for layer in part), nn.Linear(width, 1))
