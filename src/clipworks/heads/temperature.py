"""The temperature that makes probabilities of logits mean what they say, and the likelihood at it."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar


def fit_temperature(logits: np.ndarray, y: np.ndarray) -> float:
    """Return the temperature that gives held-out images the least mean negative log-likelihood of softmax(logits / T).

    The likelihood is concave in 1 / T, so one bounded search finds its maximum. The bounds follow the spread s of the
    logits: T stays in [s / 100, 100 s], which keeps it finite where every held-out image is right, or all are wrong.

    Parameters
    ----------
    logits : (m, C), of images that the logits were not fitted on
    y : (m,) class numbers

    Examples
    --------
    >>> logits = np.log([[0.8, 0.2]] * 5)  # right in four of five: as sure as it deserves to be
    >>> round(fit_temperature(3 * logits, np.array([0, 0, 0, 0, 1])), 3)
    3.0
    """
    return calibrate(logits, y)[0]


def calibrate(logits: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return the temperature of `fit_temperature`, and the mean negative log-likelihood at it (0 of no images).

    >>> logits = np.log([[0.8, 0.2]] * 5)
    >>> round(calibrate(3 * logits, np.array([0, 0, 0, 0, 1]))[1], 3)  # the entropy of 0.8 and 0.2
    0.5
    """
    if len(y) == 0:
        return 1.0, 0.0
    centred = logits - logits.max(1, keepdims=True)
    own = centred[np.arange(len(y)), y]

    def loss(log_t: float) -> float:
        inverse = np.exp(-log_t)
        return float(np.mean(np.log(np.exp(inverse * centred).sum(1)) - inverse * own))

    if (width := spread(centred)) > 0:
        bounds = np.log(width) + np.log([0.01, 100.0])
        found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
        if found.fun < loss(0.0):
            return float(np.exp(found.x)), float(found.fun)
    return 1.0, loss(0.0)


def spread(logits: np.ndarray) -> float:
    """Return the standard deviation of logits (m, C) over the classes."""
    return float((logits - logits.mean(1, keepdims=True)).std())
