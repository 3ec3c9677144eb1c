"""Learned prompts and tuned towers beside heads, on the same draws: few-shot and base-to-new on real sets.

    python benchmarks/learned.py WORK --packages PACKAGES            # goes on where it was stopped

WORK and PACKAGES are those of few_shot.py. Each run passes through the towers, so there are fewer of them than there: 4
images of every class (base-to-new: 8), seeds 1, 2, 3, at most `--most` test images, the bundled model. Prompts run with
their defaults, but GOPro and IP-CLIP for 10 epochs (of 50) and TPT with 8 views (of 64); the towers are tuned for some
dozen steps, with the settings in `TUNED`, which nothing was chosen by, and only LoRA and CLIP-SVD are asked for new
classes too. Sets go round by seed, so that what is there after any time is balanced. `benchmarks/results/learned.json`
holds every number, with the zero-shot classifier and four heads on the same images.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import numpy as np

from clipworks.analysis.bench.run import bench
from clipworks.analysis.bench.summary import failures, read_runs
from common import record
from few_shot import SHARED, WORK, numbers, sets

HEADS = ("classifier", "ridge", "linear_probe", "cross_modal", "tip_adapter")
PROMPTS = ("coop", "biomedcoop", "mocoop", "gopro(epochs=10)", "ip_clip(epochs=10)", "cocoop", "maple", "vpt",
           "tpt(views=8)")  # fmt: skip
TUNED = ("lora(steps_per_shot=5)", "clip_svd(steps_per_shot=5)", "flyp(lr=0.0001,epochs=20)",
         "lp_ft(lr=0.0001,epochs=20)", "wise_ft(lr=0.0001,epochs=20)", "m2_mix(lr=0.0001,epochs=20)")  # fmt: skip
FEW_SHOT = ("oxford_pets", "traffic_lights", "textiles", "pacs")
BASE_TO_NEW = ("pacs", "cifar10", "fashion_mnist", "caltech101")
PARTS = {"few-shot": (FEW_SHOT, 4, (*PROMPTS, *TUNED)), "base-to-new": (BASE_TO_NEW, 8, (*PROMPTS, *TUNED[:2]))}
EVERY, CALTECH = 10, "caltech101_every_10th"  # class takes part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=WORK.with_name("learned"), help="features and runs")
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--protocols", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--most", type=int, default=100, help="test images")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further set after so long")
    options = parser.parse_args()
    found = sets(options.data, options.packages, [*dict.fromkeys(FEW_SHOT + BASE_TO_NEW)])
    if "caltech101" in found:
        found["caltech101"] = found["caltech101"].only(np.flatnonzero(found["caltech101"].y % EVERY == 0), CALTECH)
    began = time.monotonic()
    for seed in options.seeds:
        for protocol in options.protocols:
            names, shots, methods = PARTS[protocol]
            for name in names:
                if name not in found or time.monotonic() - began > 60 * options.minutes:
                    continue
                done = bench(
                    {found[name].name: found[name]}, out=options.work, shots=[shots], protocol=[protocol], seeds=[seed],
                    methods=[*HEADS, *(options.methods or methods)], test_images=options.most,
                )  # fmt: skip
                print(f"{time.monotonic() - began:6.0f} s  seed {seed}, {protocol}, {name}: {done.ran} runs, "
                      f"{done.skipped} done before, {done.failed} failed", flush=True)  # fmt: skip
    runs = read_runs(options.work / "runs")
    digest = hashlib.sha256(" ".join(sorted({run.facts["data"] for run in runs})).encode()).hexdigest()
    print(record("learned", numbers(runs, failures(options.work / "runs")), options.seeds[0], digest))


if __name__ == "__main__":
    main()
