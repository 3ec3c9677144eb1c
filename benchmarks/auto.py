"""Whether `auto` chooses well: its accuracy beside zero-shot's and beside every single method's, on real sets.

    python benchmarks/auto.py WORK --packages PACKAGES --second second.safetensors [--sets pacs cifar10]

WORK is the folder of few_shot.py, with its features and its runs of the single methods; what is missing there is made
first by `few_shot.py WORK --sets ...`. Runs of `auto` go to WORK/auto: the same command goes on where it was.

    versus_words   accuracy of auto less that of zero-shot, mean over the seeds, and two standard errors of that
                   difference as if the two had answered different images, which is too much: errors are shared
    regret         accuracy of the best single method, told by its mean over the seeds on the test images, less auto's;
                   no rule that sees shots alone can always reach it
    rank           how many of the single methods have a higher mean
    seconds        of processor time to choose and to fit
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from clipworks.analysis.bench.run import bench
from clipworks.analysis.bench.summary import Run, grouped, read_runs
from common import record
from few_shot import MOST, SHARED, WORK, sets

SETS = ("oxford_pets", "pacs", "textiles", "cifar10")
SHOTS = (1, 4, 16)
WORDS = "classifier"


def compared(own: list[Run], others: list[Run], images: int) -> dict[str, Any]:
    """Auto beside the single methods, on one set with one encoder and so many shots."""
    mean = {method: float(np.mean([r.value for r in runs])) for (method,), runs in grouped(others, "method").items()}
    value = float(np.mean([r.value for r in own]))
    best = max(mean, key=lambda name: mean[name])
    shares = np.array([value, mean[WORDS]]) / 100
    error = 100 * float(np.sqrt((shares * (1 - shares)).sum() / images))
    return {
        "accuracy": [round(r.value, 2) for r in sorted(own, key=lambda r: r.seed)],
        "words": round(mean[WORDS], 2), "versus_words": round(value - mean[WORDS], 2),
        "two_errors": round(2 * error, 2), "best": best, "best_accuracy": round(mean[best], 2),
        "regret": round(mean[best] - value, 2),
        "rank": 1 + sum(other > value for other in mean.values()), "methods": len(mean),
        "seconds": round(float(np.median([r.cost["fit_seconds"] for r in own])), 2),
        "regret_of": {name: round(mean[best] - other, 2) for name, other in mean.items()},
    }  # fmt: skip


def always(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean regret of every single method that answered everywhere, had it been taken each time."""
    names = set.intersection(*(set(row["regret_of"]) for row in rows))
    return {name: round(float(np.mean([row["regret_of"][name] for row in rows])), 2) for name in sorted(names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=WORK, help="folder of few_shot.py")
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--second", type=Path, help="the second encoder, made by second_encoder.py")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--shots", type=int, nargs="+", default=SHOTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only-run", action="store_true", help="a piece of the runs; nothing is recorded")
    parser.add_argument("--only-record", action="store_true", help="of the runs that are there; nothing is run")
    given = parser.parse_args()
    own = given.work / "auto"
    own.mkdir(parents=True, exist_ok=True)
    if not (own / "features").exists():
        (own / "features").symlink_to((given.work / "features").resolve())
    if not given.only_record:
        found = sets(given.data, given.packages, list(given.sets))
        model = ["clipworks-small", *([str(given.second)] if given.second else [])]
        print(bench(found, out=own, methods=["auto"], shots=given.shots, seeds=given.seeds, model=model,
                    test_images=MOST))  # fmt: skip
    if given.only_run:
        return
    single = [r for r in read_runs(given.work / "runs") if r.protocol == "few-shot" and r.data in given.sets]
    chosen = read_runs(own / "runs")
    results: dict[str, Any] = {}
    for (model, data, shots), runs in grouped(chosen, "model", "data", "shots").items():
        others = [r for r in single if (r.model, r.data) == (model, data) and r.shots in (0, shots)]
        images = runs[0].results["test"]["images"]
        results.setdefault(model, {}).setdefault(data, {})[f"{shots} shots"] = compared(runs, others, images)
    summary = {}
    for shots in given.shots:
        every = [rows[f"{shots} shots"] for model in results.values() for rows in model.values()]
        summary[f"{shots} shots"] = {
            "comparisons": len(every),
            "below_words": sum(row["versus_words"] < 0 for row in every),
            "below_words_by_two_errors": sum(row["versus_words"] < -row["two_errors"] for row in every),
            "mean_versus_words": round(float(np.mean([row["versus_words"] for row in every])), 2),
            "mean_regret": round(float(np.mean([row["regret"] for row in every])), 2),
            "median_rank": float(np.median([row["rank"] for row in every])),
            "mean_regret_of_single_methods": dict(sorted(always(every).items(), key=lambda entry: entry[1])),
        }
    print(summary)
    digest = hashlib.sha256(" ".join(sorted(r.facts["data"] for r in chosen)).encode()).hexdigest()
    print(record("auto", {"summary": summary, "results": results}, given.seeds[0], digest))


if __name__ == "__main__":
    main()
