"""Learned prompts and tuned towers beside heads, on the same draws: few-shot and base-to-new on real sets.

    python benchmarks/learned.py WORK --packages PACKAGES            # goes on where it was stopped

WORK and PACKAGES are those of few_shot.py. Each run passes through the towers, so there are fewer of them than there:
16 images of every class (of CIFAR-10 and Fashion-MNIST 8), seeds 1, 2, 3, at most `--most` test images, the bundled
model, every method with its defaults. Sets go round by seed, so that what is there after any time is balanced.
`benchmarks/results/learned.json` holds every number, with the zero-shot classifier and four heads on the same images.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

from clipworks.analysis.bench.run import bench
from clipworks.analysis.bench.summary import failures, read_runs
from common import record
from few_shot import SHARED, WORK, numbers, sets

HEADS = ("classifier", "ridge", "linear_probe", "cross_modal", "tip_adapter")
SETS = ("oxford_pets", "pacs", "traffic_lights", "textiles", "cifar10", "fashion_mnist")
SHOTS = {"cifar10": 8, "fashion_mnist": 8}
BASE_TO_NEW = ("pacs", "cifar10", "fashion_mnist", "emoji_styles")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=WORK.with_name("learned"), help="features and runs")
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--methods", nargs="+", default=["images"])
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--most", type=int, default=150, help="test images")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after so long")
    options = parser.parse_args()
    found = sets(options.data, options.packages, options.sets)
    began = time.monotonic()
    for seed in options.seeds:
        for protocol in ("few-shot", "base-to-new"):
            for name, data in found.items():
                if protocol == "base-to-new" and name not in BASE_TO_NEW:
                    continue
                if time.monotonic() - began > 60 * options.minutes:
                    break
                done = bench({name: data}, out=options.work, methods=[*HEADS, *options.methods], protocol=[protocol],
                             shots=[SHOTS.get(name, 16)], seeds=[seed], test_images=options.most)  # fmt: skip
                print(f"{time.monotonic() - began:6.0f} s  seed {seed}, {protocol}, {name}: {done.ran} runs, "
                      f"{done.skipped} done before, {done.failed} failed", flush=True)  # fmt: skip
                print(*(f"  {method} takes no part: {why}\n" for method, why in done.left_out.items()), end="")
    runs = read_runs(options.work / "runs")
    digest = hashlib.sha256(" ".join(sorted({run.facts["data"] for run in runs})).encode()).hexdigest()
    print(record("learned", numbers(runs, failures(options.work / "runs")), options.seeds[0], digest))


if __name__ == "__main__":
    main()
