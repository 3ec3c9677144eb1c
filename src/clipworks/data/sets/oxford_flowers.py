"""Oxford Flowers 102 (Nilsback and Zisserman 2008).

Layout: jpg/image_00001.jpg ...; for labels, split_zhou_OxfordFlowers.json (CoOp's) or imagelabels.mat, setid.mat (the
set's own: 1,020 to train, 1,020 to validate, 6,149 to test) with cat_to_name.json (number from 1 -> name).
From: https://www.robots.ox.ac.uk/~vgg/data/flowers/102/; split and names: https://github.com/KaiyangZhou/CoOp
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..labelled import LabelledSet, Row, in_words
from ._read import coop, distinct, find, listed, matlab

TEMPLATE = "a photo of a {}, a type of flower."


def read(folder: Path) -> LabelledSet:
    images = find(folder, "jpg")
    split = coop("oxford_flowers", folder, images, TEMPLATE)
    if split is not None:
        return split
    labels = np.atleast_1d(matlab(find(folder, "imagelabels.mat"))["labels"])
    ids = matlab(find(folder, "setid.mat"))
    names = json.loads(find(folder, "cat_to_name.json").read_text(encoding="utf-8"))
    classes = distinct([in_words(names[str(i + 1)]) for i in range(int(labels.max()))])
    rows = []
    for part, key in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        numbers = np.atleast_1d(ids[key]).astype(int)
        items = listed(images, (f"image_{n:05d}.jpg" for n in numbers))
        rows += [Row(item, classes[labels[n - 1] - 1], part) for item, n in zip(items, numbers, strict=True)]
    return LabelledSet.of("oxford_flowers", rows, classes, TEMPLATE)
