"""CLOOB's loss: features replaced by what they retrieve from the batch, then InfoLOOB between the retrievals.

Claim: retrieval adds what occurs together to every feature, and a denominator without the positive does not saturate;
together they keep a model from hanging on a single cue (better than CLIP on all of eight zero-shot sets, trained on
Conceptual Captions and YFCC).

Formula: h(r; Z) = normalise(softmax(beta r Z^T) Z);  U_x = h(x; X), U_y = h(y; X), V_x = h(x; Y), V_y = h(y; Y);
LOOB(P, Q) = mean_i (-k_ii + log sum_{j != i} exp k_ij), k = P Q^T / tau;  L = tau (LOOB(U_x, U_y) + LOOB(V_y, V_x)).

Paper: Fürst et al. 2022, CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP (NeurIPS).
Differs from the paper: nothing in the arithmetic; the released code gathers without gradient and computes the matrix
of the whole batch on every process, here the rows given are the batch.
Defaults: beta 8, the recipe for Conceptual Captions with 1 / tau = 30 (14.3 and 14.3 for YFCC); both fixed.
"""

from __future__ import annotations

import torch

from ..errors import check_range
from ..registry import method
from .common import Scale, check_rows, similarities, unit, wide


@method(card="cloob", level="M")
def cloob(image: torch.Tensor, text: torch.Tensor, scale: Scale = 30.0, *, beta: float = 8.0) -> torch.Tensor:
    """Return tau times the sum of InfoLOOB between retrievals from images and between retrievals from texts.

    Parameters
    ----------
    image, text : unit rows of the whole batch, shape (n, dim), n at least 2; row i of one belongs to row i of the other
    scale : 1 / tau; the paper keeps it fixed (30: recipe for Conceptual Captions)
    beta : factor on the similarities of the retrieval; 0 retrieves the mean, large values the nearest row (8: same)

    Returns
    -------
    scalar tensor, float32 or better; may be negative

    Raises
    ------
    ClipworksError
        If shapes do not fit, there are fewer than 2 rows (nothing would be left in the denominator), or beta is
        negative.

    Inputs
    ------
    normalised features of image-text pairs; use is plain CLIP without the retrieval

    Relations
    ---------
    Per row InfoNCE is softplus of InfoLOOB. Without retrieval, and with the positive in the denominator, the loss is
    2 tau times `infonce`. Its value depends on which rows share a batch, so gradient accumulation changes the method;
    gradient caching does not.

    References
    ----------
    Fürst et al. 2022, CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP

    Examples
    --------
    >>> rows = torch.eye(6)
    >>> round(cloob(rows, rows, 30.0, beta=0.0).item(), 7)  # all retrieve the mean: 2 log(5) / 30
    0.1072959
    """
    check_rows(least=2, image=image, text=text)
    check_range("beta", beta, 0.0)
    by_image = infoloob(retrieve(image, image, beta), retrieve(text, image, beta), scale)
    by_text = infoloob(retrieve(text, text, beta), retrieve(image, text, beta), scale)
    return (by_image + by_text) / scale


def retrieve(state: torch.Tensor, stored: torch.Tensor, beta: float) -> torch.Tensor:
    """Return for every state the unit mean of the stored rows, weighted by how well they match it.

    Parameters
    ----------
    state : unit rows of shape (n, dim)
    stored : unit rows of shape (m, dim)
    beta : factor on the similarities
    """
    with torch.autocast(state.device.type, enabled=False):
        weights = similarities(state, stored, beta).softmax(1)
        return unit(weights @ wide(stored).to(weights.dtype))


def infoloob(queries: torch.Tensor, keys: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Return the mean over rows of -k_ii + log sum over the others of exp k_ij, k = scale * queries @ keys.T."""
    logits = similarities(queries, keys, scale)
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    # -inf and not 0, whose exponential of 1 would enter the sum
    return (logits.masked_fill(own, float("-inf")).logsumexp(1) - logits.diagonal()).mean()
