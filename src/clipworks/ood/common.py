"""What the scores for unknown classes share."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ClipworksError
from ..heads.common import as_array

UNKNOWN = "none of these"  # label of an image that shows none of the classes


def as_logits(name: str, logits: Any) -> np.ndarray:
    """Return logits (..., C) as float64, or raise naming the argument."""
    try:
        found = np.asarray(as_array(logits), np.float64)
    except (TypeError, ValueError):
        raise ClipworksError(f"{name} must be an array of numbers. Got {type(logits).__name__}.") from None
    if found.ndim < 1 or not found.shape[-1]:
        raise ClipworksError(f"{name} must have the shape (..., C) with C at least 1. Got {found.shape}.")
    if not np.isfinite(found).all():
        raise ClipworksError(
            f"{name} must be finite. Got NaN or infinity in {int((~np.isfinite(found)).sum())} places."
        )
    return found


def check_temperature(temperature: float) -> None:
    """Raise unless a temperature is above 0."""
    if not temperature > 0:
        raise ClipworksError(f"temperature must be above 0. Got {temperature!r}.")
