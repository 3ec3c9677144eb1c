"""What the classifiers from words share: sentences encoded once each, checked features, means of groups, scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ClipworksError, closest
from ..types import Features


@dataclass
class Scores:
    """Cosine scores of every image against every class; -inf where a class was no candidate.

    Attributes
    ----------
    names : the C class names
    scores : array of shape (n, C)
    """

    names: list[str]
    scores: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        """Position of the best class of every image, the first one where two are equal; shape (n,)."""
        return self.scores.argmax(1)

    @property
    def labels(self) -> list[str]:
        return [self.names[i] for i in self.predictions]

    def probabilities(self, scale: float = 100.0) -> np.ndarray:
        """Softmax of `scale` times the scores (use the encoder's `logit_scale`); rows sum to 1."""
        return softmax(scale * self.scores)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax of the last axis, of any magnitude."""
    weights = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
    return weights / weights.sum(-1, keepdims=True)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their lengths; a row of zeros stays one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def as_vectors(name: str, rows: Any, dim: int | None = None, least: int = 0) -> np.ndarray:
    """Return float32 unit rows of a matrix, a tensor or `Features`, or raise naming the argument.

    Parameters
    ----------
    name : of the argument, for messages
    rows : n vectors; not changed
    dim : columns they must have, None for any number
    least : how many rows there must be
    """
    rows = rows.vectors if isinstance(rows, Features) else rows
    rows = rows.detach().cpu().float().numpy() if hasattr(rows, "detach") else rows
    try:
        found = np.asarray(rows, np.float32)
    except (TypeError, ValueError):
        raise ClipworksError(f"{name} must be a matrix of numbers. Got {type(rows).__name__}.") from None
    if found.ndim != 2 or dim not in (None, found.shape[1]) or not found.shape[1]:
        raise ClipworksError(f"{name} must be a matrix of shape (n, {dim or 'dim'}). Got shape {found.shape}.")
    if len(found) < least:
        raise ClipworksError(f"{name} must hold at least {least} vector{'s' * (least != 1)}. Got {len(found)}.")
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found).all(1)).sum())
        raise ClipworksError(f"{name} must be finite. Got NaN or infinity in {bad} of {len(found)} vectors.")
    return unit(found)


def as_text(text: Any, names: Sequence[str] | None = None) -> np.ndarray:
    """Return class vectors as unit rows, one per name where names are given."""
    found = as_vectors("text", text, least=1)
    if names is not None and len(names) != len(found):
        raise ClipworksError(f"names must have one entry per row of text ({len(found)}). Got {len(names)}.")
    return found


def encode(sentences: Iterable[str], encoder: Any, chunk: int = 4096) -> np.ndarray:
    """Return one unit vector per sentence; equal sentences are encoded once.

    Parameters
    ----------
    sentences : any number of sentences, at least one
    encoder : anything with `texts(list of str) -> (n, dim)`, or a mapping from sentence to vector
    chunk : sentences encoded at a time

    Returns
    -------
    Array of shape (n, dim), float32, in the order of the sentences

    >>> encode(["a", "b", "a"], {"a": [1, 0], "b": [0, 2]}).tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    sentences = list(sentences)
    rows: dict[str, int] = {}
    for sentence in sentences:
        rows.setdefault(sentence, len(rows))
    distinct = list(rows)
    if isinstance(encoder, Mapping):
        vectors = [_look_up(encoder, sentence) for sentence in distinct]
        if len({v.shape for v in vectors}) != 1 or vectors[0].ndim != 1:
            shapes = sorted({v.shape for v in vectors})
            raise ClipworksError(f"encoder must hold vectors of one length. Got shapes {shapes}.")
        found = as_vectors("encoder", np.stack(vectors))
    elif hasattr(encoder, "texts"):
        parts = [encoder.texts(distinct[i : i + chunk]) for i in range(0, len(distinct), chunk)]
        found = np.concatenate([as_vectors("the encoder's texts", part) for part in parts])
    else:
        raise ClipworksError(
            f"encoder must have texts(sentences) or map sentences to vectors. Got {type(encoder).__name__}."
        )
    return found[[rows[sentence] for sentence in sentences]]


def _look_up(vectors: Mapping[str, Any], sentence: str) -> np.ndarray:
    if sentence not in vectors:
        raise ClipworksError(
            f"encoder must have a vector for every sentence. Got none for {sentence!r}.{closest(sentence, vectors)}"
        )
    vector = vectors[sentence]
    return np.asarray(vector.detach().cpu().float() if hasattr(vector, "detach") else vector, np.float32)


def means(vectors: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return the mean of each run of rows, `sizes` long; not renormalised. No size may be 0."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)
    return np.add.reduceat(vectors, starts, axis=0) / np.asarray(sizes, np.float32)[:, None]


def grouped(candidates: np.ndarray) -> list[tuple[list[int], np.ndarray]]:
    """Images with the same candidates together: (the candidates, sorted; the rows that have them) of each group."""
    groups, member, sizes = np.unique(np.sort(candidates, axis=1), axis=0, return_inverse=True, return_counts=True)
    rows = np.split(np.argsort(member.reshape(-1), kind="stable"), np.cumsum(sizes)[:-1])
    return list(zip(groups.tolist(), rows, strict=True)) if len(groups) else []


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k best classes of every row, best first; of equal ones the first; shape (n, min(k, C))."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]
