"""DeCLIP's losses: what a patch shows is learned from crops, which patches belong together from a vision model, apart.

Claim: CLIP's patch features improve when content and context are distilled from two teachers into two outputs of the
last attention that do not fight each other (patches alone, mIoU on Stuff / ADE / Context59 / Cityscapes: ClearCLIP
23.9 / 16.7 / 35.9 / 30.0, this 25.0 / 21.6 / 38.5 / 34.2).

Formula: L = mean_r (1 - cos(f_r, t_r)) + a L_ctx, f_r the student's map pooled over a box, t_r the teacher's vector of
that crop;  "distance": L_ctx = mean_i || S_i - cos(x_i, x)||_2;  "divergence": f_r is a mean of n x n pooled tokens
weighted by softmax_j cos(f_rj, t_r), KL(R || cos(f_rj, f_rk)) within the box is added, and L_ctx = mean_i KL(softmax
(S_i / tau) || softmax(cos(x_i, x) / tau)).

Papers: Wang et al. 2025, DeCLIP: Decoupled Learning for Open-Vocabulary Dense Perception (CVPR), and its extension,
Generalized Decoupled Learning for Enhancing Open-Vocabulary Dense Perception (2025).
Differs from the papers: nothing in the first form. Of the second, tau = 0.1 and its weight 0.1 are not confirmed.
Defaults: "distance" and a = 0.1 (CVPR).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_choice, check_range
from ..registry import method
from .common import unit, wide
from .regions import check_regions, nothing
from .relation_distillation import divergence

FORMS = ("distance", "divergence")


@method(card="declip", level="M")
def declip(
    region: torch.Tensor,
    teacher: torch.Tensor,
    context: torch.Tensor,
    relations: torch.Tensor,
    *,
    region_relations: torch.Tensor | None = None,
    form: str = "distance",
    temperature: float = 0.1,
    weight: float = 0.1,
) -> dict[str, torch.Tensor]:
    """Return the distillation of content and the weighted one of context.

    Parameters
    ----------
    region : the student's map pooled over boxes, shape (R, dim), or (R, n, dim) for n tokens of each box
    teacher : the frozen model's vectors of the same boxes cut out, shape (R, dim); no gradient reaches them
    context : the student's queries of the last block, all heads, shape (B, N, channels)
    relations : the vision model's cosines between patches, shape (B, N, N); see `completed`
    region_relations : its cosines between the n tokens of each box, shape (R, n, n), for the form "divergence"
    form : "distance" (CVPR) or "divergence" (generalised)
    temperature : divides cosines in the divergences
    weight : of the context (0.1: CVPR)

    Returns
    -------
    dict with `content` and `context`, whose sum is the loss

    Raises
    ------
    ClipworksError
        If shapes do not fit, form is unknown or a number is out of range.

    Inputs
    ------
    dense features of a student with vectors of crops and relations of patches by two frozen teachers

    Relations
    ---------
    With one token per box both forms have the same content. `farslip` pulls pooled patches to patches of the crop.

    References
    ----------
    Wang et al. 2025, DeCLIP: Decoupled Learning for Open-Vocabulary Dense Perception

    Examples
    --------
    >>> rows, patches = torch.eye(4), torch.eye(3)[None]
    >>> found = declip(rows, rows.roll(1, 0), patches, torch.eye(3)[None])  # every box shows something else
    >>> {name: round(abs(value.item()), 4) for name, value in found.items()}
    {'content': 1.0, 'context': 0.0}
    """
    check_choice("form", form, FORMS)
    check_range("weight", weight, 0.0)
    if not temperature > 0:
        raise ClipworksError(f"temperature must be above 0. Got {temperature}.")
    region = region[:, None] if region.ndim == 2 else region
    check_regions({"region": (None, None, None)}, region=region)
    check_regions({"teacher": (len(region), region.shape[2])}, teacher=teacher)
    check_regions({"context": (None, None, None)}, context=context)
    check_regions({"relations": (len(context), context.shape[1], context.shape[1])}, relations=relations)
    if region_relations is not None:
        check_regions({"region_relations": (len(region), *[region.shape[1]] * 2)}, region_relations=region_relations)
    elif form == "divergence" and region.shape[1] > 1:
        raise ClipworksError("form 'divergence' with several tokens per box needs region_relations. Got None.")
    content = content_distance(region, teacher, form)
    if form == "divergence" and region_relations is not None and len(region):
        content = content + context_distance(region, region_relations, form, temperature)
    return {"content": content, "context": weight * context_distance(context, relations, form, temperature)}


def content_distance(region: torch.Tensor, teacher: torch.Tensor, form: str = "distance") -> torch.Tensor:
    """Return 1 - the mean cosine between boxes (R, n, dim) and the teacher's rows (R, dim).

    The n tokens of a box are averaged evenly, or for "divergence" by a softmax over their cosines with the teacher.
    """
    if len(region) == 0:
        return nothing(region)
    region, goal = wide(region), wide(teacher.detach())
    if form == "divergence":
        shares = F.cosine_similarity(region, goal[:, None], dim=-1).softmax(1)
        pooled = (shares[..., None] * region).sum(1)
    else:
        pooled = region.mean(1)
    return 1 - F.cosine_similarity(pooled, goal, dim=-1).mean()


def context_distance(
    context: torch.Tensor, relations: torch.Tensor, form: str = "distance", temperature: float = 0.1
) -> torch.Tensor:
    """Return how far the cosines between patches (B, N, channels) are from given ones (B, N, N), mean over rows.

    "distance" is the length of a row's difference (neither a Frobenius norm nor a mean square), "divergence" the KL of
    the softmax of the student's row from that of the teacher's.
    """
    if 0 in context.shape:
        return nothing(context)
    rows = unit(context)
    near, goal = rows @ rows.transpose(1, 2), wide(relations.detach())
    if form == "distance":
        return torch.linalg.vector_norm(goal - near, dim=-1).mean()
    log_goal = (goal / temperature).log_softmax(-1)
    return divergence(log_goal.flatten(0, 1), (near / temperature).flatten(0, 1))


def completed(relations: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return relations (B, N, N) completed by self-attention maps of a diffusion model: (prod_l A_l) S.

    Parameters
    ----------
    relations : cosines between patches
    maps : A_1, A_2 ..., (B, N, N) each, averaged over heads and brought to the patches' grid; rows sum to 1
    """
    for number in reversed(maps):
        check_regions({"maps": tuple(relations.shape)}, maps=number)
        relations = number.to(relations) @ relations
    return relations
