"""Defects on real parts: circuit boards, magnetic tiles, solar cells, textiles; patch memory and WinCLIP.

    python benchmarks/anomaly.py --elpv DIR --textile DIR --sheet heat.png

DIR are the unpacked wheels of `elpv-dataset` 1.0.0.post1 and `conformal-clip-data` 0.1.4 (`pip download --no-deps`);
the boards (DeepPCB) and tiles lie in `--data`. Detectors see `--train` good images and are judged on `--test` good ones
and as many defective ones, drawn by `--seed`. Boards: templates are the good ones, boxes the masks. The false alarms of
the threshold are counted beside the AUROC, as they are what a user gets without labels.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import clipworks
from clipworks.anomaly.patch_memory import PatchMemory
from clipworks.anomaly.result import AnomalyMap
from clipworks.anomaly.winclip import WinCLIP
from clipworks.metrics.anomaly import aupro, pixel_auroc, pixel_f1_max
from clipworks.metrics.detection import aupr, auroc, f1_max
from clipworks.plot.sheet import Section, Tile, contact_sheet, save_sheet
from common import record

SIDE = 112  # maps are compared with masks at this size
SHOTS = 4

Masks = Callable[[Path], "Image.Image | None"] | None


def boards(root: Path) -> tuple[list[Path], list[Path], Masks]:
    """DeepPCB: 300 templates and 300 boards with defects, boxes in units of half a pixel."""
    bad = sorted(root.glob("*_test.jpg"))

    def mask(path: Path) -> Image.Image:
        found = np.zeros((320, 320), np.uint8)
        for line in Path(str(path).replace("_test.jpg", ".txt")).read_text().splitlines():
            x0, y0, x1, y1 = (round(int(v) / 2) for v in line.split()[:4])
            found[y0:y1, x0:x1] = 255
        return Image.fromarray(found)

    return sorted(root.glob("*_temp.jpg")), bad, mask


def tiles(root: Path) -> tuple[list[Path], list[Path], Masks]:
    """Magnetic tiles with pixel masks of five kinds of defect."""
    good = sorted((root / "train/good").iterdir()) + sorted((root / "test/good").iterdir())
    bad = [f for kind in sorted((root / "test").iterdir()) if kind.name != "good" for f in sorted(kind.iterdir())]
    return good, bad, lambda f: Image.open(root / "ground_truth" / f.parent.name / f"{f.stem}_mask.png").convert("L")


def cells(root: Path) -> tuple[list[Path], list[Path], Masks]:
    """Solar cells in electroluminescence; good: probability of a defect 0, defective: 1."""
    data = root / "elpv_dataset/data"
    rows = [line.split() for line in (data / "labels.csv").read_text().splitlines()]
    chosen = {p: [data / name for name, value, *_ in rows if float(value) == p] for p in (0.0, 1.0)}
    return chosen[0.0], chosen[1.0], None


def textiles(root: Path) -> tuple[list[Path], list[Path], Masks]:
    """Simulated textures: nominal, and with a local or global defect."""
    files = sorted((root / "conformal_clip_data/data/textile_images").rglob("*.[jp][pn]g"))
    good = [f for f in files if "nominal" in f.name.lower() or "nominal" in f.parent.name.lower()]
    return good, sorted(set(files) - set(good)), None


SETS = {"circuit boards": ("printed circuit board", boards), "magnetic tiles": ("magnetic tile surface", tiles),
        "solar cells": ("solar cell", cells), "textiles": ("woven textile", textiles)}  # fmt: skip


def detectors(encoder: Any, name: str) -> dict[str, Any]:
    """What is compared; "shots" is how many good images each is given (None: all)."""
    return {
        "patch memory": (PatchMemory(encoder), None),
        f"patch memory, {2 * encoder.image_size} px": (PatchMemory(encoder, image_size=2 * encoder.image_size), None),
        f"patch memory, {SHOTS} good images": (PatchMemory(encoder), SHOTS),
        "WinCLIP zero-shot": (WinCLIP(encoder, name=name), 0),
        f"WinCLIP, {SHOTS} good images": (WinCLIP(encoder, name=name), SHOTS),
    }


def measure(maps: list[AnomalyMap], labels: np.ndarray, masks: list[Image.Image | None]) -> dict[str, float]:
    """Image metrics, pixel metrics where there are masks, and what the threshold set without labels does."""
    scores = np.array([m.score for m in maps])
    flagged = np.array([m.defective for m in maps])
    found = {"found": float(flagged[labels].mean())}
    if not labels.all():
        found |= {"image AUROC": auroc(scores, labels), "image AUPR": aupr(scores, labels),
                  "image F1-max": f1_max(scores, labels)[0],
                  "false alarms": float(flagged[~labels].mean())}  # fmt: skip
    if any(m is not None for m in masks):
        heats = [np.asarray(Image.fromarray(m.heat).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for m in maps]
        truth = [
            np.zeros((SIDE, SIDE), bool) if m is None else np.asarray(m.resize((SIDE, SIDE), 0)) > 127 for m in masks
        ]
        found |= {"pixel AUROC": pixel_auroc(heats, truth), "pixel F1-max": pixel_f1_max(heats, truth)[0],
                  "AUPRO": aupro(heats, truth)}  # fmt: skip
    return {key: round(value, 4) for key, value in found.items()}


def paired(detector: Any, bad: list[Path], masks: list[Image.Image | None]) -> dict[str, float]:
    """Pixel metrics where every board is compared with its own template alone."""
    maps = [detector.fit([str(f).replace("_test", "_temp")]).score_map(str(f)) for f in bad]
    return {k: v for k, v in measure(maps, np.ones(len(bad), bool), masks[-len(bad) :]).items() if k[:5] != "image"}


def run(args: argparse.Namespace) -> None:
    encoder = clipworks.load(args.model)
    roots = {"circuit boards": args.data / "deeppcb-300", "magnetic tiles": args.data / "magnetic-tile",
             "solar cells": args.elpv, "textiles": args.textile}  # fmt: skip
    results, sections, digest = {}, [], hashlib.sha256()
    for title, (name, read) in SETS.items():
        root = roots[title]
        if root is None or not root.exists():
            print(f"{title}: left out, no folder {root}")
            continue
        good, bad, mask_of = read(root)
        draw = np.random.default_rng(args.seed)
        good = [good[i] for i in draw.permutation(len(good))[: args.train + args.test]]
        bad = [bad[i] for i in draw.permutation(len(bad))[: args.test]]
        train, test = good[: args.train], good[args.train :] + bad
        for file in train + test:
            digest.update(file.read_bytes())
        labels = np.arange(len(test)) >= len(test) - len(bad)
        masks = [mask_of(f) if mask_of and label else None for f, label in zip(test, labels, strict=True)]
        results[title] = {"good to learn from": len(train), "good": int((~labels).sum()), "defective": len(bad)}
        for label, (detector, shots) in detectors(encoder, name).items():
            started = time.perf_counter()
            detector.fit(None if shots == 0 else train[:shots])
            maps = list(detector.score_maps(test))
            results[title][label] = measure(maps, labels, masks)
            results[title][label]["seconds"] = round(time.perf_counter() - started, 1)
            print(title, label, results[title][label], flush=True)
            if label.endswith("px") and title == "circuit boards":
                results[title]["patch memory, the board's own template"] = paired(detector, bad, masks)
                print(results[title]["patch memory, the board's own template"], flush=True)
            if label == f"patch memory, {2 * encoder.image_size} px":
                chosen = [*range(int((~labels).sum()))[:3], *np.flatnonzero(labels)[:7]]
                tiles = [Tile(maps[i].draw(), "defective" if labels[i] else "good", f"{maps[i].score:.2f}",
                              f"threshold {maps[i].threshold:.2f}") for i in chosen]  # fmt: skip
                sections.append(Section(title, label, tiles))
    settings = {"model": encoder.config.name, "fingerprint": encoder.fingerprint, "maps": SIDE}
    print(record("anomaly", {"settings": settings, **results}, args.seed, digest.hexdigest()))
    if args.sheet:
        print(
            save_sheet(
                contact_sheet(sections, title="Heat maps", note="boxes: regions above the threshold"), args.sheet
            )
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--elpv", type=Path)
    parser.add_argument("--textile", type=Path)
    parser.add_argument("--model", default="clipworks-small")
    parser.add_argument("--train", type=int, default=40)
    parser.add_argument("--test", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path)
    run(parser.parse_args())
