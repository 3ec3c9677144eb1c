"""FGVC-Aircraft: 100 variants of aircraft (Maji et al. 2013).

Layout: images/0034309.jpg ...; images_variant_train.txt, images_variant_val.txt, images_variant_test.txt ("0034309
747-400" a line) and variants.txt, all in the folder or in its data/.
From: https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/ (non-commercial research)
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet, Row
from ._read import find, found, lines, listed

TEMPLATE = "a photo of a {}, a type of aircraft."


def read(folder: Path) -> LabelledSet:
    folder = found(folder, "data") or folder
    images, classes = find(folder, "images"), lines(find(folder, "variants.txt"))
    rows = []
    for part, word in (("train", "train"), ("validation", "val"), ("test", "test")):
        pairs = [line.split(" ", 1) for line in lines(find(folder, f"images_variant_{word}.txt"))]
        items = listed(images, (f"{number}.jpg" for number, _ in pairs))
        rows += [Row(item, variant, part) for item, (_, variant) in zip(items, pairs, strict=True)]
    return LabelledSet.of("fgvc_aircraft", rows, classes, TEMPLATE)
