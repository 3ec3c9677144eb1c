"""Which drawing points best: the name of a thing, the boxes and masks of all things in its photo, `clipworks-small`.

    python benchmarks/referring.py                  # all photos of coco-mini that have masks: half an hour on one core
    python benchmarks/referring.py --photos 40

A question is the name of a thing that is in its photo once; the candidates are all things of the photo, with the boxes
and outlines that people drew (no detector, no SAM). Right is the thing of that name. The bank of negative expressions
are captions of other photos, the same 100 for all. No setting was chosen on these photos; the blur is as wide, for the
size of the photos, as the paper's 100 pixels are for photos of 640.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import clipworks
from clipworks.segment.fgvp import candidates, prompted_vectors, referring_scores
from clipworks.segment.visual_prompts import Style
from common import record

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DRAWINGS = {"crop": ["crop"], "red circle": ["circle-line"], "red box": ["box-line"],
         "green box": ["box-colour"], "keypoint": ["keypoint"], "blurred outside the box": ["box-blur"],
         "outline": ["mask-line"], "grey outside the mask": ["mask-grey"], "blurred outside the mask": ["mask-blur"],
         "crop and blurred box (ReCLIP)": ["crop", "box-blur"],
         "crop and blurred mask (FGVP)": ["crop", "mask-blur"],
         "outline, grey and blurred mask (FGVP)": ["mask-line", "mask-grey", "mask-blur"]}  # fmt: skip
SMALLEST = 1024  # pixels of a candidate: 32 x 32, below which COCO calls a thing small
BANK = 100
SIGMA = 100 / 640  # of the longer side
SEED = 0


def photos(folder: Path, count: int) -> list[dict[str, Any]]:
    """Entries with two large enough things or more, one of them alone of its name."""
    found = []
    for entry in json.loads((folder / "coco_mini.json").read_text(encoding="utf-8")):
        things = [t for t in entry.get("instances") or () if t["segmentation"] and t["area"] >= SMALLEST]
        names = [t["category"] for t in things]
        once = [n for n, name in enumerate(names) if names.count(name) == 1]
        if len(things) > 1 and once:
            found.append({"file": folder / entry["file"], "width": entry["w"], "things": things, "names": names,
                          "once": once})  # fmt: skip
    return found[:count]


def masks(things: list[dict[str, Any]], size: tuple[int, int], factor: float) -> np.ndarray:
    """Polygons, shrunk as the photo is, as bool (N, H, W)."""
    made = []
    for thing in things:
        page = Image.new("1", size)
        for polygon in thing["segmentation"]:
            ImageDraw.Draw(page).polygon([factor * v for v in polygon], fill=1)
        made.append(np.array(page))
    return np.array(made)


def questions(encoder: Any, entries: list[dict[str, Any]], bank: np.ndarray) -> dict[str, list[bool]]:
    """Right or wrong, for every drawing with and without the bank."""
    names = sorted({name for entry in entries for name in entry["names"]})
    told = dict(zip(names, encoder.texts([f"a photo of {name}" for name in names]).numpy(), strict=True))
    kinds = sorted({prompt for prompts in DRAWINGS.values() for prompt in prompts})
    answers: dict[str, list[bool]] = {}
    for number, entry in enumerate(entries):
        pixels = np.array(Image.open(entry["file"]).convert("RGB"))
        size = pixels.shape[:2]
        factor = size[1] / entry["width"]
        boxes = factor * np.array([(x, y, x + w, y + h) for x, y, w, h in (t["bbox"] for t in entry["things"])])
        places, regions = candidates(size, boxes, masks(entry["things"], size[::-1], factor))
        style = Style(sigma=SIGMA * max(size))
        seen = {kind: prompted_vectors(pixels, encoder, places, kind, masks=regions, style=style) for kind in kinds}
        for n in entry["once"]:
            text = np.concatenate([told[entry["names"][n]][None], bank]).T
            for drawing, prompts in DRAWINGS.items():
                plain = sum(seen[kind] @ text[:, 0] for kind in prompts)
                less = sum(referring_scores(seen[kind] @ text) for kind in prompts)
                answers.setdefault(drawing, []).append(int(plain.argmax()) == n)
                answers.setdefault(f"{drawing}, bank", []).append(int(less.argmax()) == n)
            answers.setdefault("chance", []).append(1 / len(boxes))
            sizes = [t["area"] for t in entry["things"]]
            answers.setdefault("the largest", []).append(int(np.argmax(sizes)) == n)
        if number % 20 == 19:
            print(number + 1, "photos", flush=True)
    return answers


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=SHARED, help="folder that holds coco-mini")
    options.add_argument("--photos", type=int, default=1000, help="at most so many")
    given = options.parse_args()
    folder = given.data / "coco-mini"
    encoder = clipworks.load()
    entries = photos(folder, given.photos)
    captions = [e["captions"][0] for e in json.loads((folder / "coco_mini.json").read_text(encoding="utf-8"))
                if e.get("captions") and not e.get("instances")]  # fmt: skip
    answers = questions(encoder, entries, encoder.texts(captions[:BANK]).numpy())
    draws = np.random.default_rng(SEED).integers(0, len(answers["crop"]), (2000, len(answers["crop"])))
    against = {name: np.array(answers[name], float) for name in ("crop", "crop and blurred box (ReCLIP)")}
    accuracy: dict[str, Any] = {}
    for name, right in answers.items():
        accuracy[name] = {"accuracy": round(100 * float(np.mean(right)), 2)}
        for other, base in against.items():
            gain = 100 * (np.array(right, float) - base)[draws].mean(1)
            accuracy[name][f"over {other}, 95 %"] = [round(float(v), 2) for v in np.percentile(gain, [2.5, 97.5])]
        print(f"{name:45}", *accuracy[name].values(), flush=True)
    path = record("referring", {"encoder": encoder.fingerprint, "photos": len(entries), "questions": len(draws[0]),
                                "accuracy": accuracy}, SEED)  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
