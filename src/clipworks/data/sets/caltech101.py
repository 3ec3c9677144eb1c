"""Caltech-101: 100 kinds of objects, as CoOp counts them (Fei-Fei et al. 2004).

Layout: 101_ObjectCategories/accordion/image_0001.jpg ...; split_zhou_Caltech101.json (CoOp's split, optional).
Without the split it is not split, and the folders BACKGROUND_Google and Faces_easy are left out.
From: https://data.caltech.edu/records/mzrjq-6wc02 (CC BY 4.0); split: https://github.com/KaiyangZhou/CoOp
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet
from ._read import coop, find, per_class

NAMES = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}
SKIP = ("BACKGROUND_Google", "Faces_easy")


def read(folder: Path) -> LabelledSet:
    images = find(folder, "101_ObjectCategories")
    return coop("caltech101", folder, images, "a photo of a {}.") or per_class(
        "caltech101", images, NAMES, skip=SKIP, templates="a photo of a {}."
    )
