"""`find_unknown`: which images of a source show none of the given names.

Images of the classes say more than their names (`docs/inspecting.md`): a name may mean nothing to the model, and of two
names for one thing neither wins. Where there are any, an image's score is its cosine with the most similar of them, and
the threshold is taken from that of every one of them with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadImage, ClipworksError, check_choice, naming
from ..zeroshot.classifier import check_names, class_vectors
from ..zeroshot.open_set import SCORES, OpenSet, fewest, lower_threshold
from .common import UNKNOWN

if TYPE_CHECKING:
    from ..data.sources import Source
    from ..encoders.encoder import Encoder

NEAREST = "nearest"
MIXED = 4  # images from which on two humps can be looked for


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
    score: str | None = None,
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
        mixed lot and cuts between the two humps of their scores, also where there is no stranger among them
    score : "nearest", the cosine with the most similar image of `known` (default, where they are given); or of words
        alone "mcm" (default without `known`) and "msp", which weigh several names against each other, "max_logit",
        "energy"
    rate : share of images of the classes that may be refused, where `known` is given (about, with "nearest")
    encoder : a model's name, a path or an encoder (default: the bundled one)
    templates : name of a set (default, simple, name, imagenet), a sentence with {} for the name, or several
    batch_size : images per pass

    Returns
    -------
    Unknowns, in the order of the source; its errors are those of both sources
    """
    from ..data.sources import open_source
    from ..encoders.loading import resolve

    names = check_names(names)
    if UNKNOWN in names:
        raise ClipworksError(f"names must not hold {UNKNOWN!r}, the label of images that show none of them.")
    score = check_choice("score", score or ("mcm" if known is None else NEAREST), (*SCORES, NEAREST))
    if score == NEAREST and known is None:
        raise ClipworksError(f"known must be images of the classes where score is {NEAREST!r}. Got None.")
    need = MIXED if known is None else fewest(rate)
    source = open_source(source)
    if known is not None:
        with naming("known"):
            known = open_source(known)
    model: Any = resolve(encoder)
    words = class_vectors(names, model, templates=templates)
    keys, vectors, errors = _vectors(source, model, batch_size)
    if not keys:
        raise errors[0] if errors else ClipworksError("source must hold at least one image. Got none.")
    shown = vectors
    if known is not None:
        _, shown, bad = _vectors(known, model, batch_size)
        errors += bad
    if len(shown) < need:
        what, why = ("known", f"for a rate of {rate}") if known is not None else ("source", "where there are no known")
        raise ClipworksError(f"{what} must hold at least {need} images {why}. Got {len(shown)}.")
    if score == NEAREST:
        scores, threshold = (vectors @ shown.T).max(1), lower_threshold(_nearest_other(shown), rate)
    else:
        judge = OpenSet(words, score=score, rate=None if known is None else rate, scale=model.logit_scale).fit(shown)
        scores, threshold = judge.score_samples(vectors), judge.threshold_
    best = (vectors @ np.asarray(words, np.float32).T).argmax(1)
    labels = [names[i] if value > threshold else UNKNOWN for i, value in zip(best, scores, strict=True)]
    return Unknowns(keys, labels, scores, threshold, errors)


def _nearest_other(vectors: np.ndarray) -> np.ndarray:
    """Cosine of every image with the most similar other one."""
    near = vectors @ vectors.T
    np.fill_diagonal(near, -1)
    return near.max(1)


def _vectors(source: Source, model: Any, batch_size: int) -> tuple[list[str], np.ndarray, list[BadImage]]:
    from ..data.loader import load_batches

    keys: list[str] = []
    errors: list[BadImage] = []
    parts = [np.empty((0, model.dim), np.float32)]
    for batch in load_batches(source, model.preprocess, batch_size, on_error="report"):
        errors += batch.errors
        if len(batch):
            keys += batch.keys
            parts.append(model.images(batch.pixels).numpy())
    return keys, np.concatenate(parts), errors
