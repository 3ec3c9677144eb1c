"""SwALIP: image and text predict each other's cluster, the clusters of a batch being of equal size.

Claim: SwAV carried to image and text; added to plain CLIP it helps, but no more than the views that are used with it
(see `improved_baselines`).

Formula: P = Z c^T, similarities to K prototypes;  Q = Sinkhorn(exp(P / e)), three rounds of equal prototypes and equal
samples;  L = w (CE(softmax(P_image / t), Q_text) + CE(softmax(P_text / t), Q_image)) / 2.

Paper: Fini et al. 2023, Improved baselines for vision-language pre-training (TMLR); after Caron et al. 2020, SwAV
(NeurIPS).
Differs from the paper: both directions are averaged. Codes are made from the rows given: give those of all processes.
Defaults: w = 0.2, e = 0.05, three rounds from the released code; t = 0.1 from SwAV.
"""

from __future__ import annotations

import torch

from ..errors import ClipworksError, check_range
from ..registry import method
from .common import check_rows, cross_entropy, wide


@method(card="improved-baselines", level="M")
def swalip(
    image: torch.Tensor,
    text: torch.Tensor,
    *,
    weight: float = 0.2,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    rounds: int = 3,
) -> torch.Tensor:
    """Return the weighted cross-entropy of each side's clusters with the other's codes.

    Parameters
    ----------
    image, text : cosine similarities to the prototypes for the whole batch, shape (n, prototypes)
    weight : of the loss
    temperature : divides the similarities of the prediction
    epsilon : divides those of the codes; large values make them even
    rounds : of the balancing

    Returns
    -------
    scalar tensor, float32 or better

    Raises
    ------
    ClipworksError
        If shapes do not fit, or a number is out of range.

    Inputs
    ------
    similarities of projected unit rows of both towers to shared prototypes; both are thrown away after training

    Relations
    ---------
    Added to `infonce`. `barlip` and `siamlip` are its siblings.

    References
    ----------
    Fini et al. 2023, Improved baselines for vision-language pre-training; Caron et al. 2020, SwAV

    Examples
    --------
    >>> round(swalip(torch.eye(4), torch.eye(4)).item(), 6)
    2.7e-05
    """
    check_rows(image=image, text=text)
    check_range("weight", weight, 0.0)
    for name, value in (("temperature", temperature), ("epsilon", epsilon)):
        if not value > 0:
            raise ClipworksError(f"{name} must be above 0. Got {value}.")
    check_range("rounds", rounds, 1)
    pairs = ((image, text), (text, image))
    terms = [cross_entropy(wide(guess) / temperature, targets=sinkhorn(said, epsilon, rounds)) for guess, said in pairs]
    return weight * (terms[0] + terms[1]) / 2


@torch.no_grad()
def sinkhorn(scores: torch.Tensor, epsilon: float, rounds: int) -> torch.Tensor:
    """Return codes of shape (n, K): rows sum to 1 exactly, columns to about n / K.

    In logarithms, so that no similarity is too large.
    """
    logs = wide(scores) / epsilon
    for _ in range(rounds):
        logs = logs.log_softmax(0)  # every prototype alike
        logs = logs.log_softmax(1)  # every sample alike
    return logs.exp()
