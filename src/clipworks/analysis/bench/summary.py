"""Runs read back and summed up: mean over seeds with its spread, per method, set, protocol and setting."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Run:
    """What a report needs of a run's file.

    Attributes
    ----------
    model, data, protocol, method, seed : of the run
    setting : what else varies, as text: "" or "left_out sketch"
    shots : images per class
    value : its one number, in percent
    results : everything measured, by test
    cost : fit_seconds, microseconds_per_image, peak_mb
    facts : the rest of the record
    """

    model: str
    data: str
    protocol: str
    method: str
    seed: int
    setting: str
    shots: int
    value: float
    results: dict[str, dict[str, Any]]
    cost: dict[str, float | None]
    facts: dict[str, Any]


def read_runs(folder: Path) -> list[Run]:
    """Every finished run below a folder; those whose method failed are left out (`failures` lists them)."""
    return [run for record in _records(folder) if "summary" in record and (run := _run(record))]


def failures(folder: Path) -> dict[str, tuple[int, str]]:
    """Method -> how many of its runs failed, and why the first did."""
    out: dict[str, tuple[int, str]] = {}
    for record in _records(folder):
        if "error" in record:
            name = record["config"]["method"]
            count, reason = out.get(name, (0, record["error"]))
            out[name] = count + 1, reason
    return out


def _records(folder: Path) -> Iterable[dict[str, Any]]:
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            warnings.warn(f"{path} is left out, as it is not JSON ({error}); the command that made it makes it again",
                          stacklevel=2)  # fmt: skip
            continue
        if isinstance(record, dict) and "config" in record:
            yield record


def _run(record: dict[str, Any]) -> Run:
    config = record["config"]
    setting = " ".join(f"{k.replace('_', ' ')} {v}" for k, v in config["setting"].items() if k != "shots")
    return Run(Path(config["model"]).stem, config["data"], config["protocol"], config["method"], config["seed"],
               setting, config["setting"]["shots"], record["summary"], record["results"], record["cost"],
               {k: v for k, v in record.items() if k not in ("results", "cost", "summary")})  # fmt: skip


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation over seeds (and settings, where several are put together)."""

    mean: float
    spread: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of at least one value; the spread of one is 0."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.spread:.1f}" if self.count > 1 else f"{self.mean:.1f}"


def grouped(runs: Iterable[Run], *by: str) -> dict[tuple, list[Run]]:
    """Runs that agree in some attributes, in the order in which they first appear."""
    out: dict[tuple, list[Run]] = {}
    for run in runs:
        out.setdefault(tuple(getattr(run, name) for name in by), []).append(run)
    return out


def curve(runs: Iterable[Run], blocks: int = 1) -> dict[int, Mean]:
    """Shots -> mean over seeds. Of several sets or settings the mean of each seed comes first, so that the spread is
    that of the average; a seed that lacks one of the `blocks` does not count.
    """
    out = {}
    for (shots,), own in sorted(grouped(runs, "shots").items()):
        per_seed = [list(group.values()) for group in ({(r.data, r.setting): r.value for r in g}
                    for g in grouped(own, "seed").values()) if len(group) >= blocks]  # fmt: skip
        if per_seed:
            out[shots] = Mean.of([float(np.mean(values)) for values in per_seed])
    return out


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per model, protocol, set and method: accuracy at every number of shots, and what it costs at most."""
    rows = []
    for (model, protocol, data, method), own in grouped(runs, "model", "protocol", "data", "method").items():
        found = {f"{shots} shots" if shots else "words": str(mean) for shots, mean in curve(own).items()}
        rows.append({"model": model, "protocol": protocol, "data": data, "method": method, **found, **costs(own)})
    columns = sorted({c for row in rows for c in row if c == "words" or c.endswith(" shots")}, key=_place)
    order = ["model", "protocol", "data", "method", *columns, "fit s", "us/image", "MB"]
    return [{c: row.get(c) for c in order} for row in rows]


def costs(runs: Sequence[Run]) -> dict[str, float | None]:
    """Cost at the largest number of shots: median over its runs."""
    most = max(run.shots for run in runs)
    last = [run.cost for run in runs if run.shots == most]

    def middle(name: str) -> float | None:
        known = [value for cost in last if (value := cost.get(name)) is not None]
        return float(np.median(known)) if known else None

    return {"fit s": middle("fit_seconds"), "us/image": middle("microseconds_per_image"), "MB": middle("peak_mb")}


def _place(column: str) -> int:
    return 0 if column == "words" else int(column.split()[0])
