"""Continual learning over three real sets: what each way learns, and what it forgets, with the bundled model.

    python benchmarks/continual.py --data ../shared/data --packages PACKAGES     # goes on where it was stopped

Cats and dogs of three breeds, then traffic lights, then textiles, 20 images of every class to learn and 24 to
measure, drawn anew by every seed. PACKAGES is that of `few_shot.py`. After every task all three are measured by their
class words, and so are photos of 150 classes of ImageNet, which nobody learns. The ways:

    sequential     fine-tuning, one task after the other
    wise_ft        the same, half of every change kept
    lwf            and the similarities to the class sentences of the three tasks are kept, as the model before has them
    vr_lwf         and those to 1000 random sentences are kept, 40 in a step
    rehearsal      sequential, with four stored images of every earlier class learned again

All with one learning rate and as many steps, chosen by nothing. The claim (Ding et al. 2022; Zheng et al. 2023): random
sentences keep what sequential fine-tuning forgets, and more than LwF. The image tower's convolutional stem stays
(`kept.py`).
"""

from __future__ import annotations

import argparse
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import clipworks
from clipworks.encoders.encoder import Encoder
from clipworks.tuning.continual import Task, continual
from clipworks.tuning.vr_lwf import VRLwF
from clipworks.zeroshot.classifier import class_vectors
from common import record
from few_shot import SHARED, sets
from kept import WORK, Pieces, gathered, imagenet_sample, keep, without_stem

TASKS, LEARNED, MEASURED, PROBE = ("oxford_pets", "traffic_lights", "textiles"), 20, 24, 150
WAYS = ("sequential", "vr_lwf", "lwf", "wise_ft", "rehearsal")


def draw(found: dict[str, Any], model: Encoder, seed: int) -> tuple[list[Task], str]:
    """The tasks of a seed, and the keys of their images."""
    tasks, keys = [], []
    for title in TASKS:
        data, rng = found[title], np.random.default_rng(seed)
        mixed = [rng.permutation(np.flatnonzero(data.y == c))[: LEARNED + MEASURED] for c in np.unique(data.y)]
        rows = np.concatenate(mixed)
        learned = np.concatenate([np.arange(len(own)) < LEARNED for own in mixed])
        key = " ".join(data.items[i].key for i in rows)
        maps, y = keep(model, [data.items[i].source() for i in rows], key), data.y[rows]
        tasks.append(Task(title, data.classes, maps[learned], y[learned], maps[~learned], y[~learned]))
        keys.append(key)
    return tasks, " ".join(keys)


def method(way: str, tasks: list[Task], start: Encoder, seed: int, lr: float, steps: int) -> VRLwF:
    """The method of a way."""
    own: dict[str, Any] = {
        "sequential": {"image_weight": 0.0, "text_weight": 0.0},
        "rehearsal": {"image_weight": 0.0, "text_weight": 0.0},
        "wise_ft": {"image_weight": 0.0, "text_weight": 0.0, "alpha": 0.5},
        "lwf": {"sentences": [f"a photo of a {name}." for task in tasks for name in task.names]},
    }.get(way, {})
    return VRLwF(encoder=start, lr=lr, steps=steps, per_step=40, batch_size=20, augment="none", seed=seed, **own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the real data")
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=WORK.with_name("continual"), help="folder of what is finished")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=10, help="of every task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--minutes", type=float, default=1e9, help="then record what is there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, found = clipworks.load(), sets(given.data, given.packages, list(TASKS))
    start = without_stem(model)
    photos, names, target, _ = imagenet_sample(given.data / "imagenet-sample-1000")
    rows = np.random.default_rng(0).permutation(len(photos))[:PROBE]
    probe, told = keep(model, [photos[i] for i in rows], f"imagenet-sample {rows.tolist()}"), target[rows]
    names, answers = [names[i] for i in np.unique(told)], np.unique(told, return_inverse=True)[1]

    def unseen(encoder: Encoder) -> float:
        hit = (encoder.images(probe) @ class_vectors(names, encoder, templates="a photo of a {}.").T).argmax(1)
        return round(100 * float(np.mean(hit.numpy() == answers)), 2)

    def learn(way: str, tasks: list[Task], seed: int) -> dict[str, Any]:
        made = method(way, tasks, start, seed, given.lr, given.steps)
        report = continual(made, tasks, rehearsal=4 * (way == "rehearsal"))
        return {**report.as_dict(), "unseen_after": unseen(report.encoder)}

    settings = {"lr": given.lr, "steps": given.steps, "learned": LEARNED, "measured": MEASURED, "seeds": given.seeds}
    pieces = Pieces(given.work, f"{model.fingerprint} {given.lr} {given.steps}", given.minutes)
    drawn = {seed: draw(found, model, seed) for seed in given.seeds}
    jobs = {f"{way} {seed}": partial(learn, way, drawn[seed][0], seed) for way in WAYS for seed in given.seeds}
    done = pieces.run({"before": lambda: {"accuracy": unseen(start)}, **jobs})
    results: dict[str, Any] = {"settings": {**settings, "encoder": model.fingerprint[:12]}}
    results["unseen_before"] = done["before"]["accuracy"]
    for way in WAYS:
        if there := [seed for seed in given.seeds if f"{way} {seed}" in done]:
            results[way] = {"seeds": there, **gathered([done[f"{way} {seed}"] for seed in there])}
    digest = hashlib.sha256(" ".join(keys for _, keys in drawn.values()).encode()).hexdigest()
    print(record("continual", results, given.seeds[0], digest))


if __name__ == "__main__":
    main()
