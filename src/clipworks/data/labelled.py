"""Labelled sets for learning and measuring: images, class numbers, class names, and which image is for what.

`read_labelled("oxford_pets", folder)` knows a set by its name (see `sets`); `read_labelled("mine", folder)` tells the
layout of any other folder or table by looking at it (see `layouts`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import ClipworksError
from .item import Item

PARTS = ("train", "validation", "test")
_PART_NAMES = {
    "train": "train", "training": "train", "dataset_train": "train", "val": "validation", "valid": "validation",
    "validation": "validation", "dev": "validation", "test": "test", "testing": "test", "dataset_test": "test",
}  # fmt: skip


@dataclass
class Row:
    """One labelled image on its way into a set: the class by its name in words, part and domain where there are any."""

    item: Item
    label: str
    part: str | None = None
    domain: str | None = None


@dataclass
class LabelledSet:
    """Images with their classes.

    Attributes
    ----------
    name : what the set is called
    items : n images with unique keys, in the order of the set's own lists
    y : n class numbers
    classes : C distinct names in words; `y` counts in them
    parts : rows of "train", "validation", "test"; empty where the set does not say which is which
    domains : n names of the kind of picture ("sketch"), or None
    templates : sentences for the class names that belong to the set, a name or a list as `class_vectors` takes them
    noisy : further class numbers, by annotator, -1 for images without; for training on labels as people give them
    """

    name: str
    items: list[Item]
    y: np.ndarray
    classes: list[str]
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    domains: np.ndarray | None = None
    templates: str | Sequence[str] = "default"
    noisy: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.items:
            raise ClipworksError(f"data {self.name!r} must hold labelled images. Got none.")
        if len(set(self.classes)) < len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise ClipworksError(f"data {self.name!r} must have distinct class names. Twice: {', '.join(twice[:5])}.")
        keys = {item.key for item in self.items}
        if len(keys) < len(self.items):
            raise ClipworksError(f"data {self.name!r} must have unique keys. Got {len(self.items)} images with "
                                 f"{len(keys)} keys.")  # fmt: skip
        shared = [a for a in self.parts for b in self.parts if a < b and np.isin(self.parts[a], self.parts[b]).any()]
        if shared:
            raise ClipworksError(f"data {self.name!r}: an image of the part {shared[0]!r} is in another part too.")

    def __len__(self) -> int:
        return len(self.items)

    @classmethod
    def of(
        cls, name: str, rows: Iterable[Row], classes: Sequence[str] | None = None, templates: str = "default"
    ) -> LabelledSet:
        """Collect rows; classes are numbered in the order of `classes`, or of their names."""
        rows = list(rows)
        classes = sorted({row.label for row in rows}) if classes is None else list(classes)
        number = {label: i for i, label in enumerate(classes)}
        parts = {part: np.array([i for i, row in enumerate(rows) if row.part == part], int) for part in PARTS}
        domains = None if any(row.domain is None for row in rows) else np.array([row.domain for row in rows])
        return cls(name, [row.item for row in rows], np.array([number[row.label] for row in rows], int), classes,
                   {part: found for part, found in parts.items() if len(found)}, domains, templates)  # fmt: skip

    def only(self, rows: np.ndarray, name: str | None = None) -> LabelledSet:
        """The set of some rows; classes that none of them has are gone, the others are numbered anew."""
        rows = np.asarray(rows)
        kept, y = np.unique(self.y[rows], return_inverse=True)
        place = np.full(len(self), -1)
        place[rows] = np.arange(len(rows))
        parts = {part: place[found][place[found] >= 0] for part, found in self.parts.items()}
        renumber = np.full(len(self.classes), -1)
        renumber[kept] = np.arange(len(kept))
        return dataclasses.replace(
            self, name=name or self.name, items=[self.items[i] for i in rows], y=y,
            classes=[self.classes[c] for c in kept], parts={k: v for k, v in parts.items() if len(v)},
            domains=None if self.domains is None else self.domains[rows],
            noisy={k: np.where(v[rows] < 0, -1, renumber[v[rows]]) for k, v in self.noisy.items()},
        )  # fmt: skip

    def with_noisy(self, path: str | os.PathLike) -> LabelledSet:
        """Add other annotators' labels of the training part: an npz file with one array of class numbers each.

        The arrays follow the order of the training images, as those of CIFAR-10N do; one that equals the labels is
        left out.
        """
        train = self.parts.get("train", np.arange(len(self)))
        noisy = dict(self.noisy)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {k: np.asarray(arrays[k]) for k in arrays.files}
        except (OSError, ValueError) as error:
            raise ClipworksError(f"noisy labels must be an npz file. {os.fspath(path)!r}: {error}") from error
        for key, values in found.items():
            if values.shape != (len(train),) or values.dtype.kind not in "iu":
                raise ClipworksError(f"noisy labels {key!r} must be {len(train)} class numbers, one per training image "
                                     f"of {self.name!r}. Got {values.dtype} of shape {values.shape}.")  # fmt: skip
            if values.min() < 0 or values.max() >= len(self.classes):
                raise ClipworksError(f"noisy labels {key!r} must lie in 0 ... {len(self.classes) - 1}. "
                                     f"Got {values.min()} ... {values.max()}.")  # fmt: skip
            if not np.array_equal(values, self.y[train]):
                noisy[key] = np.full(len(self), -1)
                noisy[key][train] = values
        return dataclasses.replace(self, noisy=noisy)


def read_labelled(name: str, folder: str | os.PathLike) -> LabelledSet:
    """Read a labelled set.

    Parameters
    ----------
    name : of the set. One of `sets.set_names()` ("oxford_pets", also "OxfordPets") is read in its published layout;
        any other name stands for whatever layout the folder has: CoOp's split json, folders per class (with or without
        train/ and test/ above), a CSV or Parquet table with labels, a Hugging Face folder
    folder : where it lies (or the table)

    Raises
    ------
    ClipworksError
        If something is missing; the message tells the layout that was expected, and where to get the set.
    """
    from .layouts import read_any
    from .sets import known_set, read_set

    place = Path(folder).expanduser()
    if not place.exists():
        raise ClipworksError(f"data {name}={os.fspath(folder)}: there is no such folder or file.{_help(name)}")
    known = known_set(name)
    found = read_set(known, place) if known else read_any(name, place)
    return dataclasses.replace(found, name=name)


def part_of(name: str) -> str | None:
    """The part that a folder or a column's value stands for: "val" is "validation".

    >>> part_of("Val"), part_of("dogs")
    ('validation', None)
    """
    return _PART_NAMES.get(name.strip().lower())


def in_words(name: str) -> str:
    """A folder's name as a reader would write it: "sea_horse" is "sea horse"."""
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def file_item(folder: Path, path: Path) -> Item:
    """The item of a file, keyed by its path below the folder."""
    from .item import text_key

    return Item(text_key(os.path.relpath(path, folder)), path)


def _help(name: str) -> str:
    from .sets import describe, known_set

    known = known_set(name)
    return f" {describe(known)}" if known else ""
