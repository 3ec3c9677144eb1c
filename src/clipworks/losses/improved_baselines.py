"""CLIP-rocket's loss: a contrast of weak views, and the mean over all pairs of strong views, smoothed.

Claim: with strong views of both sides plain CLIP catches up with every self-supervised loss that was added to it, and
is better than itself without by up to 25 % (relative, zero-shot suite).

Formula: L = (L_g + A L_l) / (1 + A);  L_g = InfoNCE(z, w);  L_l = mean over the A x A pairs (a, b) of
InfoNCE(h_a, k_b) with label smoothing e, at a scale of its own.

Paper: Fini et al. 2023, Improved baselines for vision-language pre-training (TMLR).
Differs from the paper: nothing in the arithmetic; rows may be gathered with gradient.
Defaults: e = 0.1 from the released code.
"""

from __future__ import annotations

import torch

from ..errors import ClipworksError, check_range
from ..registry import method
from .common import Scale, check_gathered, check_rows
from .infonce import infonce


@method(card="improved-baselines", level="M")
def improved_baselines(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: Scale,
    local_image: torch.Tensor | None = None,
    local_text: torch.Tensor | None = None,
    local_scale: Scale = 10.0,
    *,
    smoothing: float = 0.1,
    all_image: torch.Tensor | None = None,
    all_text: torch.Tensor | None = None,
    all_local_image: torch.Tensor | None = None,
    all_local_text: torch.Tensor | None = None,
    offset: int = 0,
) -> dict[str, torch.Tensor]:
    """Return the weighted global and local contrast.

    Parameters
    ----------
    image, text : unit rows of the weak views, shape (n, dim)
    scale : factor on their similarities
    local_image, local_text : unit rows of the strong views, shape (n, A, width); None leaves them out (A = 0)
    local_scale : factor on the similarities of the strong views
    smoothing : share of the local targets spread evenly over all columns
    all_image, all_text, all_local_image, all_local_text : rows of all processes, in the order of their ranks
    offset : position of the local rows among all

    Returns
    -------
    dict with `global` and, with strong views, `local`, whose sum is the loss

    Raises
    ------
    ClipworksError
        If shapes do not fit, or smoothing is out of range.

    Inputs
    ------
    features of a weak view of each pair, and of A strong views of image and of text

    Relations
    ---------
    Without strong views it is `infonce`. `barlip`, `siamlip` and `swalip` are what its paper compares it with. The
    recipe `pretraining/improved_baselines` makes the views.

    References
    ----------
    Fini et al. 2023, Improved baselines for vision-language pre-training

    Examples
    --------
    >>> rows = torch.eye(4)
    >>> strong = torch.stack([rows, rows], 1)
    >>> sorted(improved_baselines(rows, rows, 20.0, strong, strong))
    ['global', 'local']
    """
    check_range("smoothing", smoothing, 0.0, 1.0)
    whole = infonce(image, text, scale, all_image=all_image, all_text=all_text, offset=offset)
    if local_image is None or local_text is None:
        if local_image is not local_text:
            raise ClipworksError("local_image and local_text must be given together, or neither.")
        return {"global": whole}
    check_rows(ndim=3, local_image=local_image, local_text=local_text)
    images, texts = check_gathered(local_image, local_text, all_local_image, all_local_text, offset, "local_image",
                                   "local_text")  # fmt: skip
    views = local_image.shape[1]
    pairs = [
        infonce(local_image[:, a], local_text[:, b], local_scale, all_image=images[:, a], all_text=texts[:, b],
                offset=offset, smoothing=smoothing)
        for a in range(views)
        for b in range(views)
    ]  # fmt: skip
    return {"global": whole / (1 + views), "local": torch.stack(pairs).mean() * views / (1 + views)}
