"""The largest softmax probability: the baseline for telling images of known classes from others.

Claim: the probability of the best class separates known from unknown images better than chance on all tasks tried,
and is what every later score is compared with.

Formula: s(z) = max_j softmax(z / T)_j of the logits z;  higher is more surely known.

Paper: Hendrycks and Gimpel 2017, A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
Networks.
Differs from the paper: nothing; T = 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..registry import method
from ..zeroshot import open_set
from .common import as_logits, check_temperature


@method(card="clipn", level="M")
def msp(logits: Any, *, temperature: float = 1.0) -> np.ndarray:
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
    Invariant to a constant added to all logits, unlike `max_logit` and `energy`. `mcm` is this on cosines.

    References
    ----------
    Hendrycks and Gimpel 2017, A Baseline for Detecting Misclassified and Out-of-Distribution Examples

    Examples
    --------
    >>> msp(np.log([[0.7, 0.2, 0.1], [0.4, 0.3, 0.3]]))
    array([0.7, 0.4])
    """
    check_temperature(temperature)
    logits = as_logits("logits", logits)
    return open_set.msp(logits, scale=1.0, temperature=temperature)
