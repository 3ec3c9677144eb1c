"""One product of an inspection set in MVTec AD's layout, as classes: good, and every kind of defect.

Layout: train/good/000.png ..., test/good/..., test/crack/... (ground_truth/ is not read). It is not split, since the
set's own train/ has no defects.
From: https://www.mvtec.com/company/research/datasets/mvtec-ad, VisA, and others in this form
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet, Row, file_item, in_words
from ._read import class_folders, find


def read(folder: Path) -> LabelledSet:
    find(folder, "train/good")
    rows = [Row(file_item(folder, path), in_words(label)) for part in ("train", "test")
            for label, path in class_folders(find(folder, part))]  # fmt: skip
    return LabelledSet.of("defects", rows, templates="a photo of a surface with {}.")
