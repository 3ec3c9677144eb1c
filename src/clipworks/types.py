"""Small shared types: `Features` (vectors with what belongs to them) and the result dataclasses of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import BadImage, ClipworksError


@dataclass
class Features:
    """Vectors with their keys, labels, texts and the fingerprint of the encoder that made them.

    Parameters
    ----------
    vectors : array of shape (n, dim), float16 or float32; may be memory-mapped
    keys : n strings, unique (default "0", "1", ...)
    labels : optional n integers or strings
    texts : optional n captions
    fingerprint : the encoder's fingerprint; sets with different ones are never mixed
    """

    vectors: np.ndarray
    keys: Sequence[str] = ()
    labels: np.ndarray | None = None
    texts: Sequence[str] | None = None
    fingerprint: str = ""

    def __post_init__(self):
        if self.vectors.ndim != 2:
            raise ClipworksError(f"vectors must be a matrix of shape (n, dim). Got shape {self.vectors.shape}.")
        self.keys = list(self.keys) or [str(i) for i in range(len(self.vectors))]
        for name in ("keys", "labels", "texts"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.vectors):
                raise ClipworksError(f"{name} must have one entry per vector ({len(self.vectors)}). Got {len(value)}.")

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass
class Ranking:
    """The answer to a search: keys and scores, best first; `columns` holds the requested user columns row by row."""

    keys: list[str]
    scores: np.ndarray
    query: str = ""
    columns: list[dict] = field(default_factory=list)

    def __iter__(self):
        return iter(zip(self.keys, self.scores.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.keys)

    def as_rows(self) -> list[dict]:
        """One dictionary per hit (rank, key, score, user columns), ready for JSON or a table."""
        extra = self.columns or [{} for _ in self.keys]
        hits = enumerate(zip(self, extra, strict=True), start=1)
        return [{"rank": rank, "key": key, "score": round(score, 6), **row} for rank, ((key, score), row) in hits]


@dataclass
class Classification:
    """Scores of every item against every class name.

    Attributes
    ----------
    keys : n strings
    names : class names
    probabilities : array of shape (n, classes), rows sum to 1
    errors : images that could not be used, each with `key` and `reason`
    """

    keys: list[str]
    names: list[str]
    probabilities: np.ndarray
    errors: list[BadImage] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        return [self.names[i] for i in self.probabilities.argmax(1)]

    def as_rows(self, top: int = 1) -> list[dict]:
        """One dictionary per item with its `top` best classes and their probabilities."""
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :top]
        return [
            {"key": k, "label": self.names[o[0]], "probability": round(float(p[o[0]]), 6)}
            | ({"top": {self.names[j]: round(float(p[j]), 6) for j in o}} if top > 1 else {})
            for k, o, p in zip(self.keys, order, self.probabilities, strict=True)
        ]
