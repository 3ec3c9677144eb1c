"""Task after task: run a method over several, and report what each one gave and what it took.

After every task all tasks are measured by their class words, so that tasks not learned yet show zero-shot ability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.base import clone

from ..encoders.encoder import Encoder
from ..encoders.loading import resolve
from ..errors import ClipworksError, check_range
from ..heads.common import class_numbers
from ..zeroshot.classifier import class_vectors
from .common import Tuner
from .shots import as_given


@dataclass
class Task:
    """Images of one task.

    Attributes
    ----------
    title : what it is called
    names : class names
    images, y : to learn; labels are names or numbers
    held, held_y : to measure
    """

    title: str
    names: Sequence[str]
    images: Any
    y: Any
    held: Any
    held_y: Any


@dataclass
class ContinualReport:
    """Accuracies over time, in percent.

    Attributes
    ----------
    titles : of the n tasks
    start : (n,) before the first task, zero-shot
    accuracy : (n, n); row i holds all tasks after learning task i
    encoder : after the last task
    """

    titles: list[str]
    start: np.ndarray
    accuracy: np.ndarray
    encoder: Encoder

    @property
    def transfer(self) -> float:
        """Mean over tasks of their accuracy before they are learned (after at least one other), ZSCL's Transfer."""
        above = [self.accuracy[:j, j].mean() for j in range(1, len(self.titles))]
        return float(np.mean(above)) if above else float("nan")

    @property
    def average(self) -> float:
        """Mean over tasks and time, ZSCL's Avg."""
        return float(self.accuracy.mean())

    @property
    def last(self) -> float:
        """Mean over tasks at the end, ZSCL's Last."""
        return float(self.accuracy[-1].mean())

    @property
    def backward(self) -> float:
        """Mean change of a task's accuracy from when it was learned to the end; below 0 it was forgotten."""
        change = self.accuracy[-1, :-1] - self.accuracy.diagonal()[:-1]
        return float(change.mean()) if len(change) else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """Everything but the encoder, ready for JSON."""
        measures = {name: getattr(self, name) for name in ("transfer", "average", "last", "backward")}
        return {"tasks": self.titles, "start": self.start.tolist(), "accuracy": self.accuracy.tolist(), **measures}


def continual(
    method: Tuner, tasks: Sequence[Task], *, original_teacher: bool = False, rehearsal: int = 0
) -> ContinualReport:
    """Learn tasks one after the other, each from the encoder that the one before gave.

    Parameters
    ----------
    method : settings of the method; `names` and `encoder` are set for every task, the first encoder is its own
    tasks : in the order of learning
    original_teacher : give a method with `teacher` the encoder before all tasks, not that of the task before
    rehearsal : images of every class of earlier tasks, the first of each, that are learned again with every later one;
        the classes are then those of all tasks so far. 0: nothing is stored

    Returns
    -------
    ContinualReport
    """
    if not tasks:
        raise ClipworksError("tasks must hold at least one task. Got none.")
    if original_teacher and "teacher" not in method.get_params(deep=False):
        raise ClipworksError(f"original_teacher needs a method with teacher. {type(method).__name__} has none.")
    first = encoder = resolve(method.encoder)
    check_range("rehearsal", rehearsal, 0)
    rows: list[list[float]] = []
    stored: list[Task] = []
    start = np.array([_accuracy(first, task, method.templates) for task in tasks])
    for task in tasks:
        changes = {"teacher": first} if original_teacher else {}
        parts = [*stored, task]
        names = list(dict.fromkeys(str(name) for part in parts for name in part.names))
        made = clone(method).set_params(names=names, encoder=encoder, **changes)
        encoder = made.fit(*_together(parts)).merge()
        if rehearsal:
            stored.append(_first(task, rehearsal))
        rows.append([_accuracy(encoder, other, method.templates) for other in tasks])
    return ContinualReport([task.title for task in tasks], start, np.array(rows), encoder)


def _called(task: Task, labels: Any) -> np.ndarray:
    """Labels of a task as names."""
    names, labels = np.asarray([str(name) for name in task.names]), np.asarray(labels)
    return names[class_numbers("y", labels, names if labels.dtype.kind == "U" else np.arange(len(names)))]


def _first(task: Task, count: int) -> Task:
    """The task with the first images of every class alone."""
    names, images = _called(task, task.y), as_given(task.images)
    rows = np.sort(np.concatenate([np.flatnonzero(names == name)[:count] for name in np.unique(names)]))
    own = images[torch.from_numpy(rows)] if isinstance(images, torch.Tensor) else [images[i] for i in rows]
    return replace(task, images=own, y=names[rows])


def _together(parts: Sequence[Task]) -> tuple[Any, Any]:
    """Images and labels of a task, or of several with their labels as names."""
    if len(parts) == 1:
        return parts[0].images, parts[0].y
    images = [as_given(part.images) for part in parts]
    tensors = all(isinstance(own, torch.Tensor) for own in images)
    joined = torch.cat(images) if tensors else [image for own in images for image in own]
    return joined, np.concatenate([_called(part, part.y) for part in parts])


def _accuracy(encoder: Encoder, task: Task, templates: Any) -> float:
    """Accuracy in percent by class words."""
    cosines = encoder.images(as_given(task.held)) @ class_vectors(task.names, encoder, templates=templates).T
    labels = np.asarray(task.held_y)
    known = np.asarray(task.names) if labels.dtype.kind == "U" else np.arange(len(task.names))
    return 100 * float(np.mean(cosines.argmax(1).numpy() == class_numbers("held_y", labels, known)))
