"""Sets with good and defective parts, and what one seed draws from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 112  # maps are compared with masks at this size
TRAIN, TEST, LABELLED = 30, 20, 10
# good images, defective ones, and the mask of a defective one
Found = tuple[list[Path], list[Path], "Callable[[Path], Image.Image] | None"]


def boards(root: Path) -> Found:
    """DeepPCB: 300 templates and 300 boards with defects, boxes in units of half a pixel."""

    def mask(path: Path) -> Image.Image:
        found = np.zeros((320, 320), np.uint8)
        for line in Path(str(path).replace("_test.jpg", ".txt")).read_text().splitlines():
            x0, y0, x1, y1 = (round(int(v) / 2) for v in line.split()[:4])
            found[y0:y1, x0:x1] = 255
        return Image.fromarray(found)

    return sorted(root.glob("*_temp.jpg")), sorted(root.glob("*_test.jpg")), mask


def tiles(root: Path) -> Found:
    """Magnetic tiles with pixel masks of five kinds of defect."""
    good = sorted((root / "train/good").iterdir()) + sorted((root / "test/good").iterdir())
    bad = [f for kind in sorted((root / "test").iterdir()) if kind.name != "good" for f in sorted(kind.iterdir())]
    return good, bad, lambda f: Image.open(root / "ground_truth" / f.parent.name / f"{f.stem}_mask.png").convert("L")


def cells(root: Path) -> Found:
    """Solar cells in electroluminescence; good: probability of a defect 0, defective: 1."""
    data = root / "elpv_dataset/data"
    rows = [line.split() for line in (data / "labels.csv").read_text().splitlines()]
    chosen = {p: [data / name for name, value, *_ in rows if float(value) == p] for p in (0.0, 1.0)}
    return chosen[0.0], chosen[1.0], None


def textiles(root: Path) -> Found:
    """Simulated textures: nominal, and with a local or global defect."""
    files = sorted((root / "conformal_clip_data/data/textile_images").rglob("*.[jp][pn]g"))
    good = [f for f in files if "nominal" in f.parent.name.lower()]
    return good, sorted(set(files) - set(good)), None


# what a set shows in words, AnoVL's domain, how it is read
SETS: dict[str, tuple[str, str, Callable[[Path], Found]]] = {
    "circuit boards": ("printed circuit board", "industrial", boards),
    "magnetic tiles": ("magnetic tile surface", "textural", tiles),
    "solar cells": ("solar cell", "industrial", cells),
    "textiles": ("woven textile", "textural", textiles),
}
MASKED = ("circuit boards", "magnetic tiles")


class Draw:
    """The images of a set that one seed draws, and their truth."""

    def __init__(self, title: str, root: Path, seed: int):
        good, bad, self.mask_of = SETS[title][2](root)
        rng = np.random.default_rng(seed)
        good = [good[i] for i in rng.permutation(len(good))[: TRAIN + TEST]]
        bad = [bad[i] for i in rng.permutation(len(bad))[: TEST + LABELLED]]
        self.train, self.test, self.labelled = good[:TRAIN], good[TRAIN:] + bad[:TEST], bad[TEST:]
        self.bad, self.labels = bad[:TEST], np.arange(len(good) - TRAIN + TEST) >= len(good) - TRAIN
        empty = np.zeros((SIDE, SIDE), bool)
        self.masks = None if self.mask_of is None else np.array(
            [np.asarray(self.mask_of(f).resize((SIDE, SIDE), 0)) > 127 if label else empty
             for f, label in zip(self.test, self.labels, strict=True)])  # fmt: skip
