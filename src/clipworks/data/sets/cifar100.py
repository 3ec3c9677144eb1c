"""CIFAR-100: a hundred kinds of things at 32 x 32 pixels, 50,000 to train and 10,000 to test (Krizhevsky 2009).

Layout: the binary version, cifar-100-binary/train.bin, test.bin and fine_label_names.txt. The Python version (pickles
without an ending) is not read, since unpickling a file runs whatever it says.
From: https://www.cs.toronto.edu/~kriz/cifar.html ("binary version")
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet, in_words
from ._read import find, found, lines
from .cifar10 import binary, of, refuse_pickles


def read(folder: Path) -> LabelledSet:
    folder = found(folder, "cifar-100-binary", "cifar-100-python") or folder
    if not found(folder, "train.bin"):
        refuse_pickles(folder, "train")
    names = [in_words(name) for name in lines(find(folder, "fine_label_names.txt"))]
    return of("cifar100", {part: binary(folder, [part], 2) for part in ("train", "test")}, names)
