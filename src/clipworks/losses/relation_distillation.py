"""Relation distillation: the student's similarities between images and texts are to be the teacher's.

Claim: a student of any width learns which pairs are near (CLIP-KD, ViT-T/16 from a ViT-B/16, ImageNet zero-shot: 30.6
alone, 31.9 with this term; TinyCLIP trains with it alone, 61M/32 on LAION: 62.4).

Formula: P_t = softmax over rows of s_t v @ y.T, P_s the same of s u @ w.T (v, y the teacher's images and texts, u, w
the student's);  L = mean over rows of sum P_t log(P_t / P_s), the mean of images over texts and texts over images.
Cross-entropy, without P_t in the logarithm, has the same gradient.

Papers: Yang et al. 2024, CLIP-KD: An Empirical Study of CLIP Model Distillation (CVPR), where it is called contrastive
relational distillation; Wu et al. 2023, TinyCLIP (ICCV), affinity mimicking; Vasu et al. 2024, MobileCLIP (CVPR).
Differs from the papers: nothing in the arithmetic. Several teachers may be given; their probabilities, not their
logits, are averaged (MobileCLIP).
Defaults: form "kl" (CLIP-KD); TinyCLIP and MobileCLIP use "ce" with scales of 50 (student) and 100 (teachers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import ClipworksError, check_choice
from ..registry import method
from .common import Scale, check_rows, similarities

Rows = torch.Tensor | Sequence[torch.Tensor]


@method(card="distillation-foundations", level="M")
def relation_distillation(
    image: torch.Tensor,
    text: torch.Tensor,
    teacher_image: Rows,
    teacher_text: Rows,
    scale: Scale,
    teacher_scale: Scale,
    *,
    form: str = "kl",
) -> torch.Tensor:
    """Return the divergence of the student's similarities from the teacher's, averaged over both directions.

    Parameters
    ----------
    image, text : the student's unit rows, shape (n, dim)
    teacher_image, teacher_text : the teacher's for the same pairs, of any width; several teachers as sequences. No
        gradient reaches them
    scale, teacher_scale : factors on the similarities of student and teacher
    form : "kl" is 0 where both agree (CLIP-KD); "ce" adds the teacher's entropy (TinyCLIP)

    Returns
    -------
    scalar tensor, float32 or better

    Raises
    ------
    ClipworksError
        If shapes do not fit, the batch is empty, or the form is unknown.

    Inputs
    ------
    vectors of the same image-text pairs by two models

    Relations
    ---------
    Rotating the student's space, or the teacher's, changes nothing, unlike in `feature_distillation`. A teacher that is
    sure of the pairs makes "ce" `infonce`. `clip_refine` mixes its targets with the true pairs.

    References
    ----------
    Yang et al. 2024, CLIP-KD; Wu et al. 2023, TinyCLIP; Vasu et al. 2024, MobileCLIP

    Examples
    --------
    >>> rows = torch.eye(3)
    >>> relation_distillation(rows, rows, rows, rows, 10.0, 10.0)
    tensor(0.)
    """
    check_choice("form", form, ("kl", "ce"))
    check_rows(image=image, text=text)
    images = [teacher_image] if isinstance(teacher_image, torch.Tensor) else list(teacher_image)
    texts = [teacher_text] if isinstance(teacher_text, torch.Tensor) else list(teacher_text)
    if len(images) != len(texts) or not images:
        raise ClipworksError(f"teacher_image and teacher_text must hold as many teachers. "
                             f"Got {len(images)} and {len(texts)}.")  # fmt: skip
    for one, other in zip(images, texts, strict=True):
        check_rows(teacher_image=one, teacher_text=other)
        if len(one) != len(image):
            raise ClipworksError(f"teacher_image must have the rows of image, {len(image)}. Got {len(one)}.")
    logits = similarities(image, text, scale)
    with torch.no_grad():
        seen = [similarities(one, other, teacher_scale) for one, other in zip(images, texts, strict=True)]
        target, target_t = mean_log_softmax(seen), mean_log_softmax([s.T for s in seen])
    return (divergence(target, logits, form) + divergence(target_t, logits.T, form)) / 2


def mean_log_softmax(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the logarithm of the mean over teachers of their row-wise probabilities."""
    logs = torch.stack([one.log_softmax(1) for one in logits])
    return logs[0] if len(logs) == 1 else logs.logsumexp(0) - math.log(len(logs))


def divergence(log_target: torch.Tensor, logits: torch.Tensor, form: str = "kl") -> torch.Tensor:
    """Return the mean over rows of KL(target || softmax(logits)), or of the cross-entropy for the form "ce"."""
    target = log_target.exp()
    found = logits.log_softmax(1)
    # probabilities of 0 weigh nothing, though their logarithm may be -inf
    terms = torch.where(target > 0, target * ((log_target - found) if form == "kl" else -found), 0.0)
    return terms.sum(1).mean()
