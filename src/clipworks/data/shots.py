"""Which images are for learning, choosing and testing: draws by seed, and splits as JSON with a hash.

`few_shots` draws as CoOp does: with its split files the same seed gives the very images that CoOp's published results
were trained on (`random.Random(seed).sample` over the classes in the order of the list, first for training, then up to
four per class for validation).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ClipworksError, check_range
from .labelled import LabelledSet

SHARES = (0.5, 0.2)  # of training and validation where a set is not split, as CoOp's splits of Caltech-101 and DTD
VALIDATION = 4  # most validation images of a class


def with_parts(data: LabelledSet, seed: int = 0) -> LabelledSet:
    """The set itself if it has parts to train and test on, else one split at random.

    Of every class 50 % are to train, 20 % to validate, 30 % to test, drawn by `seed`; where there are domains with
    several images of a class, class by class within each domain.
    """
    if {"train", "test"} <= set(data.parts):
        return data
    if data.parts:
        given = ", ".join(data.parts)
        raise ClipworksError(f"data {data.name!r} must have images to train and to test on. Got {given} only.")
    rng = np.random.default_rng(seed)
    strata = data.y
    if data.domains is not None:
        domain = np.unique(data.domains, return_inverse=True)[1]
        finer = data.y * (domain.max() + 1) + domain
        strata = finer if len(data) >= 4 * len(np.unique(finer)) else strata
    part = np.empty(len(data), int)
    for stratum in np.unique(strata):
        rows = rng.permutation(np.flatnonzero(strata == stratum))
        ends = [max(1, round(SHARES[0] * len(rows))), round((SHARES[0] + SHARES[1]) * len(rows))]
        part[rows] = np.searchsorted(ends, np.arange(len(rows)), side="right")
    parts = {name: np.flatnonzero(part == i) for i, name in enumerate(("train", "validation", "test"))}
    if not len(parts["test"]):
        largest = np.bincount(data.y).max()
        raise ClipworksError(f"data {data.name!r} must have images to train and to test on. It is not split, and no "
                             f"class has more than {largest}: nothing is left to test on.")  # fmt: skip
    return dataclasses.replace(data, parts={name: rows for name, rows in parts.items() if len(rows)})


def draw(labels: np.ndarray, rows: np.ndarray, counts: int | Sequence[int], rng: random.Random) -> np.ndarray:
    """Draw images of every class, without repetition; a class with fewer gives all.

    Parameters
    ----------
    labels : class number of every image of the set; -1 is never drawn
    rows : the images to draw from, in the order of the set's list
    counts : images of a class, or a number for each class
    rng : where the draw comes from
    """
    members: dict[int, list[int]] = {}  # in the order in which classes first appear, as CoOp goes through them
    for row in rows:
        if labels[row] >= 0:
            members.setdefault(int(labels[row]), []).append(int(row))
    found: list[int] = []
    for label, own in members.items():
        count = counts if isinstance(counts, int) else counts[label]
        found += rng.sample(own, count) if len(own) >= count else own
    return np.array(found, int)


def few_shots(
    data: LabelledSet, shots: int, seed: int, labels: np.ndarray | None = None, counts: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to choose settings on.

    Parameters
    ----------
    data : a set with parts (`with_parts`)
    shots : images per class
    seed : of the draw
    labels : class numbers to draw by, where they are not the set's own
    counts : images of each class, where they are not the same
    """
    check_range("shots", shots, 1)
    rng = random.Random(seed)
    own = data.y if labels is None else labels
    train = draw(own, data.parts["train"], shots if counts is None else counts, rng)
    rest = data.parts.get("validation", np.empty(0, int))
    return train, draw(data.y, rest, min(shots, VALIDATION), rng)


def subset(rows: np.ndarray, most: int | None, seed: int = 0) -> np.ndarray:
    """All of the rows, sorted, or `most` of them that depend on the rows and the seed alone."""
    rows = np.sort(rows)
    if most is None or len(rows) <= most:
        return rows
    check_range("most", most, 1)
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def base_and_new(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers of the first half, rounded up, and of the rest (CoOp).

    >>> [part.tolist() for part in base_and_new(5)]
    [[0, 1, 2], [3, 4]]
    """
    first = math.ceil(classes / 2)
    return np.arange(first), np.arange(first, classes)


def long_tail(classes: int, shots: int, ratio: float, seed: int) -> list[int]:
    """Images of each class from `shots` down to `shots` / `ratio` in equal ratios, never below 1.

    Which class has many is drawn by the seed.

    >>> sorted(long_tail(5, 16, 16, seed=0))
    [1, 2, 4, 8, 16]
    """
    check_range("ratio", ratio, 1)
    order = random.Random(seed).sample(range(classes), classes)
    steps = max(classes - 1, 1)
    return [max(1, round(shots * ratio ** (-order[c] / steps))) for c in range(classes)]


def symmetric_noise(labels: np.ndarray, classes: int, rate: float, seed: int) -> np.ndarray:
    """Labels of which a share `rate` was exchanged for one of the other classes, all equally likely."""
    check_range("rate", rate, 0, 1)
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(len(labels)) < round(rate * len(labels))
    shift = rng.integers(1, max(classes, 2), len(labels))
    return np.where(wrong, (labels + shift) % classes, labels)


@dataclass(frozen=True)
class Split:
    """Who is who in one trial, by the keys of the images, ready for JSON.

    Attributes
    ----------
    data, protocol, setting, seed : what it belongs to
    classes : names that training knows
    train, validation : pairs of key and class name; the labels of training may be wrong on purpose
    tests : name -> pairs of key and class name
    """

    data: str
    protocol: str
    setting: dict[str, Any]
    seed: int
    classes: list[str]
    train: list[tuple[str, str]]
    validation: list[tuple[str, str]]
    tests: dict[str, list[tuple[str, str]]]

    @property
    def digest(self) -> str:
        """SHA-256 of the whole, in a fixed form of JSON."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """The split with its hash."""
        return json.dumps({**dataclasses.asdict(self), "sha256": self.digest}, indent=0, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Split:
        """Read a split; one that was changed since it was written is refused."""
        try:
            found = json.loads(text)
            sha256 = found.pop("sha256")
            for name in ("train", "validation"):
                found[name] = [tuple(pair) for pair in found[name]]
            found["tests"] = {name: [tuple(pair) for pair in pairs] for name, pairs in found["tests"].items()}
            split = cls(**found)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ClipworksError(f"split must be JSON as `to_json` writes it. Got {error!r}.") from None
        if split.digest != sha256:
            raise ClipworksError(f"split must be as it was written, {sha256[:12]}. Its content is {split.digest[:12]}.")
        return split
