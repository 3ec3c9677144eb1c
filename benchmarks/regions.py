"""Region losses on real boxes: naming the boxes of photos that training did not see, before and after a light tuning.

    python benchmarks/regions.py [--seeds 3] [--steps 10]

The 159 photos of coco-mini with instances are split in half by image, anew per seed. The bundled encoder is tuned for a
few steps on one half (stem and words stay) by each recipe; on 24 of the other half the true boxes are named among all
names, cut out ("crop"), pooled from the dense map that the recipe trains ("map"), or by the trained prompter. The image
level is recall@1 of the photos among their own first captions. So few photos and steps show whether a loss moves what
it should, and what it costs; they reproduce no published number.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipworks import load
from clipworks.data.item import Item
from clipworks.data.regions import from_pixels, regions_of
from clipworks.pretraining.cloc import Prompter
from clipworks.segment.clearclip import ClearCLIP
from clipworks.segment.regions import region_rows
from clipworks.training.feed import data_digest
from clipworks.training.loop import train
from clipworks.zeroshot.classifier import class_vectors
from common import record

SHARED = Path(__file__).parents[2] / "shared" / "data"
LARGEST = 4  # boxes of an image that are tested, the largest first
TESTED = 24  # photos of the test half that are looked at
TEMPLATES = "a photo of a {}."
RULES = {"farslip_patches": "qq+kk+vv"}  # whose map is read with another attention than the query-query one
RECIPES: dict[str, str | None] = {
    "start": None,  # the encoder as it is
    "captions": None,  # the contrast of photos and captions alone
    "cloc": "cloc(regions=4)",
    "farslip_patches": "farslip(distillation=1.0, crops=1)",
    "farslip_objects": "farslip(distillation=0.0, categories=1.0, template='a photo of a {}.', regions=2)",
    "declip": "declip(side=224, most=3, splits=3)",
}


KEPT: dict[bytes, torch.Tensor] = {}  # hash of an image's pixels -> what the stem, which stays, makes of it


class KeptStem(torch.nn.Module):
    """The frozen stem, run once per image: it is nearly all of this encoder's arithmetic."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner, self.ends = inner, inner.ends

    def maps(self, pixels: torch.Tensor, sides: Any) -> Any:
        return self.inner.maps(pixels, sides)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        keys = [hashlib.sha256(image.numpy().tobytes()).digest() for image in pixels]
        if new := [i for i, key in enumerate(keys) if key not in KEPT]:
            with torch.no_grad():
                KEPT.update(zip((keys[i] for i in new), self.inner(pixels[new]).clone(), strict=True))
        return torch.stack([KEPT[key] for key in keys])


def photos(folder: Path) -> list[Item]:
    """Photos with a caption and their instances as regions."""
    found = []
    for entry in json.loads((folder / "coco_mini.json").read_text(encoding="utf-8")):
        regions = []
        for thing in sorted(entry["instances"] or [], key=lambda t: -t["area"]):
            left, top, wide, tall = thing["bbox"]
            (box,) = from_pixels([(left, top, left + wide, top + tall)], entry["w"], entry["h"])
            if box[0] < box[2] and box[1] < box[3]:
                regions.append({"box": list(box), "text": thing["category"]})
        if regions and entry["captions"]:
            found.append(Item(str(entry["id"]), folder / entry["file"], caption=entry["captions"][0],
                              columns={"regions": regions}))  # fmt: skip
    return found


def judge(encoder: Any, items: list[Item], names: list[str], readers: dict[str, Any]) -> dict[str, float]:
    """Percent of the boxes that are named rightly by each reader, and of the photos whose caption is found."""
    words = class_vectors(names, encoder, templates=TEMPLATES)
    found = {}
    for name, reader in readers.items():
        right = []
        for item in items:
            regions = regions_of(item)[:LARGEST]
            rows = region_rows(item.image, [r.box for r in regions], encoder, reader=reader, side=encoder.image_size)
            best = (rows @ words.T).argmax(1).tolist()
            right += [names[k] == r.text for k, r in zip(best, regions, strict=True)]
        found[name] = 100 * float(np.mean(right))
    rows = encoder.images([item.image for item in items])
    texts = encoder.texts([item.caption or "" for item in items])
    found["recall1"] = 100 * float(((rows @ texts.T).argmax(1) == torch.arange(len(items))).float().mean())
    return found


def one(name: str, items: list[Item], names: list[str], seed: int, steps: int) -> dict[str, float]:
    """Tune with one recipe and judge."""
    order = np.random.default_rng(seed).permutation(len(items))
    train_items, test = ([items[i] for i in part] for part in np.array_split(order, 2))
    test, encoder, recipe = test[:TESTED], load(), RECIPES[name]
    encoder.visual.stem = KeptStem(encoder.visual.stem)
    readers: dict[str, Any] = {"crop": "crop", "map": ClearCLIP(RULES.get(name, "qq"))}
    if name == "start":
        readers["map_three"] = ClearCLIP("qq+kk+vv")
    else:
        report = train(
            train_items, encoder, out=None, recipe=recipe, steps=steps, batch_size=8, lr=3e-5, weight_decay=0.1,
            warmup=2, clip=1.0, augment="none", freeze=["visual.stem.*", "text.*", "log_scale"], seed=seed,
            device="cpu", workers=1, progress=False,
        )  # fmt: skip
        encoder = report.encoder
        if name == "cloc":
            prompter = Prompter(encoder.config.vision.width, encoder.dim)
            prompter.load_state_dict({n.removeprefix("prompter."): v for n, v in report.parts.items()})
            readers["prompter"] = prompter.eval()
    return judge(encoder, test, names, readers)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=SHARED, help="folder that holds coco-mini")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    given = options.parse_args()
    torch.set_num_threads(1)
    items = photos(given.data / "coco-mini")
    names = sorted({r.text for item in items for r in regions_of(item)})
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(given.seeds):
        for name in given.only:  # every seed in full before the next, so that what is recorded compares
            began = time.perf_counter()
            runs.setdefault(name, []).append(one(name, items, names, seed, given.steps))
            shown = {k: round(v, 1) for k, v in runs[name][-1].items()}
            print(seed, name, shown, f"{time.perf_counter() - began:.0f} s", flush=True)
        results = {
            "photos": len(items), "names": len(names), "steps": given.steps, "seeds": seed + 1,
            "mean": {n: {k: statistics.fmean(r[k] for r in rows) for k in rows[0]} for n, rows in runs.items()},
            "runs": runs,
        }  # fmt: skip
        KEPT.clear()
        record("regions", results, 0, data_digest(items))


if __name__ == "__main__":
    main()
