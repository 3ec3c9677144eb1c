"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from ..errors import check_choice, check_range

SCHEDULES = ("cosine", "constant", "linear")


def learning_rate(
    step: int,
    *,
    lr: float,
    total: int,
    warmup: int = 0,
    schedule: str = "cosine",
    start: float = 0.0,
    end: float = 0.0,
) -> float:
    """Return the learning rate of one step: linear warm-up, then the schedule.

    Warm-up gives `start + (lr - start) * (step + 1) / warmup`; cosine then gives
    `end + (lr - end) * (1 + cos(pi * (step - warmup) / (total - warmup))) / 2`.

    Parameters
    ----------
    step : number of the step, from 0
    lr : highest learning rate
    total : number of steps of the whole run
    warmup : number of warm-up steps
    schedule : "cosine", "linear" or "constant" after warm-up
    start, end : where warm-up begins and the schedule ends (0 and 0 as in open_clip; SLIP uses 1e-6 and 1e-5)

    Examples
    --------
    >>> [learning_rate(s, lr=1.0, total=4, warmup=2) for s in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    check_choice("schedule", schedule, SCHEDULES)
    if step < warmup:
        return start + (lr - start) * (step + 1) / warmup
    if schedule == "constant":
        return lr
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    falling = 0.5 * (1 + math.cos(math.pi * share)) if schedule == "cosine" else 1 - share
    return end + (lr - end) * falling


def warmup_steps(warmup: float, total: int) -> int:
    """Return warm-up in steps: a number below 1 is a share of the run.

    >>> warmup_steps(0.1, 500), warmup_steps(20, 500)
    (50, 20)
    """
    check_range("warmup", warmup, 0)
    steps = round(warmup * total) if warmup < 1 else int(warmup)
    return min(steps, max(0, total - 1))
