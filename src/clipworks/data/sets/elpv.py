"""ELPV: 2,624 solar cells by electroluminescence, with a probability of a defect (Buerhop-Lutz et al. 2018).

Layout: labels.csv ("images/cell0001.png 1.0 mono" a line) and images/, both in the folder or in its data/ (the PyPI
package elpv-dataset, unzipped). Probabilities 0 and 1 are the classes; the doubtful cells between are left out. It is
not split.
From: pip download --no-deps elpv-dataset, or https://github.com/zae-bayern/elpv-dataset (CC BY-NC-SA 4.0)
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet, Row
from ._read import find, lines, listed

NAMES = {0.0: "solar cell without defects", 1.0: "defective solar cell with cracks"}


def read(folder: Path) -> LabelledSet:
    path = find(folder, "labels.csv", "data/labels.csv", "elpv_dataset/data/labels.csv")
    known = [line.split() for line in lines(path)]
    sure = [(name, NAMES[float(value)]) for name, value, *_ in known if float(value) in NAMES]
    items = listed(path.parent, (name for name, _ in sure))
    return LabelledSet.of("elpv", [Row(item, label) for item, (_, label) in zip(items, sure, strict=True)],
                          list(NAMES.values()), "a photo of a {}.")  # fmt: skip
