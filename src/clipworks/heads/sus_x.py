"""SuS-X: images made for the class names vote by similarity and by the classes that they look like (TIP-X).

Claim: a support set that is generated or retrieved for each class name improves on zero-shot CLIP without a labelled
image or training, and comparing which classes two images look like helps beside comparing the images.

Formula: A = x F^T;  signatures p(x) = softmax(x t^T / T) over the classes, T = 0.5;  D_ij = KL(p(x_i) || p(f_j));
psi takes -D_i. linearly to the range [min, max] of A_i.;  logits = SCALE * cos(x, t_c) + alpha * exp(-beta (1 - A)) L
+ gamma * psi(-D) L, with keys F and one-hot values L.

Paper: Udandarao et al. 2023, SuS-X: Training-Free Name-Only Transfer of Vision-Language Models (ICCV).
Differs from the paper: the support set is given, not made here. psi uses the ranges of one image's own row, in choosing
and in answering alike, so no answer depends on what else is asked (the release takes the range of all test images for D
and of the validation images for A). Weights come from the support by leaving each of its images out, or from
`validation=` (release: the validation split). Grids: beta 1 to 50 in steps of 1 (release: 200 values), gamma 0 to 30 in
50 steps, alpha as `tip_adapter`. The search is exact, counting intervals of alpha as `tip_adapter` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax

from ..errors import ClipworksError, check_range
from ..registry import method
from .common import SCALE, Choice, Head, Shots, zero_shot
from .tip_adapter import CELLS, WEIGHTS, Asked, Cache, best_of, count_right, grid

BETAS = tuple(float(k) for k in range(1, 51))
GAMMAS = tuple(0.6 * k for k in range(51))
Grids = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]  # values of beta, alpha and gamma


@method(card="caps-adapter", level="M")
class SusX(Head):
    """Classify by a support set, by similarity and by class signatures.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; adds zero-shot logits and
        gives the signatures (without text there is no third term)
    alpha, beta : weight and sharpness of the vote by similarity; default: the best of `alphas`, `betas`
    gamma : weight of the vote by signatures; default: the best of `gammas`
    alphas, betas, gammas : values to try; among equals as in `tip_adapter`
    temperature : T of the signatures (0.5: release)

    Attributes
    ----------
    keys_, owners_ : (images, dim) unit rows sorted by class; the class number of each
    beta_, gamma_ : the sharpness and the weight taken (1 and 0 where nothing can be left out)
    classes_, text_, alpha_, temperature_ : labels, words, weight, temperature of the probabilities

    Inputs
    ------
    features of generated, retrieved or labelled images of each class (`fit`); labelled images as `validation=`

    Relations
    ---------
    With gamma = 0 it is `tip_adapter`; `caps_adapter` adds the captions that the images were generated from.

    References
    ----------
    Udandarao et al. 2023, SuS-X: Training-Free Name-Only Transfer of Vision-Language Models

    Examples
    --------
    >>> words, made = np.eye(2), np.array([[1.0, 0.3], [0.9, 0.1], [0.2, 1.0], [0.1, 0.9]])
    >>> head = SusX(text=words).fit(made, [0, 0, 1, 1], validation=(np.array([[0.8, 0.3], [0.4, 0.9]]), [0, 1]))
    >>> head.predict([[0.9, 0.2]])
    array([0])
    """

    effort = 1

    def __init__(
        self,
        text: Any = None,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        alphas: Sequence[float] = WEIGHTS,
        betas: Sequence[float] = BETAS,
        gammas: Sequence[float] = GAMMAS,
        temperature: float = 0.5,
    ):
        self.text, self.alpha, self.beta, self.gamma = text, alpha, beta, gamma
        self.alphas, self.betas, self.gammas, self.temperature = alphas, betas, gammas, temperature

    def _learn(self, shots: Shots) -> Choice:
        grids, cache = weight_grids(self), Cache.of(shots)
        self.keys_, self.owners_ = cache.keys, cache.owners
        self.beta_, self.gamma_ = start(grids[0], 1.0), start(grids[2], 0.0)
        held = list(cache.blocks(*shots.held, shots.held_images, self.text_))
        choice = self._choice(shots.held)
        if held:
            likes = [likeness(part, self.keys_, self.text_, self.temperature) for part in held]
            _, self.beta_, self.gamma_ = choose(choice, shots, (0.0,), lambda _: held, likes, grids)
        return choice

    def _scores(self, x: np.ndarray) -> np.ndarray:
        held = list(Cache(self.keys_, self.owners_, len(self.classes_)).blocks(x, text=self.text_))
        likes = [likeness(part, self.keys_, self.text_, self.temperature) for part in held]
        return weighed(held, likes, self.beta_, self.alpha_, self.gamma_)

    def _sum(self, x: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return scores if self.text_ is None else zero_shot(x, self.text_) + scores  # the weights are in the scores


def weight_grids(head: Any) -> Grids:
    """Return the values of beta, alpha and gamma that a head's settings leave open; without words alpha 1, gamma 0."""
    check_range("temperature", head.temperature, 1e-9)
    betas, alphas, gammas = (
        grid(name, getattr(head, name), getattr(head, name + "s")) for name in ("beta", "alpha", "gamma")
    )
    if head.text_ is not None:
        return betas, alphas, gammas
    if head.gamma:
        raise ClipworksError(f"text must be given for gamma, as signatures need class words. Got gamma={head.gamma}.")
    return betas, (1.0,), (0.0,)


def start(values: Sequence[float], value: float) -> float:
    """What a setting is where nothing can be held out: the only value to try, or `value`."""
    return values[0] if len(values) == 1 else value


def likeness(part: Asked, keys: np.ndarray, text: np.ndarray | None, temperature: float) -> np.ndarray:
    """Return -D (n, m), the negative divergence of every image's class signature from every key's; zeros without words.

    >>> part, *_ = Cache(np.eye(2), np.arange(2), 2).blocks(np.eye(2), text=np.eye(2))
    >>> (likeness(part, np.eye(2), np.eye(2), 0.5) + 0.0).round(3)
    array([[ 0.   , -1.523],
           [-1.523,  0.   ]])
    """
    if text is None:
        return np.zeros_like(part.distance)
    image = log_softmax(part.zero / (SCALE * temperature), 0)
    key = log_softmax(keys @ text.T / temperature, 1)
    share = np.exp(image)
    return np.minimum(key @ share - (share * image).sum(0), 0)


def rescaled(part: Asked, likeness: np.ndarray) -> np.ndarray:
    """Return psi (n, m): each image's likeness, moved linearly to the range of its cosines with the keys."""
    affinity, like = 1 - part.distance, likeness
    if part.own is not None:  # an image's own key is no part of either range: the next one stands in its place
        like, column = like.copy(), np.arange(like.shape[1])
        for rows in (affinity, like):
            rows[part.own, column] = rows[(part.own + 1) % len(rows), column]
    (low, high), (least, most) = ((rows.min(0), rows.max(0)) for rows in (affinity, like))
    spread = most - least
    share = np.where(spread > 0, (like - least) / np.where(spread > 0, spread, 1), 1.0)
    return low + share * (high - low)


def weighed(held: Sequence[Asked], likes: Sequence[np.ndarray], beta: float, alpha: float, gamma: float) -> np.ndarray:
    """Return alpha * votes by similarity + gamma * votes by likeness, (images, C)."""
    each = zip(held, likes, strict=True)
    return np.concatenate(
        [alpha * part.votes(beta) + gamma * part.sums(rescaled(part, like)) for part, like in each], 1
    ).T


def tally(held: Sequence[Asked], likes: Sequence[np.ndarray], grids: Grids) -> np.ndarray:
    """Return how many images are right under every beta, alpha and gamma, as an array with those three axes."""
    betas, alphas, gammas = grids
    right = np.zeros((len(betas), len(alphas), len(gammas)), int)
    for part, like in zip(held, likes, strict=True):
        third = part.sums(rescaled(part, like))
        step = max(1, CELLS // part.zero.size)
        for begin in range(0, len(betas), step):
            chosen = slice(begin, begin + step)
            votes = np.stack([part.votes(beta) for beta in betas[chosen]])
            for g, gamma in enumerate(gammas):
                right[chosen, :, g] += count_right(part.zero + gamma * third, votes, part.y, alphas)
    return right


def choose(
    choice: Choice,
    shots: Shots,
    deltas: Sequence[float],
    mixed: Callable[[float], Sequence[Asked]],
    likes: Sequence[np.ndarray],
    grids: Grids,
) -> tuple[float, float, float]:
    """Return the best delta, beta and gamma, and set the choice to them and to the best alpha.

    Parameters
    ----------
    choice : empty, of the held-out images
    shots : that they come from
    deltas : shares of the captions
    mixed : from one of them to the held-out images with the distances that follow
    likes : `likeness` of each of their parts
    grids : values of beta, alpha and gamma to try
    """
    right = np.stack([tally(mixed(delta), likes, grids) for delta in deltas])
    choice.alphas = (1.0,)  # the weights are in the scores
    for best in best_of(right, shots):
        delta, beta, alpha, gamma = setting = tuple(v[k] for v, k in zip((deltas, *grids), best, strict=True))
        choice.offer(setting, weighed(mixed(delta), likes, beta, alpha, gamma))
    delta, beta, choice.alpha, gamma = choice.setting
    return delta, beta, gamma
