"""Geodesic mixup: images and texts of a pair mixed along the great circle are hard negatives between the two cones.

Claim: fine-tuned CLIP keeps images and texts in two cones; pushing away what lies between them makes the features
better aligned and more uniform, and retrieval after fine-tuning better (Flickr30k, COCO).

Formula: m_l(a, b) = (sin(l t) a + sin((1 - l) t) b) / sin t, t = arccos(a . b);  M_i = m_l(I_i, T_i);
L = InfoNCE(I, T) + w [CE(Z_I) + CE(Z_T)], Z_I the similarities I M^T / tau2 with the true I_i . T_i / tau2 on the
diagonal, Z_T the same from T M^T. The m3 form adds unimodal mixes with the reversed batch as partner, p(i) = N - 1 - i:
images, texts or both mixed, contrasted with targets l on i and 1 - l on p(i).

Paper: Oh et al. 2023, Geodesic Multi-Modal Mixup for Robust Fine-Tuning (NeurIPS).
Differs from the paper: nothing in m2. Where both sides are mixed the targets are l^2 + (1 - l)^2 and 2 l (1 - l), which
is how much of the two captions the mixed rows share; plain CLIP at l = 1.
Defaults: weight 0.05 and tau2 0.07 from the released code; the m3 terms are off.
"""

from __future__ import annotations

import torch

from ..errors import ClipworksError, check_range
from ..registry import method
from .common import Scale, check_gathered, check_rows, cross_entropy, own_columns, similarities, unit, wide
from .infonce import infonce

NEAR = 1e-6  # cosines closer to 1 or -1 than this have no angle that could be divided by


@method(card="m2-mix", level="M")
def m2_mix(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: Scale,
    share: torch.Tensor | float,
    *,
    weight: float = 0.05,
    temperature: float = 0.07,
    images: float = 0.0,
    texts: float = 0.0,
    both: float = 0.0,
    partner_share: torch.Tensor | float | None = None,
    all_image: torch.Tensor | None = None,
    all_text: torch.Tensor | None = None,
    offset: int = 0,
) -> dict[str, torch.Tensor]:
    """Return the contrastive loss and the weighted losses on mixed rows.

    Parameters
    ----------
    image, text : unit rows of shape (n, dim); row i of one belongs to row i of the other
    scale : factor on the similarities of the contrastive loss and of the m3 terms
    share : of the image in a mix, in [0, 1]; one number for the whole batch
    weight : of the m2 term
    temperature : divides the similarities of the m2 term
    images, texts, both : weights of the m3 terms in which images, texts or both are mixed with the reversed batch
    partner_share : of a row in its mix with its partner (default: `share`)
    all_image, all_text : rows of all processes, shape (N, dim), in the order of their ranks; default the local ones
    offset : position of the local rows among all

    Returns
    -------
    dict with `infonce`, `m2`, and those of `images`, `texts`, `both` whose weight is above 0; the sum is the loss

    Raises
    ------
    ClipworksError
        If shapes do not fit, the batch is empty, or share, a weight or the temperature is out of range.

    Inputs
    ------
    normalised features of image-text pairs

    Relations
    ---------
    With all weights 0 it is `infonce`. At share 0 the mix is the text and Z_I are the ordinary similarities. The recipe
    `pretraining/m2_mix` draws the share.

    References
    ----------
    Oh et al. 2023, Geodesic Multi-Modal Mixup for Robust Fine-Tuning

    Examples
    --------
    >>> rows = torch.eye(4)
    >>> sorted(m2_mix(rows, rows, 10.0, 0.5))
    ['infonce', 'm2']
    >>> geodesic(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    tensor([0.7071, 0.7071])
    """
    check_rows(image=image, text=text)
    partner_share = share if partner_share is None else partner_share
    check_range("share", float(share), 0.0, 1.0)
    check_range("partner_share", float(partner_share), 0.0, 1.0)
    for name, value in {"weight": weight, "images": images, "texts": texts, "both": both}.items():
        check_range(name, value, 0.0)
    if not temperature > 0:
        raise ClipworksError(f"temperature must be above 0. Got {temperature}.")
    all_image, all_text = check_gathered(image, text, all_image, all_text, offset)
    found = {"infonce": infonce(image, text, scale, all_image=all_image, all_text=all_text, offset=offset)}
    mixed, own = geodesic(all_image, all_text, share), (wide(image) * wide(text)).sum(1) / temperature
    terms = []
    for rows in (image, text):
        logits = similarities(rows, mixed, 1 / temperature)
        logits[own_columns(logits), own_columns(logits, offset)] = own.to(logits.dtype)
        terms.append(cross_entropy(logits, offset))
    found["m2"] = weight * (terms[0] + terms[1])

    here = slice(offset, offset + len(image))
    image_mix, text_mix = (geodesic(rows, rows.flip(0), partner_share) for rows in (all_image, all_text))
    same = partner_share**2 + (1 - partner_share) ** 2  # two mixes of the same two pairs
    kinds: dict[str, tuple[float, torch.Tensor, torch.Tensor, torch.Tensor | float]] = {
        "images": (images, image_mix, all_text, partner_share),
        "texts": (texts, all_image, text_mix, partner_share),
        "both": (both, image_mix, text_mix, same),
    }
    for name, (factor, pictures, words, part) in kinds.items():
        if factor:
            targets = partner_targets(len(all_image), part, wide(pictures))[here]
            found[name] = factor * infonce(
                pictures[here], words[here], scale, all_image=pictures, all_text=words, offset=offset, targets=targets
            )
    return found


def geodesic(first: torch.Tensor, second: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
    """Return the unit vectors at `share` of the way on the great circle from the second rows to the first ones.

    Parameters
    ----------
    first, second : unit rows of shape (..., dim)
    share : 1 gives the first, 0 the second; rows that (nearly) agree, or are opposite, are mixed on the straight line
        and brought to length 1
    """
    first, second = wide(first), wide(second)
    cosine = (first * second).sum(-1, keepdim=True)
    angle = cosine.clamp(-1 + NEAR, 1 - NEAR).arccos()
    arc = ((share * angle).sin() * first + ((1 - share) * angle).sin() * second) / angle.sin()
    return torch.where(cosine.abs() < 1 - NEAR, arc, unit(share * first + (1 - share) * second))


def partner_targets(count: int, share: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """Return targets of shape (count, count): `share` on the own column, the rest on that of the reversed batch."""
    own = torch.eye(count, dtype=like.dtype, device=like.device)
    return share * own + (1 - share) * own.flip(1)
