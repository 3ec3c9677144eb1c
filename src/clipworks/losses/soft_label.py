"""InfoNCE with softened labels: a part of the target goes to the other pairs, evenly or where they are similar.

Claim: pairs from the web are noisy, and captions often suit several images of a batch; targets that are not all or
nothing make small models better at the same cost (LightCLIP; label smoothing of the local pairs in CLIP-rocket).

Formula: y_ii = 1 - a, y_ij = a / (N - 1), or a softmax over j != i of S_ij without gradient;  L = (CE(S, y) +
CE(S.T, y)) / 2.

Paper: Nie et al. 2023, LightCLIP: Learning Multi-Level Interaction for Lightweight Vision-Language Models.
Differs from the paper: only its abstract could be read; the two spreads are its plain readings. How `a` grows over the
training is `softened`, linear.
Defaults: a = 0.1, even.
"""

from __future__ import annotations

import torch

from ..errors import check_choice, check_range
from ..registry import method
from .common import Scale, check_gathered, check_rows, own_columns, similarities
from .infonce import infonce

SPREADS = ("even", "similarity")


@method(card="lightclip", level="M")
def soft_label(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: Scale,
    *,
    soften: float = 0.1,
    spread: str = "even",
    all_image: torch.Tensor | None = None,
    all_text: torch.Tensor | None = None,
    offset: int = 0,
) -> torch.Tensor:
    """Return the contrastive loss with softened targets.

    Parameters
    ----------
    image, text : unit rows of shape (n, dim); row i of one belongs to row i of the other
    scale : factor on the similarities
    soften : a, the share of the target that goes to the other columns
    spread : "even", or "similarity" for those that the model itself finds near
    all_image, all_text : rows of all processes, shape (N, dim), in the order of their ranks; default the local ones
    offset : position of the local rows among all

    Returns
    -------
    scalar tensor, float32 or better; never below the entropy of the targets

    Raises
    ------
    ClipworksError
        If shapes do not fit, soften is out of range, or spread is unknown.

    Inputs
    ------
    normalised features of image-text pairs

    Relations
    ---------
    With soften=0 it is `infonce`; spread evenly it is `infonce` with smoothing = a N / (N - 1). Targets by a teacher
    are `relation_distillation`, targets by shared captions `infonce` with `shared_targets`.

    References
    ----------
    Nie et al. 2023, LightCLIP: Learning Multi-Level Interaction for Lightweight Vision-Language Models

    Examples
    --------
    >>> rows = torch.eye(6)
    >>> bool(soft_label(rows, rows, 100.0, soften=0.1) > soft_label(rows, rows, 100.0, soften=0.0))
    True
    """
    check_rows(image=image, text=text)
    check_range("soften", soften, 0.0, 1.0)
    check_choice("spread", spread, SPREADS)
    all_image, all_text = check_gathered(image, text, all_image, all_text, offset)
    with torch.no_grad():
        targets = tuple(
            softened_targets(similarities(rows, others, scale), soften, spread, offset)
            for rows, others in ((image, all_text), (text, all_image))
        )
    return infonce(image, text, scale, all_image=all_image, all_text=all_text, offset=offset, targets=targets)  # type: ignore[arg-type]


def softened_targets(logits: torch.Tensor, soften: float, spread: str = "even", offset: int = 0) -> torch.Tensor:
    """Return targets of the shape of the logits, 1 - soften on the own column; rows sum to 1."""
    rows, own = own_columns(logits), own_columns(logits, offset)
    targets = torch.ones_like(logits) if spread == "even" else logits.clone()
    targets[rows, own] = 0.0 if spread == "even" else float("-inf")
    if logits.shape[1] == 1:  # nothing else that could have a share
        return torch.ones_like(logits)
    targets = targets / targets.sum(1, keepdim=True) if spread == "even" else targets.softmax(1)
    targets = soften * targets
    targets[rows, own] = 1 - soften
    return targets


def softened(highest: float, step: int, total: int) -> float:
    """Return the share at a step: from 0 at the start to `highest` at the end, in a line.

    >>> softened(0.2, 50, 100)
    0.1
    """
    return highest * min(step, total) / total
