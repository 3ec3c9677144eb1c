"""CapS-Adapter: a support set of images and of the captions that they were generated from, mixed in one cache.

Claim: images generated from captions of images of the task lie nearer to it than images generated from class names, and
the captions' own vectors beside them adapt CLIP better than the images alone (19 data sets: 2.19 points above the best
method before, mean).

Formula: A = (1 - delta) x F^T + delta x G^T, delta in 0, 0.1, ..., 1, with image keys F and caption keys G;  logits =
SCALE * cos(x, t_c) + alpha * exp(-beta (1 - A)) L + gamma * psi(-D) L, with D and psi as in `sus_x`.

Paper: Wang et al. 2024, CapS-Adapter: Caption-based MultiModal Adapter in Zero-Shot Classification (arXiv 2405.16591).
Differs from the paper: images and captions are given, not made here (paper: ShareCaptioner on k training images per
class, Stable Diffusion from "A photo of {class}. " and the caption). D is the divergence as written; in the release the
class words drop out of it and its last rows stay zero. psi, the grids of the weights and what they are chosen on are
those of `sus_x`. The paper calls this zero-shot; it uses unlabelled images of the task and a labelled validation set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ClipworksError, check_range
from ..registry import method
from .common import Choice, Head, Shots, check_text, fingerprint, zero_shot
from .sus_x import BETAS, GAMMAS, choose, likeness, start, weighed, weight_grids
from .tip_adapter import WEIGHTS, Asked, Cache, grid

if TYPE_CHECKING:
    from typing_extensions import Self

DELTAS = tuple(k / 10 for k in range(11))


@method(card="caps-adapter", level="M")
class CapSAdapter(Head):
    """Classify by a support set of images and captions.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; adds zero-shot logits and
        gives the signatures (without text there is no third term)
    alpha, beta : weight and sharpness of the vote by similarity; default: the best of `alphas`, `betas`
    gamma : weight of the vote by signatures; default: the best of `gammas`
    delta : share of the captions in the similarity, in [0, 1]; default: the best of `deltas`
    alphas, betas, gammas, deltas : values to try; among equals as in `tip_adapter`
    temperature : T of the signatures (0.5: release)

    Attributes
    ----------
    keys_, captions_, owners_ : (images, dim) unit rows sorted by class; their captions' or None; the class of each
    beta_, gamma_, delta_ : what was taken (1, 0 and 0.5 where nothing can be left out; delta 0 without captions)
    classes_, text_, alpha_, temperature_ : labels, words, weight, temperature of the probabilities

    Inputs
    ------
    features of generated or other images of each class and of their captions (`fit`); labelled images as `validation=`

    Relations
    ---------
    With delta = 0, or without captions, it is `sus_x`, and with gamma = 0 too it is `tip_adapter`.

    References
    ----------
    Wang et al. 2024, CapS-Adapter: Caption-based MultiModal Adapter in Zero-Shot Classification

    Examples
    --------
    >>> words, made = np.eye(2), np.array([[1.0, 0.3], [0.9, 0.1], [0.2, 1.0], [0.1, 0.9]])
    >>> captions = np.array([[1.0, 0.0], [0.8, 0.2], [0.0, 1.0], [0.2, 0.8]])
    >>> CapSAdapter(text=words).fit(made, [0, 0, 1, 1], captions=captions).predict([[0.9, 0.2]])
    array([0])
    """

    effort = 1

    def __init__(
        self,
        text: Any = None,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        delta: float | None = None,
        alphas: Sequence[float] = WEIGHTS,
        betas: Sequence[float] = BETAS,
        gammas: Sequence[float] = GAMMAS,
        deltas: Sequence[float] = DELTAS,
        temperature: float = 0.5,
    ):
        self.text, self.alpha, self.beta, self.gamma, self.delta = text, alpha, beta, gamma, delta
        self.alphas, self.betas, self.gammas, self.deltas = alphas, betas, gammas, deltas
        self.temperature = temperature

    def fit(self, x: Any, y: Any = None, *, captions: Any = None, groups: Any = None, validation: Any = None) -> Self:
        """Keep the support set; weights and temperature come from its images left out in turn, or from `validation`.

        Parameters
        ----------
        x : image vectors of the support (n, dim), or `Features`; None where there are captions only (delta 1)
        y : n labels (default: those of the features)
        captions : vectors of the n captions, row by row those of x, or `Features`
        groups : n numbers or names; rows that share one are views of one image and are held out together
        validation : (x, y) or `Features` with labels of images to choose on instead (paper); without it, an image is
            left out together with its caption
        """
        if x is None and captions is None:
            raise ClipworksError("x must hold the vectors of images, or captions those of captions. Got neither.")
        alone, x = x is None, captions if x is None else x
        shots = self._open(x, y, groups, validation)
        deltas, keys = self._deltas(alone, captions is not None), None
        if captions is not None:
            keys = check_text(captions, shots.x.shape[1], fingerprint(x), "captions")
            if len(keys) != len(shots.y):
                raise ClipworksError(f"captions must have one row per row of x ({len(shots.y)}). Got {len(keys)}.")
        self.captions_ = None if keys is None else Cache.of(replace(shots, x=keys)).keys
        self._take(self._choose(shots, deltas), shots)
        return self

    def _deltas(self, alone: bool, captions: bool) -> tuple[float, ...]:
        """Shares of the captions to try: 1 where they are alone, 0 where there are none."""
        deltas = grid("delta", self.delta, self.deltas)
        check_range("delta" if self.delta is not None else "deltas", deltas[-1], 0, 1)
        if self.delta and not captions:
            raise ClipworksError(f"captions must be given for delta. Got delta={self.delta} and none.")
        return (1.0,) if alone else deltas if captions else (0.0,)

    def _choose(self, shots: Shots, deltas: tuple[float, ...]) -> Choice:
        grids, cache = weight_grids(self), Cache.of(shots)
        self.keys_, self.owners_ = cache.keys, cache.owners
        self.beta_, self.gamma_, self.delta_ = start(grids[0], 1.0), start(grids[2], 0.0), start(deltas, 0.5)
        choice = self._choice(shots.held)
        if len(choice.y):
            mixed, likes = self._asked(*shots.held, shots.held_images)
            self.delta_, self.beta_, self.gamma_ = choose(choice, shots, deltas, mixed, likes, grids)
        return choice

    def _asked(
        self, x: np.ndarray, y: np.ndarray | None = None, own: np.ndarray | None = None
    ) -> tuple[Callable[[float], list[Asked]], list[np.ndarray]]:
        """Images asked about: a function from delta to them, and their likeness to the keys."""

        def blocks(keys: np.ndarray) -> list[Asked]:
            return list(Cache(keys, self.owners_, len(self.classes_)).blocks(x, y, own, self.text_))

        held = blocks(self.keys_)
        captions = held if self.captions_ is None else blocks(self.captions_)

        def mixed(delta: float) -> list[Asked]:
            each = zip(held, captions, strict=True)
            return [replace(a, distance=(1 - delta) * a.distance + delta * b.distance) for a, b in each]

        return mixed, [likeness(part, self.keys_, self.text_, self.temperature) for part in held]

    def _scores(self, x: np.ndarray) -> np.ndarray:
        mixed, likes = self._asked(x)
        return weighed(mixed(self.delta_), likes, self.beta_, self.alpha_, self.gamma_)

    def _sum(self, x: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return scores if self.text_ is None else zero_shot(x, self.text_) + scores  # the weights are in the scores
