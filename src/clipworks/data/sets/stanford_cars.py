"""Stanford Cars: 196 models of cars (Krause et al. 2013).

Layout: cars_train/00001.jpg ..., cars_test/00001.jpg ...; for labels, split_zhou_StanfordCars.json (CoOp's) or
devkit/cars_meta.mat, devkit/cars_train_annos.mat and cars_test_annos_withlabels.mat (the set's own).
From: https://www.kaggle.com/datasets/eduardo4jesus/stanford-cars-dataset (the first home is gone); split:
https://github.com/KaiyangZhou/CoOp
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..labelled import LabelledSet, Row
from ._read import coop, distinct, find, listed, matlab

TEMPLATE = "a photo of a {}."


def read(folder: Path) -> LabelledSet:
    find(folder, "cars_train")
    split = coop("stanford_cars", folder, folder, TEMPLATE)
    if split is not None:
        return split
    names = np.atleast_1d(matlab(find(folder, "devkit/cars_meta.mat"))["class_names"])
    classes = distinct([year_first(str(name)) for name in names])
    rows = []
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        table = np.atleast_1d(matlab(find(folder, file, f"devkit/{Path(file).name}"))["annotations"])
        items = listed(folder, (f"cars_{part}/{row['fname']}" for row in table))
        rows += [Row(item, classes[int(row["class"]) - 1], part) for item, row in zip(items, table, strict=True)]
    return LabelledSet.of("stanford_cars", rows, classes, TEMPLATE)


def year_first(name: str) -> str:
    """ "Audi TTS Coupe 2012" is "2012 Audi TTS Coupe", as CoOp writes it."""
    head, _, year = name.rpartition(" ")
    return f"{year} {head}" if year.isdigit() else name
