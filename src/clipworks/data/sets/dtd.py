"""Describable Textures: 47 textures (Cimpoi et al. 2014).

Layout: images/banded/banded_0002.jpg ...; for the split, split_zhou_DescribableTextures.json (CoOp's) or
labels/train1.txt, labels/val1.txt and labels/test1.txt ("banded/banded_0002.jpg" a line; the first of the set's own
ten). Without either it is not split.
From: https://www.robots.ox.ac.uk/~vgg/data/dtd/ (research); split: https://github.com/KaiyangZhou/CoOp
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet, Row, in_words
from ._read import coop, find, found, lines, listed, per_class

TEMPLATE = "{} texture."


def read(folder: Path) -> LabelledSet:
    images = find(folder, "images")
    split = coop("dtd", folder, images, TEMPLATE)
    if split is not None:
        return split
    if not found(folder, "labels/train1.txt"):
        return per_class("dtd", images, templates=TEMPLATE)
    rows = []
    for part, word in (("train", "train"), ("validation", "val"), ("test", "test")):
        names = lines(find(folder, f"labels/{word}1.txt"))
        rows += [Row(item, in_words(name.split("/")[0]), part) for item, name in
                 zip(listed(images, names), names, strict=True)]  # fmt: skip
    return LabelledSet.of("dtd", rows, templates=TEMPLATE)
