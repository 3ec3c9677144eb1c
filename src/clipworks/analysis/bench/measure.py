"""What is measured: accuracy, how far probabilities can be trusted, and what an answer costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BINS = 15
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def score(y: np.ndarray, found: np.ndarray, probabilities: np.ndarray | None) -> dict[str, float]:
    """Accuracy in percent over images and as the mean of the classes; calibration error and likelihood if known.

    Parameters
    ----------
    y, found : n class numbers, right ones and answers
    probabilities : (n, C), or None
    """
    hit = found == y
    per_class = [hit[y == c].mean() for c in np.unique(y)]
    out = {"accuracy": 100 * float(hit.mean()), "mean_per_class": 100 * float(np.mean(per_class)), "images": len(y)}
    if probabilities is not None:
        own = np.maximum(probabilities[np.arange(len(y)), y], 1e-12)
        out |= {"calibration_error": 100 * calibration_error(y, probabilities), "nll": float(-np.log(own).mean())}
    return out


def calibration_error(y: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error over bins of equal width: sum |B| / n * |accuracy(B) - confidence(B)|.

    >>> round(calibration_error(np.array([0, 0, 0, 0, 1]), np.full((5, 2), [0.8, 0.2])), 6)
    0.0
    """
    sure, hit = probabilities.max(1), probabilities.argmax(1) == y
    place = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = np.bincount(place, hit, minlength=bins) - np.bincount(place, sure, minlength=bins)
    return float(np.abs(gaps).sum() / len(y))


class Cost:
    """Processor seconds of steps, and how far the memory of this process rose over its level at the start.

    On one thread processor time is what a step takes on an idle core, however busy the machine is. The peak is the
    kernel's own (Linux); elsewhere it is None. Memory that was free within the process is not counted.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.before = _memory("VmRSS") if _reset() else None

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Do something and remember how long it took."""
        began = time.process_time()
        done = work()
        self.seconds[name] = time.process_time() - began
        return done

    def peak_mb(self) -> float | None:
        """Rise of the peak so far, in MB."""
        peak = _memory("VmHWM")
        return None if self.before is None or peak is None else round(max(0.0, peak - self.before), 2)


def _reset() -> bool:
    try:
        RESET.write_text("5")  # the peak begins anew
    except OSError:
        return False
    return True


def _memory(entry: str) -> float | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{entry}:")), None)
