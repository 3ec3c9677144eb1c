"""Oxford-IIIT Pet: 37 breeds of cats and dogs (Parkhi et al. 2012).

Layout: images/Abyssinian_1.jpg ... (the name before the number is the breed); for the split, split_zhou_OxfordPets.json
(CoOp's) or annotations/trainval.txt and annotations/test.txt (the set's own). Without either it is not split.
From: https://www.robots.ox.ac.uk/~vgg/data/pets/ (CC BY-SA 4.0); split: https://github.com/KaiyangZhou/CoOp
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet, Row, file_item, in_words
from . import Absent
from ._read import coop, find, found, lines, listed

TEMPLATE = "a photo of a {}, a type of pet."


def read(folder: Path) -> LabelledSet:
    images = find(folder, "images")
    split = coop("oxford_pets", folder, images, TEMPLATE)
    if split is not None:
        return split
    rows = []
    for part, name in (("train", "trainval"), ("test", "test")):
        path = found(folder, f"annotations/{name}.txt")
        stems = [line.split()[0] for line in lines(path) if not line.startswith("#")] if path else []
        items = listed(images, (f"{stem}.jpg" for stem in stems))
        rows += [Row(item, breed(stem), part) for item, stem in zip(items, stems, strict=True)]
    rows = rows or [Row(file_item(images, path), breed(path.stem)) for path in sorted(images.glob("*.jpg"))]
    if not rows:
        raise Absent("images has no .jpg")
    return LabelledSet.of("oxford_pets", rows, templates=TEMPLATE)


def breed(stem: str) -> str:
    """ "great_pyrenees_12" is a great pyrenees."""
    return in_words(stem.rsplit("_", 1)[0]).lower()
