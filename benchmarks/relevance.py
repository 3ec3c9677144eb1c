"""Which explanation of an image-text pair can be trusted: deletion and insertion on real photos, `clipworks-small`.

    python benchmarks/relevance.py --minutes 10             # 100 photos; the same command goes on where it was stopped
    python benchmarks/relevance.py --pets 4 --coco 4

Half are pets with their kind as text ("a photo of a cat"), half are COCO photos with their first caption. Three
published ways (attention roll-out, gradient-weighted attention, occlusion) and, as what they have to beat, cells in
random order and a map that falls from the centre to the edges, where photographers put things. Deletion takes cells
away in the order of their relevance and is better where it is lower; insertion brings them back, higher is better.
For the pets the share of the 5 % most relevant pixels that are animal, beside what a random pixel would have. No
setting was chosen on these photos. Intervals: 2,000 draws of the photos with replacement.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import clipworks
from clipworks.analysis.explain import METHODS, faithfulness
from clipworks.registry import get_method
from common import record
from segmentation import SHARED, pets, spread

WORK = Path(tempfile.gettempdir()) / "clipworks-benchmarks" / "relevance.jsonl"
CELLS, STEPS, TOP = 8, 8, 0.05
KINDS = {"Abyssinian": "cat", "Bengal": "cat", "american_bulldog": "dog"}
SEED = 0

Pair = tuple[Path, str, "np.ndarray | None"]


def pairs(data: Path, animals: int, photos: int) -> list[Pair]:
    """Photo, text, and where the animal is (1, 0, 255 for its border) if that is known."""
    found: list[Pair] = []
    for path, truth in pets(data / "pets-600", animals):
        found.append((path, f"a photo of a {KINDS[path.stem.rpartition('_')[0]]}", truth))
    entries = json.loads((data / "coco-mini" / "coco_mini.json").read_text(encoding="utf-8"))
    captions = {data / "coco-mini" / e["file"]: e["captions"][0] for e in entries if e["captions"]}
    return found + [(path, captions[path].strip(), None) for path in spread(sorted(captions), photos)]


def maps(encoder: Any, pixels: torch.Tensor, words: torch.Tensor, number: int) -> dict[str, torch.Tensor]:
    """Relevance of one image by every way, on a grid of cells."""
    draw = torch.Generator().manual_seed(SEED + number)
    at = torch.arange(CELLS) - (CELLS - 1) / 2
    found = {"random": torch.rand(CELLS, CELLS, generator=draw), "centre": -(at[:, None] ** 2 + at**2)}
    for name in METHODS:
        heat = get_method(f"analysis/explain_{name}")(encoder, pixels[None], words[None])
        found[name] = F.interpolate(heat[None], (CELLS, CELLS), mode="bilinear", align_corners=False)[0, 0]
    return found


def scores(encoder: Any, pair: Pair, number: int) -> dict[str, Any]:
    """Deletion, insertion and, of pets, the share of the most relevant pixels that are animal."""
    path, text, truth = pair
    pixels, words = encoder.preprocess(path), encoder.texts([text])[0]
    made: dict[str, Any] = {}
    for name, heat in maps(encoder, pixels, words, number).items():
        curves = faithfulness(encoder, pixels, words, heat, steps=STEPS)
        made[name] = {"deletion": curves.deletion, "insertion": curves.insertion}
        if truth is not None:
            seen = np.array(Image.fromarray(truth.astype(np.uint8)).resize((224, 224), Image.Resampling.NEAREST))
            large = F.interpolate(heat[None, None], (224, 224), mode="bilinear", align_corners=False)[0, 0].numpy()
            best = (large >= np.quantile(large, 1 - TOP)) & (seen != 255)
            made[name]["animal"] = float((seen[best] == 1).mean())
            made[name]["by chance"] = float((seen[seen != 255] == 1).mean())
    return made


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, and what each way gains over random order, with intervals."""
    draws = np.random.default_rng(SEED).integers(0, len(found), (2000, len(found)))
    made: dict[str, Any] = {}
    for name in found[0]:
        made[name] = {}
        for measure in ("deletion", "insertion"):
            own, random = (np.array([one[n][measure] for one in found]) for n in (name, "random"))
            made[name][measure] = round(float(own.mean()), 4)
            if name != "random":
                gain = (own - random)[draws].mean(1)
                made[name][f"{measure} over random, 95 %"] = np.percentile(gain, [2.5, 97.5]).round(4).tolist()
        animal = [(one[name]["animal"], one[name]["by chance"]) for one in found if "animal" in one[name]]
        if animal:
            made[name]["animal"], made[name]["by chance"] = np.mean(animal, axis=0).round(4).tolist()
    return made


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=SHARED, help="folder that holds coco-mini and pets-600")
    options.add_argument("--pets", type=int, default=50)
    options.add_argument("--coco", type=int, default=50)
    options.add_argument("--minutes", type=float, default=1e9, help="stop after so long; the same command goes on")
    given = options.parse_args()
    torch.set_num_threads(1)
    stop = time.monotonic() + 60 * given.minutes
    encoder = clipworks.load()
    todo = pairs(given.data, given.pets, given.coco)
    WORK.parent.mkdir(parents=True, exist_ok=True)
    lines = WORK.read_text(encoding="utf-8").splitlines() if WORK.exists() else []
    known = {line["key"]: line["scores"] for line in map(json.loads, lines)}
    digest = hashlib.sha256()
    found = []
    for number, pair in enumerate(todo):
        digest.update(f"{pair[0].name} {pair[1]}".encode())
        key = f"{encoder.fingerprint[:12]} {STEPS} {number} {pair[0].name} {pair[1]}"
        if key not in known:
            if time.monotonic() > stop:
                raise SystemExit(f"stopped at photo {number} of {len(todo)}; the same command goes on")
            known[key] = scores(encoder, pair, number)
            with WORK.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "scores": known[key]}) + "\n")
        found.append(known[key])
    results: dict[str, Any] = {"encoder": encoder.fingerprint, "photos": len(found), "cells": CELLS, "steps": STEPS}
    results["all"] = summary(found)
    results |= {"pets": summary(found[: given.pets]), "captions": summary(found[given.pets :])}
    for part in ("all", "pets", "captions"):
        for name, row in results[part].items():
            print(f"{part:10s} {name:20s} {row}")
    if len(found) >= 100:
        print(record("relevance", results, SEED, digest.hexdigest()))


if __name__ == "__main__":
    main()
