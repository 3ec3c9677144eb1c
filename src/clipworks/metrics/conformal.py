"""Conformal quantiles: thresholds that keep their promised rate on further images of the same kind, however many there
were to set them on.

Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World.
"""

from __future__ import annotations

import math

import numpy as np


def conformal_quantile(strange: np.ndarray, rate: float) -> float:
    """Return what at most `rate` of further values like these exceed, on average: the ceil((1 - rate) (n + 1))-th
    smallest of n; infinity where there are too few for that.

    For a lower threshold, of values that are small where strange: -conformal_quantile(-values, rate).

    >>> conformal_quantile(np.array([0.3, 0.1, 0.2]), 0.25), conformal_quantile(np.array([0.3, 0.1, 0.2]), 0.2)
    (0.3, inf)
    """
    rank = max(math.ceil((1 - rate) * (len(strange) + 1) - 1e-9), 1)
    return float(np.sort(strange)[rank - 1]) if rank <= len(strange) else math.inf
