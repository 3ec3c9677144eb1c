"""Maximum concept matching: the softmax probability of the best class, of cosines without CLIP's scale.

Claim: compared with all given names at a mild temperature, images of none of them are told apart without training
(ImageNet against iNaturalist, ViT-B/16: AUROC 94.6 in the paper).

Formula: s(c) = max_j softmax(c / T)_j of the cosines c between image and class words, T = 1.

Paper: Ming et al. 2022, Delving into Out-of-Distribution Detection with Vision-Language Representations.
Differs from the paper: nothing; the prompt "a photo of a {}" is up to whoever makes the class vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..registry import method
from ..zeroshot import open_set
from .common import as_logits, check_temperature


@method(card="clipn", level="M")
def mcm(cosines: Any, *, temperature: float = 1.0) -> np.ndarray:
    """Return how surely each image is of one of the classes.

    Parameters
    ----------
    cosines : cosines of images with class words, shape (..., C), not scaled
    temperature : T, above 0

    Returns
    -------
    float64 array of shape (...); higher is more surely known

    Inputs
    ------
    cosines alone; no label and no unknown image is seen

    Relations
    ---------
    With T = 1 / scale it is `msp` of the scaled logits.

    References
    ----------
    Ming et al. 2022, Delving into Out-of-Distribution Detection with Vision-Language Representations

    Examples
    --------
    >>> mcm(np.array([[0.3, 0.1, 0.1], [0.2, 0.2, 0.2]])).round(4)
    array([0.3792, 0.3333])
    """
    check_temperature(temperature)
    cosines = as_logits("cosines", cosines)
    return open_set.mcm(cosines, temperature=temperature)
