"""Hyp-OC: one class learned against noise drawn around its mean, in hyperbolic space.

Claim: with genuine samples alone, pseudo negatives near their mean and a classifier on the Poincaré ball accept what is
like them and refuse attacks of kinds never seen (face anti-spoofing, five data sets, better than one-class methods).

Formula: mu <- a mu + (1 - a) batch mean;  negatives ~ N(mu, s^2 I);  h = exp_p(clip_r(MLP(v)));
L = cross-entropy of hyperbolic logits (genuine 0, negative 1) + (1 / B) sum_i d(h_i, h_{i + B/2}) over genuine halves;
score = softmax probability of the negative class.

Paper: Narayan and Patel 2024, Hyp-OC: Hyperbolic One Class Classification for Face Anti-Spoofing.
Differs from the paper: the head alone, on any frozen features (the paper trains parts of VGG-Face too), with a smaller
perceptron and a larger step, as it starts from nothing; a true running mean where the release keeps the last batch's;
the noise follows the features' own spread, as unit vectors are much closer together than VGG's; the last epoch is
used, where the release picks the best on labelled attacks.
Defaults: c 0.1, r 2, a 0.8, 60 epochs, gradient norm 3 (release).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ..errors import ClipworksError, check_range
from ..heads.common import check_vectors
from ..registry import method
from .common import quantile
from .hyperbolic import distance, exp_map, plane_logits

SPREAD = 3.0  # standard deviations of the features that the noise has


@method(card="hyp-oc", level="M")
class HypOC(OutlierMixin, BaseEstimator):
    """Learn what one class is like, from its features alone.

    Parameters
    ----------
    widths : of the perceptron's layers (paper: 8192, 1000, 512, 128)
    curvature : c of the ball of curvature -c
    clip : r, longest vector before the ball
    momentum : a, share of the running mean that is kept
    spread : s, standard deviation of the pseudo negatives; None for three times the features' mean own
    pull : weight of the pairs' distance
    epochs, batch_size, lr, weight_decay : of Adam
    held_out : share of the images that set the threshold and are not learned from
    rate : share of genuine images that may be refused
    seed : of start, order and noise

    Attributes
    ----------
    threshold_ : scores above it are refused
    spread_ : standard deviation of the pseudo negatives
    history_ : the mean cross-entropy and pair distance of every epoch, (epochs, 2)

    Inputs
    ------
    features of genuine images; no attack is seen, and no threshold is set on one

    Relations
    ---------
    For c to 0 the ball is flat, and the head a linear classifier on the perceptron against noise.

    References
    ----------
    Narayan and Patel 2024, Hyp-OC: Hyperbolic One Class Classification for Face Anti-Spoofing

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(1, 0.1, (40, 4))
    >>> head = HypOC(widths=(16, 8), epochs=20, rate=0.2).fit(x)
    >>> head.predict(np.array([[1.0, 1, 1, 1], [-1, 3, -1, 3]]))
    array([ 1, -1])
    """

    def __init__(
        self,
        *,
        widths: Sequence[int] = (256, 128, 64),
        curvature: float = 0.1,
        clip: float = 2.0,
        momentum: float = 0.8,
        spread: float | None = None,
        pull: float = 1.0,
        epochs: int = 60,
        batch_size: int = 8,
        lr: float = 1e-3,
        weight_decay: float = 1e-6,
        held_out: float = 0.2,
        rate: float = 0.05,
        seed: int = 0,
    ):
        self.widths = widths
        self.curvature = curvature
        self.clip = clip
        self.momentum = momentum
        self.spread = spread
        self.pull = pull
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.held_out = held_out
        self.rate = rate
        self.seed = seed

    def fit(self, x: Any, y: Any = None) -> HypOC:
        """Learn from genuine images.

        Parameters
        ----------
        x : vectors (n, dim) or `Features`, n at least 4
        y : not used
        """
        vectors = check_vectors(self, x, fit=True, labelled=False)
        for name, low, high in (("momentum", 0, 1), ("held_out", 0, 0.9), ("rate", 0, 1), ("batch_size", 2, None),
                                ("epochs", 1, None), ("pull", 0, None)):  # fmt: skip
            check_range(name, getattr(self, name), low, high)
        if not (self.curvature > 0 and self.clip > 0):
            raise ClipworksError(f"curvature and clip must be above 0. Got {self.curvature!r} and {self.clip!r}.")
        if len(vectors) < 4:
            raise ClipworksError(f"x must hold at least 4 vectors. Got {len(vectors)}.")
        order = np.random.default_rng(self.seed).permutation(len(vectors))
        held = max(1, round(self.held_out * len(vectors))) if self.held_out else 0
        rows = torch.from_numpy(vectors[order[held:]]).float()
        self.spread_ = float(SPREAD * rows.std(0).mean()) if self.spread is None else float(self.spread)
        self._train(rows)
        self.threshold_ = quantile(self.score(vectors[order[:held]] if held else vectors), self.rate)
        return self

    def _train(self, rows: torch.Tensor) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.ball_ = Ball(rows.shape[1], self.widths, self.curvature, self.clip)
        optimizer = torch.optim.Adam(self.ball_.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        mean, history = rows.mean(0), []
        for _ in range(self.epochs):
            losses = []
            for batch in rows[torch.randperm(len(rows), generator=draw)].split(self.batch_size):
                if len(batch) < 2:
                    continue
                mean = self.momentum * mean + (1 - self.momentum) * batch.mean(0)
                noise = mean + self.spread_ * torch.randn(batch.shape, generator=draw)
                points = self.ball_.embed(torch.cat([batch, noise]))
                labels = torch.arange(2).repeat_interleave(len(batch))
                own = F.cross_entropy(self.ball_.logits(points), labels)
                half = len(batch) // 2
                pairs = distance(points[:half], points[half : 2 * half], self.curvature).sum() / len(batch)
                optimizer.zero_grad()
                (own + self.pull * pairs).backward()
                nn.utils.clip_grad_norm_(self.ball_.parameters(), 3.0)
                optimizer.step()
                losses.append((own.item(), pairs.item()))
            history.append(np.mean(losses, 0))
        self.history_ = np.array(history)

    def score(self, x: Any, y: Any = None) -> np.ndarray:  # type: ignore[override]
        """Probability of "not of this class" for every vector; shape (n,)."""
        check_is_fitted(self, "ball_")
        rows = torch.from_numpy(check_vectors(self, x)).float()
        with torch.no_grad():
            return self.ball_.logits(self.ball_.embed(rows)).softmax(1)[:, 1].double().numpy()

    def decision_function(self, x: Any) -> np.ndarray:
        """The threshold less the score: below 0 for what is refused; shape (n,)."""
        scores = self.score(x)
        return self.threshold_ - scores

    def predict(self, x: Any) -> np.ndarray:
        """1 for genuine, -1 for anything else, as scikit-learn has it; shape (n,)."""
        return np.where(self.decision_function(x) < 0, -1, 1)


class Ball(nn.Module):
    """Perceptron, clip, map to the ball, and two hyperplanes there.

    Parameters
    ----------
    dim : of the features
    widths : of the layers, a ReLU behind each
    c : curvature -c
    clip : longest vector before the ball
    """

    def __init__(self, dim: int, widths: Sequence[int], c: float, clip: float):
        super().__init__()
        sizes = [dim, *widths]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
        self.body, self.c, self.clip = nn.Sequential(*layers), c, clip
        self.base = nn.Parameter(torch.zeros(sizes[-1]))
        self.points = nn.Parameter(torch.zeros(2, sizes[-1]))
        self.normals = nn.Parameter(torch.randn(2, sizes[-1]) * sizes[-1] ** -0.5)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Features (n, dim) to points of the ball (n, widths[-1])."""
        return exp_map(clipped(self.body(x), self.clip), self.c, exp_map(self.base, self.c))

    def logits(self, points: torch.Tensor) -> torch.Tensor:
        """Points (n, widths[-1]) to logits (n, 2)."""
        at = exp_map(self.points, self.c)
        return plane_logits(points, at, self.normals * (1 - self.c * (at * at).sum(1, keepdim=True)), self.c)


def clipped(x: torch.Tensor, most: float) -> torch.Tensor:
    """Vectors (..., dim) shortened to at most `most`."""
    return x * (most / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
