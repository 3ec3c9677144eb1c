"""SiamLIP and BYOLIP: the image predicts its text and the text its image, without negatives.

Claim: SimSiam and BYOL carried to image and text; added to plain CLIP they help, but no more than the views that are
used with them (see `improved_baselines`).

Formula: L = mean over rows of (2 - 2 cos(q(h), sg(k')) + 2 - 2 cos(q(k), sg(h'))) / 2, h and k the projected image and
text, q a predictor, sg no gradient; h' = h, k' = k (SiamLIP), or those of a slow copy of the model (BYOLIP).

Paper: Fini et al. 2023, Improved baselines for vision-language pre-training (TMLR); after Chen and He 2021 (SimSiam)
and Grill et al. 2020 (BYOL).
Differs from the paper: both directions are averaged, so that the loss lies in [0, 4].
Defaults: none here; the released code has predictors of 2048 and 128, and a slow copy with momentum 0.99.
"""

from __future__ import annotations

import torch

from ..registry import method
from .common import check_rows, unit


@method(card="improved-baselines", level="M")
def siamlip(
    image_guess: torch.Tensor, text_guess: torch.Tensor, image_target: torch.Tensor, text_target: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared distance of unit guesses from unit targets of the other side.

    Parameters
    ----------
    image_guess, text_guess : outputs of the predictor for images and for texts, shape (n, width)
    image_target, text_target : projected rows of the same pairs; no gradient reaches them

    Returns
    -------
    scalar tensor, float32 or better, in [0, 4]

    Raises
    ------
    ClipworksError
        If shapes do not fit, or the batch is empty.

    Inputs
    ------
    outputs of a projector and a predictor on both towers; both are thrown away after training

    Relations
    ---------
    Added to `infonce`. Rows are independent of each other: nothing is gathered. A-CLIP has the same term between views.

    References
    ----------
    Fini et al. 2023, Improved baselines for vision-language pre-training; Chen and He 2021, SimSiam; Grill et al. 2020

    Examples
    --------
    >>> image, text = torch.eye(2), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    >>> round(siamlip(image, text, image, text).item(), 3)  # 45 and 135 degrees apart: the mean of 2 - 2 cos
    2.0
    """
    check_rows(image_guess=image_guess, text_guess=text_guess, image_target=image_target, text_target=text_target)
    pairs = ((image_guess, text_target), (text_guess, image_target))
    return torch.stack([(2 - 2 * (unit(a) * unit(b.detach())).sum(1)).mean() for a, b in pairs]).mean()
