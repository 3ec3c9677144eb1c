"""Tip-Adapter and Tip-Adapter-F: a cache of the shots votes by similarity, beside the zero-shot logits.

Claim: keeping the features of the shots as keys and their labels as values adapts CLIP without training (ImageNet,
ResNet-50, 16 shots: 60.33 % to 62.01 %), and a few epochs on the keys alone bring more (65.51 %).

Formula: keys f_j = norm(mean of the views of image j), one-hot values L;  scores = exp(-beta (1 - x F^T)) L;
logits = SCALE * cos(x, t_c) + alpha * scores. Tip-Adapter-F trains F by cross-entropy on these logits.

Paper: Zhang et al. 2022, Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification (ECCV).
Differs from the paper: alpha and beta come from the shots, each image left out of the cache in turn and the votes of
its class scaled up to as many as it has; Tip-Adapter-F is trained once per fold for that. The release searches on the
validation split, in ranges of each data set's own, and takes the epoch that is best on the test images. Here the ranges
are fixed (beta evenly to 50, the widest of the release; alpha 0 and 20 values from 0.1 to 50, evenly in logarithm), the
last epoch is taken, and training starts at the release's beta 1 and alpha 1.17 for every data set.
The search is exact: for one beta the logits are linear in alpha, so every image is right in one interval of alpha, and
two counts of sorted ends give the accuracy at every alpha of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ClipworksError, check_range
from ..registry import method
from .common import Choice, Head, Shots, unit, zero_shot

BETAS = tuple(0.25 * k for k in range(1, 201))
WEIGHTS = (0.0, *(float(w) for w in np.geomspace(0.1, 50, 20)))
START = (1.0, 1.17)  # beta and alpha while keys are trained
CELLS = 1 << 17  # numbers worked on at a time, a megabyte
EQUALS = 25  # equally good settings that are compared by their likelihood


@method(card="caps-adapter", level="M")
class TipAdapter(Head):
    """Classify by the similarity-weighted vote of all shots.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; adds zero-shot logits
    alpha : weight of the vote beside the words; default: the best of `alphas` on images left out
    beta : sharpness of the vote; default: the best of `betas` on images left out
    finetune : train the keys (Tip-Adapter-F)
    alphas, betas : values to try; among equals the first on `validation=`, else the likeliest of some (`best_of`)
    folds : parts of the shots that are left out in turn where keys are trained
    epochs, lr, batch_size : of the training: AdamW with a cosine schedule (20, 1e-3, 256: release)
    seed : of the order of the shots in training

    Attributes
    ----------
    keys_, owners_ : (images, dim) unit rows unless trained, sorted by class; the class number of each
    beta_ : the sharpness taken (1 where nothing can be left out)
    classes_, text_, alpha_, temperature_ : labels, words, weight, temperature of the probabilities

    Inputs
    ------
    features of labelled images; rows are brought to length 1

    Relations
    ---------
    `knn` with votes by similarity is the same with few neighbours and its sum brought to 1. With beta = 0 every shot
    has the same vote; `sus_x` adds a vote by the classes an image looks like, `caps_adapter` captions.

    References
    ----------
    Zhang et al. 2022, Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> TipAdapter().fit(x, ["cat", "cat", "dog", "dog"]).predict([[0.8, 0.3]])
    array(['cat'], dtype='<U3')
    >>> TipAdapter(finetune=True).fit(x, ["cat", "cat", "dog", "dog"]).predict([[0.8, 0.3]])
    array(['cat'], dtype='<U3')
    """

    effort = 1

    def __init__(
        self,
        text: Any = None,
        alpha: float | None = None,
        beta: float | None = None,
        finetune: bool = False,
        alphas: Sequence[float] = WEIGHTS,
        betas: Sequence[float] = BETAS,
        folds: int = 5,
        epochs: int = 20,
        lr: float = 1e-3,
        batch_size: int = 256,
        seed: int = 0,
    ):
        self.text, self.alpha, self.beta, self.alphas, self.betas = text, alpha, beta, alphas, betas
        self.finetune, self.folds, self.epochs, self.lr = finetune, folds, epochs, lr
        self.batch_size, self.seed = batch_size, seed

    def _learn(self, shots: Shots) -> Choice:
        betas, alphas = grid("beta", self.beta, self.betas), grid("alpha", self.alpha, self.alphas)
        alphas = (1.0,) if self.text_ is None else alphas
        for name, low in (("folds", 2), ("epochs", 0), ("lr", 0), ("batch_size", 1)):
            check_range(name, getattr(self, name), low)
        cache, held = self._cache(shots), list[Asked]()
        if self.finetune and shots.validation is None:  # trained keys have seen their shots
            splits = shots.splits(self.folds)
            choice = self._choice(*splits)
            for rows, x, y in splits:
                part = Shots(shots.x[rows], shots.y[rows], shots.classes, shots.groups[rows])
                held += self._cache(part).blocks(x, y, text=self.text_)
        else:
            choice = self._choice(shots.held)
            held += cache.blocks(*shots.held, shots.held_images, self.text_)
        self.keys_, self.owners_, self.beta_ = cache.keys, cache.owners, betas[0] if len(betas) == 1 else START[0]
        if held:
            for k, a in best_of(search(held, betas, alphas), shots):
                choice.alphas = (alphas[a],)
                choice.offer(betas[k], np.concatenate([part.votes(betas[k]) for part in held], axis=1).T)
            self.beta_ = choice.setting
        return choice

    def _scores(self, x: np.ndarray) -> np.ndarray:
        blocks = Cache(self.keys_, self.owners_, len(self.classes_)).blocks(x)
        return np.concatenate([part.votes(self.beta_) for part in blocks], axis=1).T

    def _cache(self, shots: Shots) -> Cache:
        """The cache of the shots; with `finetune`, its keys trained on them by cross-entropy of the whole logits."""
        cache = Cache.of(shots)
        if not self.finetune:
            return cache
        import torch
        from torch.nn.functional import cross_entropy

        x, y = torch.tensor(unit(shots.x), dtype=torch.float32), torch.tensor(shots.y)
        words = np.zeros((shots.classes, shots.x.shape[1])) if self.text_ is None else self.text_
        zero = torch.tensor(zero_shot(shots.x, words), dtype=torch.float32)
        keys, owners = torch.tensor(cache.keys, dtype=torch.float32, requires_grad=True), torch.tensor(cache.owners)
        beta = START[0] if self.beta is None else self.beta
        alpha = START[1] if self.alpha is None or self.text_ is None else self.alpha
        optimizer = torch.optim.AdamW([keys], lr=self.lr, eps=1e-4)
        steps = self.epochs * -(-len(x) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        dice = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(x), generator=dice).split(self.batch_size):
                kept = torch.exp(-beta * (1 - x[rows] @ keys.T))
                votes = kept.new_zeros(len(rows), shots.classes).index_add(1, owners, kept)
                loss = cross_entropy(zero[rows] + alpha * votes, y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return Cache(keys.detach().double().numpy(), cache.owners, cache.classes)


def grid(name: str, only: float | None, values: Sequence[float]) -> tuple[float, ...]:
    """Return the values of a setting to try in ascending order: the one that is fixed, or all; none may be below 0."""
    if only is not None:
        return (float(check_range(name, only, 0)),)
    if len(values) == 0:
        raise ClipworksError(f"{name}s must hold at least one value. Got none.")
    return tuple(sorted(float(check_range(f"{name}s", value, 0)) for value in values))


@dataclass
class Cache:
    """Keys (n, dim) sorted by class, the class number of each (n,), and how many classes there are."""

    keys: np.ndarray
    owners: np.ndarray
    classes: int

    @classmethod
    def of(cls, shots: Shots) -> Cache:
        """One key per image: the mean of its views (unit rows), brought to length 1."""
        _, first, image = np.unique(shots.images, return_index=True, return_inverse=True)
        sums = np.zeros((len(first), shots.x.shape[1]))
        np.add.at(sums, image, unit(shots.x))
        return cls(unit(sums), shots.y[first], shots.classes)

    def blocks(
        self, x: np.ndarray, y: np.ndarray | None = None, own: np.ndarray | None = None, text: np.ndarray | None = None
    ) -> Iterator[Asked]:
        """Images asked about, some at a time; `own` are their own keys, which do not vote for them."""
        size = max(1, CELLS // len(self.keys))
        for part in (slice(start, start + size) for start in range(0, len(x), size)):
            zero = np.zeros((self.classes, len(x[part]))) if text is None else zero_shot(x[part], text).T
            mine = None if own is None else own[part]
            distance = 1 - self.keys @ unit(x[part]).T
            yield Asked(distance, self.owners, zero, np.zeros(0, int) if y is None else y[part], mine)


@dataclass
class Asked:
    """Images in the face of a cache; arrays have a row per key or class and a column per image.

    Attributes
    ----------
    distance : (n, m) 1 - cosine
    owners : (n,) class number of every key, ascending
    zero : (C, m) zero-shot logits
    y : (m,) class numbers
    own : (m,) every image's own key, or None
    """

    distance: np.ndarray
    owners: np.ndarray
    zero: np.ndarray
    y: np.ndarray
    own: np.ndarray | None = None

    def votes(self, beta: float) -> np.ndarray:
        """Return (C, m): the sum of exp(-beta distance) over the keys of each class."""
        values = -beta * self.distance
        return self.sums(np.exp(values, out=values))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return (C, m): values (n, m; written to) summed by class, as if an image's own key were like the others of
        its class in the mean."""
        present, starts, count = np.unique(self.owners, return_index=True, return_counts=True)
        column = np.arange(values.shape[1])
        if self.own is not None:
            values[self.own, column] = 0
        found = np.zeros(self.zero.shape)
        found[present] = np.add.reduceat(values, starts, axis=0)
        if self.own is not None:
            mine = self.owners[self.own]
            size = count[np.searchsorted(present, mine)]
            found[mine, column] *= size / (size - 1)
        return found


def search(held: Sequence[Asked], betas: Sequence[float], alphas: Sequence[float]) -> np.ndarray:
    """Return how many images are right under every beta and alpha (both ascending), (betas, alphas)."""
    right = np.zeros((len(betas), len(alphas)), int)
    for part in held:
        step = max(1, CELLS // part.zero.size)
        for start in range(0, len(betas), step):
            chosen = slice(start, start + step)
            votes = np.stack([part.votes(beta) for beta in betas[chosen]])
            right[chosen] += count_right(part.zero, votes, part.y, alphas)
    return right


def best_of(right: np.ndarray, shots: Shots) -> np.ndarray:
    """Return the places (k, axes) of the highest count: on validation images the first one, as the releases take.

    A few shots that answer for each other leave many equals, the first of which gives the shots next to no weight: then
    these are up to `EQUALS` of them, evenly spread, for a `Choice` to compare by their likelihood.

    >>> shots = Shots(np.eye(2), np.arange(2), 2, np.arange(2))
    >>> best_of(np.array([[1, 2], [2, 0]]), shots).tolist()
    [[0, 1], [1, 0]]
    """
    places = np.argwhere(right == right.max())
    if shots.validation is not None:
        return places[:1]
    return places[np.unique(np.linspace(0, len(places) - 1, EQUALS).round().astype(int))]


def count_right(base: np.ndarray, slope: np.ndarray, y: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return how many images have their largest logit base + w * slope at their class, for every w in ascending order.

    Parameters
    ----------
    base : (C, m)
    slope : (B, C, m)
    y : (m,) class numbers
    weights : W values of w, none below 0

    Returns
    -------
    (B, W) counts; a tie counts as wrong

    Notes
    -----
    Image i is right where (base_y - base_c) > w (slope_c - slope_y) for all c. With p_c = (slope_c - slope_y) /
    (base_y - base_c), 1 / w lies above all p_c of classes that base puts behind y, and below those of classes ahead.

    >>> base, slope = np.array([[0.0, 3.0], [1.0, 0.0]]), np.array([[[1.0, 0.0], [0.0, 1.0]]])
    >>> count_right(base, slope, np.array([0, 0]), [0, 2, 4])
    array([[1, 2, 1]])
    """
    column = np.arange(len(y))
    lead = base[y, column] - base
    lead[lead == 0] = -1e-300  # equal is as good as just ahead
    lead[y, column] = 1.0  # it is not its own rival
    pull = slope - slope[:, None, y, column]
    pull /= lead
    low = (pull + np.where(lead > 0, 0.0, -np.inf)).max(1)
    high = (pull + np.where(lead < 0, 0.0, np.inf)).min(1)
    with np.errstate(divide="ignore"):
        inverse = np.minimum(1 / np.asarray(weights, float), np.finfo(float).max)[::-1]  # 1 / w, ascending
    first = np.searchsorted(inverse, low, side="right")
    after = np.maximum(np.searchsorted(inverse, high, side="left"), first)
    size = len(inverse) + 1
    begins, ends = (
        np.bincount((place + size * np.arange(len(slope))[:, None]).ravel(), minlength=size * len(slope))
        for place in (first, after)
    )
    return (begins - ends).reshape(-1, size).cumsum(1)[:, -2::-1]
