"""Model soups: fine-tuned models of one start, averaged into one model at no cost in use.

Claim: averaging the weights of many fine-tuned models beats the best of them (72 CLIP ViT-B/32 on ImageNet: best
single 80.39 %, greedy soup 81.03 %; five shifted sets 47.97 % and 50.86 %).

Formula: uniform soup theta = mean_k theta_k. Greedy: in order of held-out score, add model k to the mean if the
score of the new mean is strictly higher, else drop it.

Paper: Wortsman et al. 2022, Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time (ICML).
Differs from the paper: nothing. The score must come from a validation set, not from the test set, and the soup's own
test score must come from other data than its selection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import ClipworksError
from ..registry import method
from .wise_ft import check_alike

State = Mapping[str, torch.Tensor]


@dataclass
class Soup:
    """A greedy soup.

    Attributes
    ----------
    weights : the averaged state dict
    members : which models are in it, in the order they entered
    score : its held-out score
    scores : held-out score of every single model
    """

    weights: dict[str, torch.Tensor]
    members: list[int]
    score: float
    scores: list[float]


def uniform_soup(states: Sequence[State]) -> dict[str, torch.Tensor]:
    """Return the mean of state dicts; whole numbers are taken from the first.

    >>> uniform_soup([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])["w"]
    tensor([2.])
    """
    if not states:
        raise ClipworksError("states must hold at least one state dict. Got none.")
    check_alike(*states)
    found = {}
    for name, first in states[0].items():
        if len(states) == 1 or not first.is_floating_point():
            found[name] = first.clone()
        else:  # in float64, so that neither the order nor the number of equal models changes the result
            total = torch.stack([state[name].double() for state in states]).sum(0)
            found[name] = (total / len(states)).to(first.dtype)
    return found


@method(card="distillation-foundations", level="M")
def greedy_soup(states: Sequence[State], score: Callable[[State], float]) -> Soup:
    """Average models as long as the held-out score rises.

    Parameters
    ----------
    states : K state dicts with the same names and shapes, fine-tuned from one start
    score : from a state dict to its score on held-out data, higher is better; called at most 2K - 1 times

    Returns
    -------
    Soup, whose score is at least that of the best single model

    Raises
    ------
    ClipworksError
        If there are no states, or names or shapes differ.

    Inputs
    ------
    state dicts in memory, and a function that evaluates one

    Relations
    ---------
    Without selection it is `uniform_soup`; of two models, fine-tuned and start, it is WiSE-FT at 0.5 (`wise_ft`).

    References
    ----------
    Wortsman et al. 2022, Model soups

    Examples
    --------
    >>> states = [{"w": torch.tensor([w])} for w in (0.0, 4.0, 9.0)]
    >>> soup = greedy_soup(states, lambda s: -abs(s["w"].item() - 2.0))
    >>> soup.members, soup.weights["w"].item()
    ([0, 1], 2.0)
    """
    if not states:
        raise ClipworksError("states must hold at least one state dict. Got none.")
    check_alike(*states)
    scores = [float(score(state)) for state in states]
    order = sorted(range(len(states)), key=lambda k: -scores[k])
    members, best = order[:1], scores[order[0]]
    for k in order[1:]:
        value = float(score(uniform_soup([states[m] for m in [*members, k]])))
        if value > best:
            members, best = [*members, k], value
    return Soup(uniform_soup([states[m] for m in members]), members, best, scores)
