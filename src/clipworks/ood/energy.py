"""The free energy: the log of the sum of exponentials of all logits.

Claim: the energy follows the density of the data, which softmax probabilities do not, and separates unknown images
better (CIFAR-10: FPR95 lower by 18 points than MSP in the paper's pretrained setting).

Formula: s(z) = T log sum_j exp(z_j / T) of the logits z;  higher is more surely known.

Paper: Liu et al. 2020, Energy-based Out-of-distribution Detection.
Differs from the paper: the sign: the paper's energy is -s.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..registry import method
from ..zeroshot import open_set
from .common import as_logits, check_temperature


@method(card="clipn", level="M")
def energy(logits: Any, *, temperature: float = 1.0) -> np.ndarray:
    """Return how surely each image is of one of the classes.

    Parameters
    ----------
    logits : logits of any classifier, shape (..., C)
    temperature : T, above 0

    Returns
    -------
    float64 array of shape (...); higher is more surely known

    Inputs
    ------
    logits alone; no label and no unknown image is seen

    Relations
    ---------
    Between `max_logit` and `max_logit` + T log C; tends to `max_logit` for T to 0.

    References
    ----------
    Liu et al. 2020, Energy-based Out-of-distribution Detection

    Examples
    --------
    >>> energy(np.log([[1.0, 2.0], [0.5, 0.5]])).round(4)
    array([1.0986, 0.    ])
    """
    check_temperature(temperature)
    logits = as_logits("logits", logits)
    return open_set.energy(logits, scale=1.0, temperature=temperature)
