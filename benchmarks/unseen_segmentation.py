"""Names that were never trained: PMP, FrozenSeg and Chimera-Seg on real masks, beside what they stand on.

    python benchmarks/unseen_segmentation.py --minutes 10   # 3 seeds, two sets; the same command goes on
    python benchmarks/unseen_segmentation.py --seeds 1 --sets pets --steps 20

coco: the names that are in ten of the 200 masks of coco-mini or more; every third of them is never trained (its pixels
do not count in training). pets: cats and surroundings are trained, dogs never. Photos to learn from and photos to judge
are apart. All methods see the same photos, as often, at the same rate; they are asked for all names at once. Figures:
mIoU of trained names, of others, their harmonic mean; mean and spread (largest less smallest) over the seeds.

Each method stands beside its own ground: for PMP and FrozenSeg a decoder whose masks a frozen CLIP names (their
injections left out), for Chimera-Seg the tower's patch tokens, and its own body without its class token's lesson.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import clipworks
from clipworks.metrics.segmentation import IGNORE, class_iou, confusion, harmonic_iou
from clipworks.segment.chimera_seg import ChimeraSeg
from clipworks.segment.frozenseg import FrozenSeg
from clipworks.segment.maft_plus import MAFTPlus
from clipworks.segment.patch_tokens import PatchTokens
from clipworks.segment.pmp import PMP
from clipworks.segment.segmenter import Segmenter
from common import record
from segmentation import SHARED, Photos, coco, coco_names
from trained_segmentation import NAMES
from trained_segmentation import pets as pets_parts

WORK = Path(tempfile.gettempdir()) / "clipworks-benchmarks" / "unseen_segmentation"
LEAST, FRESH = 10, 3  # photos that show a name; every third name is never trained
SIDE, BATCH, LR = 224, 4, 1e-3

# what is made with (encoder, seen names, settings)
METHODS: dict[str, Callable[..., Any]] = {
    "patch-tokens, no training": lambda encoder, seen, **how: PatchTokens(),
    "decoder with a frozen CLIP":
        lambda encoder, seen, **how: MAFTPlus(encoder, "none", quality=0.0, compensation=0.0, tower=False, **how),
    "pmp": lambda encoder, seen, **how: PMP(encoder, **how),
    "frozenseg": lambda encoder, seen, **how: FrozenSeg(encoder, **how),
    "chimera-seg": lambda encoder, seen, **how: ChimeraSeg(encoder, seen, **how),
    "chimera-seg, no class token": lambda encoder, seen, **how: ChimeraSeg(encoder, seen, distillation=0.0, **how),
}  # fmt: skip

Set = tuple[list[str], list[str], Photos, Photos]


def coco_set(data: Path) -> Set:
    """Names, those that are trained, photos to learn from (three of five) and photos to judge, labels in the names."""
    photos, every = coco(data / "coco-mini", 200), list(coco_names(data / "coco-mini").values())
    shown = np.array([np.isin(np.arange(len(every)), truth) for _, truth in photos]).sum(0)
    kept = np.flatnonzero(shown >= LEAST)
    table = np.full(256, IGNORE)
    table[kept] = np.arange(len(kept))
    names = [every[i] for i in kept]
    photos = [(path, table[truth].astype(np.uint8)) for path, truth in photos]
    train, test = ([p for i, p in enumerate(photos) if (i % 5 < 3) == learn] for learn in (True, False))
    return names, [name for i, name in enumerate(names) if i % FRESH], train, test


def pets_set(data: Path) -> Set:
    """Cat, dog and background, of which dogs are never trained."""
    train, test = pets_parts(data / "pets-600", 40, 20)
    return NAMES, [name for name in NAMES if name != "dog"], train, test


SETS = {"pets": pets_set, "coco": coco_set}


def without(photos: Photos, names: list[str], seen: list[str]) -> Photos:
    """Photos that show something of the seen names, whose other pixels do not count."""
    table = np.full(256, IGNORE, np.uint8)
    table[[names.index(name) for name in seen]] = np.arange(len(seen))
    made = [(path, table[truth]) for path, truth in photos]
    return [(path, truth) for path, truth in made if (truth != IGNORE).any()]


def judged(method: Any, encoder: Any, chosen: Set) -> dict[str, float]:
    """mIoU in percent of trained names, of others, and their harmonic mean."""
    names, seen, _, test = chosen
    work = Segmenter(names, method=method, encoder=encoder, side=SIDE)
    counts = np.zeros((len(names), len(names)), np.int64)
    for path, truth in test:
        counts += confusion(truth, work(path).labels, len(names))
    values, trained = class_iou(counts), np.isin(names, seen)
    one, two = (100 * float(np.nanmean(values[part])) for part in (trained, ~trained))
    return {"seen": round(one, 2), "unseen": round(two, 2), "harmonic": round(harmonic_iou(one, two), 2)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=SHARED, help="folder that holds coco-mini and pets-600")
    options.add_argument("--sets", nargs="*", choices=list(SETS), default=list(SETS))
    options.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so long")
    given = options.parse_args()
    torch.set_num_threads(1)
    stop, encoder = time.monotonic() + 60 * given.minutes, clipworks.load()
    WORK.mkdir(parents=True, exist_ok=True)
    how = {"steps": given.steps, "batch_size": BATCH, "lr": LR, "side": SIDE}
    results: dict[str, Any] = {"settings": {**how, "seeds": given.seeds, "encoder": encoder.fingerprint}}
    digest = hashlib.sha256()
    for place in given.sets:
        chosen = SETS[place](given.data)
        names, seen, train, test = chosen
        for path, truth in [*train, *test]:
            digest.update(path.name.encode() + truth.tobytes())
        learnt = without(train, names, seen)
        results[place] = {"names": names, "seen": seen, "train": len(learnt), "test": len(test)}
        for name in given.only:
            found = []
            for seed in range(1 if "no training" in name else given.seeds):
                key = hashlib.sha256(repr((encoder.fingerprint, how, digest.hexdigest(), name, seed)).encode())
                file = WORK / f"{key.hexdigest()[:16]}.json"
                if not file.exists():
                    if time.monotonic() > stop:
                        raise SystemExit(f"stopped before {place}, {name}, seed {seed}; the same command goes on")
                    method = METHODS[name](encoder, seen, **how, seed=seed)
                    if hasattr(method, "fit"):
                        method.fit([path for path, _ in learnt], [truth for _, truth in learnt], seen, progress=False)
                    file.write_text(json.dumps(judged(method, encoder, chosen)))
                found.append(json.loads(file.read_text()))
                print(f"{place:6s} {name:30s} seed {seed} {found[-1]}", flush=True)
            each = {measure: np.array([one[measure] for one in found]) for measure in found[0]}
            results[place][name] = {
                m: {"mean": round(float(v.mean()), 2), "spread": round(float(np.ptp(v)), 2)} for m, v in each.items()
            }
    if set(given.only) == set(METHODS) and given.seeds > 2:
        print(record("unseen_segmentation", results, 0, digest.hexdigest()))


if __name__ == "__main__":
    main()
