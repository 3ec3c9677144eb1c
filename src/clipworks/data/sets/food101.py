"""Food-101: 101 dishes, 1,000 photos each (Bossard et al. 2014).

Layout: images/apple_pie/1005649.jpg ...; for the split, split_zhou_Food101.json (CoOp's) or meta/train.txt and
meta/test.txt ("apple_pie/1005649" a line; the set's own). Without either it is not split.
From: https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/; split: https://github.com/KaiyangZhou/CoOp
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet, Row, in_words
from ._read import coop, find, found, lines, listed, per_class

TEMPLATE = "a photo of {}, a type of food."


def read(folder: Path) -> LabelledSet:
    images = find(folder, "images")
    split = coop("food101", folder, images, TEMPLATE)
    if split is not None:
        return split
    if not found(folder, "meta/train.txt"):
        return per_class("food101", images, templates=TEMPLATE)
    rows = []
    for part in ("train", "test"):
        names = lines(find(folder, f"meta/{part}.txt"))
        items = listed(images, (f"{name}.jpg" for name in names))
        rows += [Row(item, in_words(name.split("/")[0]), part) for item, name in zip(items, names, strict=True)]
    return LabelledSet.of("food101", rows, templates=TEMPLATE)
