"""What training on masks brings: the trained dense methods on photos of cats and dogs, beside methods without training.

    python benchmarks/trained_segmentation.py               # 48 photos to learn from, 24 others to judge: minutes
    python benchmarks/trained_segmentation.py --train 4 --test 2 --steps 20 --only denseclip

The photos to learn from and those that are judged are apart; no setting was chosen on the latter, and what is learned
here is not shipped. Names: cat, dog, background; the border of an animal does not count. Each method stands beside what
its paper compares it with: DenseCLIP without the score map's loss, OVSeg's names for crops without its tokens, MAFT+
with a frozen CLIP that names masks of the same kind.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import clipworks
from clipworks.metrics.segmentation import IGNORE, confusion, mean_iou, pixel_accuracy
from clipworks.segment.background import background_words
from clipworks.segment.denseclip import DenseCLIP
from clipworks.segment.maft_plus import MAFTPlus
from clipworks.segment.ovseg import OVSeg
from clipworks.segment.segmenter import Segmenter
from common import RESULTS, record

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NAMES = ["cat", "dog", "background"]
BREEDS = {"Abyssinian": 0, "Bengal": 0, "american_bulldog": 1}
PARTS = ("free", "denseclip", "ovseg", "maft-plus", "maft-plus-gain")
FREE = ("patch-tokens", "maskclip", "proxyclip")

Photos = list[tuple[Path, np.ndarray]]


def pets(folder: Path, train: int, test: int) -> tuple[Photos, Photos]:
    """Photos with label maps, so many of every breed to learn from and others to judge, evenly spaced."""
    parts: tuple[Photos, Photos] = ([], [])
    for breed, label in BREEDS.items():
        table = np.array([IGNORE, label, len(NAMES) - 1, IGNORE], np.uint8)
        files = sorted((folder / "images").glob(f"{breed}_*.jpg"))
        chosen = np.linspace(0, len(files) - 1, train + test).round().astype(int)
        judged = set(np.linspace(0, train + test - 1, test).round().astype(int).tolist())
        for number, place in enumerate(chosen):
            trimap = np.array(Image.open(folder / "trimaps" / f"{files[place].stem}.png"))
            parts[number in judged].append((files[place], table[trimap]))
    return parts


def judged(
    method: Any, encoder: Any, photos: Photos, side: int, names: Any = NAMES, **options: Any
) -> dict[str, float]:
    """Mean IoU of the three names, IoU of animal against the rest, and accuracy, in percent."""
    work = Segmenter(names, method=method, encoder=encoder, side=side, **options)
    order = np.array([NAMES.index(name) for name in work.names])
    counts = np.zeros((3, 3), np.int64)
    start = time.perf_counter()
    for path, truth in photos:
        counts += confusion(truth, order[work(path).labels], 3)
    seconds = (time.perf_counter() - start) / len(photos)
    fold = np.array([[1, 0], [1, 0], [0, 1]])
    animal = fold.T @ counts @ fold
    return {
        "miou": round(100 * mean_iou(counts), 2), "animal and rest": round(100 * mean_iou(animal), 2),
        "accuracy": round(100 * pixel_accuracy(counts), 2), "seconds per photo": round(seconds, 2),
    }  # fmt: skip


def compare(
    encoder: Any, train: Photos, test: Photos, *, steps: int, side: int, batch_size: int,
    wanted: tuple[str, ...] = PARTS, say: Callable[..., None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Figures of every method, before and after."""
    images, maps = [path for path, _ in train], [labels for _, labels in train]
    how = {"steps": steps, "batch_size": batch_size, "side": side}
    found: dict[str, Any] = {}

    def put(name: str, method: Any, **options: Any) -> None:
        found[name] = judged(method, encoder, test, side, **options)
        say(f"{name:45s} {found[name]}", flush=True)

    def fit(method: Any) -> Any:
        start = time.perf_counter()
        made = method.fit(images, maps, NAMES, progress=False)
        say(f"{type(method).__name__} trained in {time.perf_counter() - start:.0f} s: {made.losses_}", flush=True)
        return made

    if "free" in wanted:
        around = {"cat": ["cat"], "dog": ["dog"], "background": background_words("words", [])}
        for name in FREE:
            put(f"{name}, no training", name, names=around)
    if "denseclip" in wanted:
        for label, auxiliary in (("", 0.4), (", no loss on the score map", 0.0)):
            put(f"denseclip{label}", fit(DenseCLIP(encoder, auxiliary=auxiliary, tower=False, lr=1e-3, **how)))
    if "ovseg" in wanted:
        made = fit(OVSeg(encoder, prompt_steps=max(1, steps // 2), **how))
        put("ovseg", made)
        put("ovseg, the decoder alone", copy.copy(made).set_params(balance=0.0))
        put("ovseg, crops alone", copy.copy(made).set_params(balance=1.0))
        put("ovseg, crops alone, no tokens", copy.copy(made).set_params(balance=1.0, depth=0))
    if "maft-plus-gain" in wanted:
        put("maft-plus, gain from 0", fit(MAFTPlus(encoder, "gain", lr=1e-3, **how)))
    if "maft-plus" in wanted:
        put("maft-plus", fit(MAFTPlus(encoder, "panoptic", lr=1e-3, **how)))  # the transfer as published
        still = MAFTPlus(encoder, "none", quality=0.0, compensation=0.0, lr=1e-3, **how)
        put("maft-plus, frozen CLIP", fit(still))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="clipworks-small")
    options.add_argument("--data", type=Path, default=SHARED / "pets-600")
    options.add_argument("--train", type=int, default=16, help="photos of every breed to learn from")
    options.add_argument("--test", type=int, default=8, help="photos of every breed to judge")
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--side", type=int, default=224, help="shorter side of photos, side of the crops")
    options.add_argument("--only", nargs="*", default=list(PARTS), help="parts to run")
    given = options.parse_args()
    torch.set_num_threads(1)
    train, test = pets(given.data, given.train, given.test)
    how = {"steps": given.steps, "side": given.side, "batch_size": given.batch_size}
    results: dict[str, Any] = {"settings": {"model": given.model, "train": len(train), "test": len(test), **how}}
    found = compare(clipworks.load(given.model), train, test, wanted=tuple(given.only), **how)
    digest = hashlib.sha256()
    for path, labels in [*train, *test]:
        digest.update(path.name.encode() + labels.tobytes())
    place = RESULTS / "trained_segmentation.json"
    known = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {"results": {}}
    same = (known.get("data_digest"), known["results"].get("settings")) == (digest.hexdigest(), results["settings"])
    if same or set(given.only) == set(PARTS):  # a part that is run again joins the rows of the same photos and settings
        results["pets"] = (known["results"]["pets"] if same else {}) | found
        print(record("trained_segmentation", results, 0, digest.hexdigest()))


if __name__ == "__main__":
    main()
