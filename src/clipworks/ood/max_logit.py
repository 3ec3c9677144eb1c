"""The largest logit: how well the best class fits, not how much better than the others.

Claim: with many classes that resemble each other the largest logit tells unknown images better than the largest
probability, which similar classes share among them.

Formula: s(z) = max_j z_j of the logits z;  higher is more surely known.

Paper: Hendrycks et al. 2022, Scaling Out-of-Distribution Detection for Real-World Settings.
Differs from the paper: nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..registry import method
from ..zeroshot import open_set
from .common import as_logits


@method(card="clipn", level="M")
def max_logit(logits: Any) -> np.ndarray:
    """Return how surely each image is of one of the classes.

    Parameters
    ----------
    logits : logits of any classifier, shape (..., C)

    Returns
    -------
    float64 array of shape (...); higher is more surely known

    Inputs
    ------
    logits alone; no label and no unknown image is seen

    Relations
    ---------
    At most `energy` and at least `energy` - log C. Works with a single class, where `msp` and `mcm` are constant.

    References
    ----------
    Hendrycks et al. 2022, Scaling Out-of-Distribution Detection for Real-World Settings

    Examples
    --------
    >>> max_logit(np.array([[2.0, 5.0, 1.0], [2.0, 2.5, 1.0]]))
    array([5. , 2.5])
    """
    logits = as_logits("logits", logits)
    return open_set.max_logit(logits, scale=1.0)
