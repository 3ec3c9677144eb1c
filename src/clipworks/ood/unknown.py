"""`find_unknown`: which images of a source show none of the given names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadImage, ClipworksError
from ..zeroshot.classifier import check_names, class_vectors
from ..zeroshot.open_set import OpenSet

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


@dataclass
class Unknowns:
    """The answer for every image.

    Attributes
    ----------
    keys : n strings
    labels : the best name, or "none of these"
    scores : how surely each image shows one of the names
    threshold : images that score at or below it show none
    errors : images that could not be used
    """

    keys: list[str]
    labels: list[str]
    scores: np.ndarray
    threshold: float
    errors: list[BadImage] = field(default_factory=list)

    @property
    def unknown(self) -> list[str]:
        """Keys of the images that show none of the names, the least likely first."""
        return [self.keys[i] for i in np.argsort(self.scores, kind="stable") if self.scores[i] <= self.threshold]

    def as_rows(self) -> list[dict[str, Any]]:
        """One dictionary per image: key, label, score."""
        each = zip(self.keys, self.labels, self.scores.tolist(), strict=True)
        return [{"key": key, "label": label, "score": round(score, 6)} for key, label, score in each]


def find_unknown(
    source: Any,
    names: Sequence[str],
    known: Any = None,
    *,
    score: str = "mcm",
    rate: float = 0.05,
    encoder: str | Encoder | None = None,
    templates: str | Sequence[str] = "default",
    batch_size: int = 32,
) -> Unknowns:
    """Sort images into classes by their names, and set those aside that show none of them.

    Parameters
    ----------
    source : images as `open_source` takes them (folder, table, list ...)
    names : class names in words a reader would use
    known : other images of these classes, unlabelled, which set the threshold; None takes the images themselves for a
        mixed lot and cuts between the two humps of their scores
    score : "mcm", "msp", "max_logit" or "energy"
    rate : share of images of the classes that may be refused, where `known` is given
    encoder : a model's name, a path or an encoder (default: the bundled one)
    templates : name of a set (default, simple, name, imagenet), a sentence with {} for the name, or several
    batch_size : images per pass

    Returns
    -------
    Unknowns, in the order of the source
    """
    from ..encoders.loading import resolve

    names = check_names(names)
    model: Any = resolve(encoder)
    words = class_vectors(names, model, templates=templates)
    judge = OpenSet(words, score=score, rate=None if known is None else rate, scale=model.logit_scale, names=names)
    keys, vectors, errors = _vectors(source, model, batch_size)
    if not keys:
        raise errors[0] if errors else ClipworksError("source must hold at least one image. Got none.")
    judge.fit(vectors if known is None else _vectors(known, model, batch_size)[1])
    labels = [str(label) for label in judge.predict(vectors)]
    return Unknowns(keys, labels, judge.score_samples(vectors), judge.threshold_, errors)


def _vectors(source: Any, model: Any, batch_size: int) -> tuple[list[str], np.ndarray, list[BadImage]]:
    from ..data.loader import load_batches
    from ..data.sources import open_source

    keys: list[str] = []
    errors: list[BadImage] = []
    parts = [np.empty((0, model.dim), np.float32)]
    for batch in load_batches(open_source(source), model.preprocess, batch_size, on_error="report"):
        errors += batch.errors
        if len(batch):
            keys += batch.keys
            parts.append(model.images(batch.pixels).numpy())
    return keys, np.concatenate(parts), errors
