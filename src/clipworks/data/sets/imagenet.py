"""ImageNet-1k (Russakovsky et al. 2015). As CoOp does, the validation images are the test.

Layout: train/n01440764/n01440764_10026.JPEG ..., val/n01440764/ILSVRC2012_val_00000293.JPEG ... (both may lie in
images/, and either may be absent), and the names: classnames.txt ("n01440764 tench" a line) or LOC_synset_mapping.txt.
From: https://www.image-net.org (research); classnames.txt: https://github.com/KaiyangZhou/CoOp
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet, Row, file_item
from ._read import class_folders, distinct, find, found, lines

TEMPLATE = "a photo of a {}."


def read(folder: Path) -> LabelledSet:
    pairs = [line.split(" ", 1) for line in lines(find(folder, "classnames.txt", "LOC_synset_mapping.txt"))]
    numbers = [number for number, _ in pairs]
    classes = distinct([name.split(",")[0].strip() for _, name in pairs])
    word = dict(zip(numbers, classes, strict=True))
    find(folder, "val", "train", "images/val", "images/train")
    rows = []
    for part, name in (("train", "train"), ("test", "val")):
        root = found(folder, name, f"images/{name}")
        rows += [Row(file_item(folder, path), word[number], part)
                 for number, path in (class_folders(root) if root else []) if number in word]  # fmt: skip
    return LabelledSet.of("imagenet", rows, classes, TEMPLATE)
