"""InfoNCE, the loss of CLIP: every image is to find its text among all texts of the batch, and back.

Claim: contrasting images with the texts of a large batch makes features that name classes never labelled (CLIP ViT-L/14
at 336 pixels, ImageNet zero-shot: 76.2).

Formula: S = s * image @ text.T;  L = (CE(S, own) + CE(S.T, own)) / 2, CE the mean over rows of
-sum_j target_ij log softmax(S_i)_j, the target of row i being its own column.

Paper: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision (ICML); the name and
the bound: van den Oord et al. 2018, Representation Learning with Contrastive Predictive Coding.
Differs from the paper: nothing in the arithmetic. Similarities are computed in float32 whatever the features are. With
gathered rows each process contrasts its own rows, n x N instead of N x N; averaged over processes, value and gradient
are those of one process. Targets may be soft, or name several right columns.
Defaults: none here; the scale begins at 1/0.07 and is kept below 100 (CLIP).
"""

from __future__ import annotations

import torch

from ..registry import method
from .common import Scale, check_gathered, check_rows, cross_entropy, similarities


@method(card="contrastive-foundations", level="M")
def infonce(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: Scale,
    *,
    all_image: torch.Tensor | None = None,
    all_text: torch.Tensor | None = None,
    offset: int = 0,
    targets: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the mean cross-entropy of images among texts and of texts among images.

    Parameters
    ----------
    image, text : unit rows of shape (n, dim); row i of one belongs to row i of the other
    scale : factor on the similarities, the inverse temperature
    all_image, all_text : rows of all processes, shape (N, dim), in the order of their ranks; default the local ones
    offset : position of the local rows among all
    targets : probabilities of shape (n, N) instead of the own column, rows sum to 1, used for both directions; or a
        pair, of images over all texts and of texts over all images
    smoothing : share of the target spread evenly over all columns

    Returns
    -------
    scalar tensor, float32 or better

    Raises
    ------
    ClipworksError
        If shapes do not fit, the batch is empty, or the local rows do not lie within the gathered ones.

    Inputs
    ------
    normalised features of image-text pairs

    Relations
    ---------
    Per row it is softplus of InfoLOOB (`cloob`). `soft_label` makes targets, `multi_positive` takes several texts per
    image, `sigmoid` judges every pair by itself.

    References
    ----------
    Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision

    Examples
    --------
    >>> infonce(torch.eye(4), torch.eye(4), 20.0).item() < 1e-7
    True
    >>> round(infonce(torch.ones(4, 1), torch.ones(4, 1), 20.0).item(), 4)  # all texts alike: log 4
    1.3863
    """
    check_rows(image=image, text=text)
    all_image, all_text = check_gathered(image, text, all_image, all_text, offset)
    of_image, of_text = targets if isinstance(targets, tuple) else (targets, targets)
    to_text = cross_entropy(similarities(image, all_text, scale), offset, of_image, smoothing)
    to_image = cross_entropy(similarities(text, all_image, scale), offset, of_text, smoothing)
    return (to_text + to_image) / 2


def shared_targets(groups: torch.Tensor, all_groups: torch.Tensor | None = None) -> torch.Tensor:
    """Return targets that spread evenly over all columns of the same group: same caption, same class.

    Parameters
    ----------
    groups : integer per local row, shape (n,)
    all_groups : the same of all processes, shape (N,); default the local ones

    Returns
    -------
    tensor of shape (n, N), rows sum to 1
    """
    same = (groups[:, None] == (groups if all_groups is None else all_groups)[None]).float()
    return same / same.sum(1, keepdim=True)
