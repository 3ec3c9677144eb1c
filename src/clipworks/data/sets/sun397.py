"""SUN397: 397 kinds of scenes (Xiao et al. 2010).

Layout: SUN397/a/abbey/sun_aaalbzqrimafwbiv.jpg ...; for the split, split_zhou_SUN397.json (CoOp's) or Training_01.txt
and Testing_01.txt ("/a/abbey/sun_aaalbzqrimafwbiv.jpg" a line) in the folder or in Partitions/.
From: https://vision.princeton.edu/projects/2010/SUN/; split: https://github.com/KaiyangZhou/CoOp
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet, Row, in_words
from ._read import coop, find, lines, listed

TEMPLATE = "a photo of a {}."


def read(folder: Path) -> LabelledSet:
    images = find(folder, "SUN397")
    split = coop("sun397", folder, images, TEMPLATE)
    if split is not None:
        return split
    rows = []
    for part, word in (("train", "Training"), ("test", "Testing")):
        names = lines(find(folder, f"{word}_01.txt", f"Partitions/{word}_01.txt"))
        items = listed(images, (name.lstrip("/") for name in names))
        rows += [Row(item, scene(name), part) for item, name in zip(items, names, strict=True)]
    return LabelledSet.of("sun397", rows, templates=TEMPLATE)


def scene(path: str) -> str:
    """ "/a/apartment_building/outdoor/sun_x.jpg" shows an "outdoor apartment building"."""
    return in_words(" ".join(reversed(path.lstrip("/").split("/")[1:-1])))
