"""Fashion-MNIST: ten kinds of clothes, grey, 28 x 28 pixels, 60,000 to train and 10,000 to test (Xiao et al. 2017).

Layout: train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz,
in the folder or below it in fashion-mnist/ (also without .gz).
From: https://github.com/zalandoresearch/fashion-mnist (MIT), or: apt-get download dataset-fashion-mnist
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from ..item import Item
from ..labelled import LabelledSet, Row
from . import Absent
from ._read import find

NAMES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def read(folder: Path) -> LabelledSet:
    rows = []
    for part, word in (("train", "train"), ("test", "t10k")):
        images, labels = (idx(place(folder, f"{word}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
        rows += [Row(Item(f"{part}/{i:05d}", np.repeat(image[:, :, None], 3, 2)), NAMES[label], part)
                 for i, (image, label) in enumerate(zip(images, labels, strict=True))]  # fmt: skip
    return LabelledSet.of("fashion_mnist", rows, NAMES, "a photo of a {}.")


def place(folder: Path, name: str) -> Path:
    """Where a file of that name lies, compressed or not."""
    return find(folder, f"{name}.gz", name, f"**/fashion-mnist/{name}.gz", f"**/fashion-mnist/{name}")


def idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, the type (8), the number of axes, their lengths, the bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        kind, axes = data[2], data[3]
        shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes])
        if data[:2] != b"\0\0" or kind != 8:
            raise ValueError("it does not begin as an IDX file of bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise Absent(f"{path.name} cannot be read ({error})") from None
