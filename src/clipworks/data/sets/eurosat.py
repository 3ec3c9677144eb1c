"""EuroSAT: ten kinds of land from Sentinel-2, 27,000 images of 64 x 64 (Helber et al. 2019).

Layout: 2750/AnnualCrop/AnnualCrop_1.jpg ... (or EuroSAT/, EuroSAT_RGB/, or the class folders themselves);
split_zhou_EuroSAT.json (CoOp's split, optional). Without it the set is not split.
From: https://zenodo.org/records/7711810 (MIT); split: https://github.com/KaiyangZhou/CoOp
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet
from ._read import coop, find, per_class

TEMPLATE = "a centered satellite photo of {}."
NAMES = {
    "AnnualCrop": "Annual Crop Land", "Forest": "Forest", "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings", "River": "River",
    "SeaLake": "Sea or Lake",
}  # fmt: skip


def read(folder: Path) -> LabelledSet:
    images = find(folder, "2750", "EuroSAT_RGB", "EuroSAT", "AnnualCrop")
    images = folder if images.name == "AnnualCrop" else images
    return coop("eurosat", folder, images, TEMPLATE) or per_class("eurosat", images, NAMES, templates=TEMPLATE)
