"""Protocols: which images a method may learn from, choose on, and is tested on, as a list of trials.

few-shot     1, 2, 4, 8, 16 images per class, drawn as CoOp draws them (Zhou et al. 2022)
base-to-new  shots of the first half of the classes; tested on these and, apart, on the other half; harmonic mean
cross        shots of the first set; tested on the classes of every other set
domains      shots of all domains but one; tested on the one left out, each in turn
imbalanced   shots that fall from many to few over the classes; tested on all
noisy        shots with wrong labels: symmetric, or as people gave them; tested on right ones

A trial with 0 shots is for methods that need words only. A protocol is a public function of this module: adding one is
adding a function.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...data.labelled import LabelledSet
from ...data.shots import Split, base_and_new, few_shots, long_tail, subset, symmetric_noise, with_parts
from ...errors import ClipworksError, check_choice

NONE = np.empty(0, int)


@dataclass
class Test:
    """Images to test on: rows of a set, their class numbers, and the names that these count in."""

    data: LabelledSet
    rows: np.ndarray
    y: np.ndarray
    classes: list[str]


@dataclass
class Trial:
    """One draw of images.

    Attributes
    ----------
    data : the set learned from
    protocol, setting, seed : what it is; `setting` holds "shots" and what else varies
    classes : names that the labels count in
    rows, y : images to learn from, labels as they are told (wrong ones too)
    validation : rows and labels to choose settings on; may be empty
    tests : by name
    """

    data: LabelledSet
    protocol: str
    setting: dict[str, Any]
    seed: int
    classes: list[str]
    rows: np.ndarray
    y: np.ndarray
    validation: tuple[np.ndarray, np.ndarray]
    tests: dict[str, Test]

    def split(self) -> Split:
        """Who is who, by keys."""

        def pairs(data: LabelledSet, rows: np.ndarray, y: np.ndarray, classes: list[str]) -> list[tuple[str, str]]:
            return [(data.items[row].key, classes[label]) for row, label in zip(rows, y, strict=True)]

        tests = {name: pairs(t.data, t.rows, t.y, t.classes) for name, t in self.tests.items()}
        return Split(self.data.name, self.protocol, self.setting, self.seed, self.classes,
                     pairs(self.data, self.rows, self.y, self.classes),
                     pairs(self.data, *self.validation, self.classes), tests)  # fmt: skip


@dataclass
class Grid:
    """What a protocol goes through.

    Attributes
    ----------
    shots, seeds : images per class, seeds of the draws
    most : images to test on, at most; None takes all
    ratio : imbalanced: between the largest and the smallest class
    rates : noisy: shares of labels that are exchanged
    """

    shots: Sequence[int] = (1, 2, 4, 8, 16)
    seeds: Sequence[int] = (1, 2, 3)
    most: int | None = None
    ratio: float = 16.0
    rates: Sequence[float] = (0.2, 0.4)
    splits: dict[int, LabelledSet] = field(default_factory=dict, repr=False)

    def parts(self, data: LabelledSet) -> LabelledSet:
        """The set with its parts, split once where it had none."""
        if len(data.classes) < 2:
            raise ClipworksError(f"data {data.name!r} must have at least 2 classes. Got {data.classes[0]!r} alone.")
        if id(data) not in self.splits:
            self.splits[id(data)] = with_parts(data)
        return self.splits[id(data)]


def few_shot(sets: Sequence[LabelledSet], grid: Grid) -> Iterator[Trial]:
    """Shots of every class; the same images for all methods."""
    for data in map(grid.parts, sets):
        test = {"test": _test(data, data.parts["test"], grid)}
        yield from _with_shots(data, "few-shot", grid, test)


def base_to_new(sets: Sequence[LabelledSet], grid: Grid) -> Iterator[Trial]:
    """Shots of the first half of the classes, tested on both halves apart."""
    for data in map(grid.parts, sets):
        if len(data.classes) < 4:
            raise ClipworksError(f"protocol base-to-new needs 4 classes. {data.name!r} has {len(data.classes)}.")
        halves = base_and_new(len(data.classes))
        rows = data.parts["test"]
        tests = {}
        for name, half in zip(("base", "new"), halves, strict=True):
            kept = subset(rows[np.isin(data.y[rows], half)], grid.most)
            tests[name] = Test(data, kept, data.y[kept] - half[0], [data.classes[c] for c in half])
        for trial in _with_shots(data, "base-to-new", grid, tests):
            base, (rows_, labels) = np.isin(trial.y, halves[0]), trial.validation
            seen = np.isin(labels, halves[0])
            trial.classes, trial.rows, trial.y = tests["base"].classes, trial.rows[base], trial.y[base]
            trial.validation = rows_[seen], labels[seen]
            yield trial


def cross(sets: Sequence[LabelledSet], grid: Grid) -> Iterator[Trial]:
    """Shots of the first set, tested on the others with their own classes."""
    if len(sets) < 2:
        raise ClipworksError("protocol cross needs a set to learn from and others to test on. Got one set.")
    source, *targets = map(grid.parts, sets)
    tests = {data.name: _test(data, data.parts["test"], grid) for data in targets}
    yield from _with_shots(source, "cross", grid, tests)


def domains(sets: Sequence[LabelledSet], grid: Grid) -> Iterator[Trial]:
    """Shots of all domains but one, tested on that one: leave one domain out."""
    for data in sets:
        if data.domains is None:
            raise ClipworksError(f"protocol domains needs a set with domains, such as pacs. {data.name!r} has none.")
        split = grid.parts(data)
        for left_out in sorted(set(data.domains.tolist())):
            own = data.domains == left_out
            test = {"test": _test(data, np.flatnonzero(own), grid)}
            seen = {name: rows[~own[rows]] for name, rows in split.parts.items()}
            yield from _with_shots(split, "domains", grid, test, parts=seen, left_out=left_out)


def imbalanced(sets: Sequence[LabelledSet], grid: Grid) -> Iterator[Trial]:
    """A long tail: the class with most images has `shots`, that with fewest shots / ratio."""
    for data in map(grid.parts, sets):
        test = {"test": _test(data, data.parts["test"], grid)}
        for trial in _with_shots(data, "imbalanced", grid, test, ratio=grid.ratio):
            shots = trial.setting["shots"]
            if shots == 1:
                continue  # nothing falls from one
            if shots:
                counts = long_tail(len(data.classes), shots, grid.ratio, trial.seed)
                trial.rows, held = few_shots(data, shots, trial.seed, counts=counts)
                trial.y, trial.validation = data.y[trial.rows], (held, data.y[held])
            yield trial


def noisy(sets: Sequence[LabelledSet], grid: Grid) -> Iterator[Trial]:
    """Wrong labels: a share exchanged at random, and those of human annotators where the set has them.

    Images are drawn by the label they are told to have; there is no validation, which would have to be noisy too.
    """
    for data in map(grid.parts, sets):
        test = {"test": _test(data, data.parts["test"], grid)}
        kinds = [(f"symmetric {rate:.0%}", rate) for rate in grid.rates]
        for kind, rate in [*kinds, *((f"human {name}", None) for name in data.noisy)]:
            for trial in _with_shots(data, "noisy", grid, test, noise=kind):
                if trial.setting["shots"]:
                    if rate is None:
                        labels = data.noisy[kind.removeprefix("human ")]
                    else:
                        labels = symmetric_noise(data.y, len(data.classes), rate, trial.seed)
                    trial.rows, _ = few_shots(data, trial.setting["shots"], trial.seed, labels=labels)
                    trial.y, trial.validation = labels[trial.rows], (NONE, NONE)
                yield trial


def protocols() -> dict[str, Callable[[Sequence[LabelledSet], Grid], Iterator[Trial]]]:
    """Every protocol by name: the functions of this module that take sets and a grid."""
    own = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    return {name.replace("_", "-"): f for name, f in own if list(inspect.signature(f).parameters) == ["sets", "grid"]}


def trials(protocol: str, sets: Sequence[LabelledSet], grid: Grid) -> Iterator[Trial]:
    """The trials of a protocol by name."""
    known = protocols()
    return known[check_choice("protocol", protocol, known)](sets, grid)


def _test(data: LabelledSet, rows: np.ndarray, grid: Grid) -> Test:
    rows = subset(rows, grid.most)
    return Test(data, rows, data.y[rows], data.classes)


def _with_shots(
    data: LabelledSet, protocol: str, grid: Grid, tests: dict[str, Test],
    parts: dict[str, np.ndarray] | None = None, **setting: Any,
) -> Iterator[Trial]:  # fmt: skip
    """A trial per number of shots and seed; numbers that no class of the set has are passed over."""
    data = data if parts is None else dataclasses.replace(data, parts=parts)
    most = np.bincount(data.y[data.parts["train"]]).max()
    for shots in [0, *(n for n in grid.shots if n <= most)]:
        for seed in grid.seeds:
            rows, held = few_shots(data, shots, seed) if shots else (NONE, NONE)
            yield Trial(data, protocol, {"shots": shots, **setting}, seed, data.classes, rows, data.y[rows],
                        (held, data.y[held]), tests)  # fmt: skip
