"""Simulated textiles with local, global or no defects, 2,000 images (Megahed et al. 2025).

Layout: nominal/, local/, global/ with textile_0001.jpg ..., in the folder or below it in textile_images/simulated/
(the PyPI package conformal-clip-data, unzipped). It is not split.
From: pip download --no-deps conformal-clip-data (MIT)
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet, Row, file_item
from ._read import class_folders, find

NAMES = {"nominal": "woven textile with no defects", "local": "woven textile with a small local defect",
         "global": "woven textile with a wrong pattern everywhere"}  # fmt: skip


def read(folder: Path) -> LabelledSet:
    root = find(folder, "nominal", "**/simulated/nominal").parent
    rows = [Row(file_item(root, path), NAMES[label]) for label, path in class_folders(root) if label in NAMES]
    return LabelledSet.of("textiles", rows, list(NAMES.values()), "a photo of a {}.")
