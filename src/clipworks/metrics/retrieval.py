"""Image retrieval: how far up the images of the same class or object come, by mean average precision and recall at k.

Claim: CLIP is weak at finding images of the same object or fine class, which fine-tuning on classes repairs; a search
engine that also takes words has to be measured on both (OpenAI ViT-L/14-336, CUB: mAP 77.0 -> 88.0 in the paper).

Formula: AP_q = 1 / R_q * sum over the R_q relevant images i of (relevant images with score >= s_i) / (all images with
score >= s_i);  mAP = mean_q AP_q;  recall@k = share of queries with a relevant image among the k best;  k-NN = share of
queries whose k nearest images vote for their class. A query is never in its own gallery.

Paper: Schall et al. 2024, Optimizing CLIP Models for Image Retrieval with Maintained Joint-Embedding Alignment.
Differs from the paper: the evaluation only, not the training. Images with equal scores share their place, as in
scikit-learn's average precision, and count against recall, so that an encoder which maps all images to one vector
gets no credit. Queries without any relevant image are left out and counted. k = 21 of the k-NN is the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ClipworksError, check_range
from ..registry import method
from ..types import Features
from ..zeroshot.sentences import as_vectors

CELLS = 1 << 22  # similarities sorted at a time


@dataclass
class ImageRetrieval:
    """What a set of queries found.

    Attributes
    ----------
    mean_average_precision : over the queries that have a relevant image
    recall : k -> share of them with a relevant image among the k best
    knn : share of them whose nearest images vote for their class
    average_precision : per query, shape (n,); NaN where nothing is relevant
    unanswerable : queries without a relevant image
    """

    mean_average_precision: float
    recall: dict[int, float]
    knn: float
    average_precision: np.ndarray
    unanswerable: int


@method(card="retrieval-finetuning", level="M")
def image_retrieval(
    queries: Any,
    labels: Any = None,
    *,
    gallery: Any = None,
    gallery_labels: Any = None,
    ignore: np.ndarray | None = None,
    cutoffs: Sequence[int] = (1, 5, 10),
    neighbours: int = 21,
) -> ImageRetrieval:
    """Rank a gallery by cosine for every query and measure where the images with the query's label stand.

    Parameters
    ----------
    queries : vectors of n images (or texts), shape (n, dim), or `Features`
    labels : class or object of each query (default: the labels of the features)
    gallery : vectors of m images, or `Features`; default: the queries, each without itself
    gallery_labels : class or object of each image of the gallery (default: the labels of the features)
    ignore : optional truth values (n, m): images that neither count for a query nor against it (junk)
    cutoffs : the values of k of the recall
    neighbours : votes of the k-NN, fewer where the gallery is smaller

    Returns
    -------
    ImageRetrieval

    Raises
    ------
    ClipworksError
        If sizes do not fit, a value is not finite, or no query has a relevant image.

    Inputs
    ------
    vectors with labels; nothing is fitted

    Relations
    ---------
    With as many labels as images of which pairs share one, recall@k is that of pairs. `heads/knn` is the classifier.

    References
    ----------
    Schall et al. 2024, Optimizing CLIP Models for Image Retrieval with Maintained Joint-Embedding Alignment

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.0, 1.0]])
    >>> found = image_retrieval(x, np.array([0, 1, 0, 1]), cutoffs=(1, 2))
    >>> round(found.mean_average_precision, 3), found.recall
    (0.458, {1: 0.0, 2: 0.75})
    """
    rows = as_vectors("queries", queries, least=1)
    owners = _labels("labels", labels, queries, len(rows))
    itself = gallery is None
    stock = rows if itself else as_vectors("gallery", gallery, rows.shape[1], least=1)
    members = owners if itself else _labels("gallery_labels", gallery_labels, gallery, len(stock))
    ks = [int(check_range("cutoffs", k, 1)) for k in cutoffs]
    check_range("neighbours", neighbours, 1)
    if ignore is not None and np.shape(ignore) != (len(rows), len(stock)):
        raise ClipworksError(f"ignore must have shape {(len(rows), len(stock))}. Got {np.shape(ignore)}.")
    names, codes = np.unique(np.concatenate([owners, members]), return_inverse=True)
    own, of = codes[: len(rows)], codes[len(rows) :]
    precision, before, voted = np.full(len(rows), np.nan), np.zeros(len(rows), int), np.zeros(len(rows), int)
    for part, score in _scores(rows, stock, itself, ignore):
        order = np.argsort(-score, axis=1, kind="stable")
        score = np.take_along_axis(score, order, 1)
        relevant = (of[order] == own[part, None]) & (score > -np.inf)
        precision[part], before[part] = _places(score, relevant)
        voted[part] = _vote(score[:, :neighbours], of[order[:, :neighbours]], len(names))
    answered = ~np.isnan(precision)
    if not answered.any():
        raise ClipworksError("labels must leave some query a relevant image in the gallery. None has one.")
    recall = {k: float(np.mean(before[answered] < k)) for k in ks}
    knn = float(np.mean(voted[answered] == own[answered]))
    return ImageRetrieval(float(precision[answered].mean()), recall, knn, precision, int((~answered).sum()))


def _labels(argument: str, given: Any, vectors: Any, count: int) -> np.ndarray:
    given = vectors.labels if given is None and isinstance(vectors, Features) else given
    if given is None:
        raise ClipworksError(f"{argument} must hold one label per vector ({count}). Got None.")
    found = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
    if found.shape != (count,):
        raise ClipworksError(f"{argument} must hold one label per vector ({count}). Got shape {found.shape}.")
    return found


def _scores(
    rows: np.ndarray, stock: np.ndarray, itself: bool, ignore: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cosines of some queries at a time, -inf for the query itself and for what is ignored."""
    size = max(1, CELLS // len(stock))
    for start in range(0, len(rows), size):
        part = np.arange(start, min(start + size, len(rows)))
        score = rows[part] @ stock.T
        if itself:
            score[np.arange(len(part)), part] = -np.inf
        if ignore is not None:
            score[np.asarray(ignore)[part].astype(bool)] = -np.inf
        yield part, score


def _places(score: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision of sorted rows (NaN where nothing is relevant), and how many others come before the first."""
    width = score.shape[1]
    last = np.full(score.shape, width - 1)
    last[:, :-1] = np.where(score[:, 1:] != score[:, :-1], np.arange(width - 1), width)
    end = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]  # the last place that has the same score
    reached = np.take_along_axis(relevant.cumsum(1), end, 1)
    count = relevant.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = (relevant * reached / (end + 1)).sum(1) / count
    first = relevant.argmax(1)[:, None]
    before = np.take_along_axis(end + 1 - reached, first, 1)[:, 0]
    return np.where(count > 0, precision, np.nan), before


def _vote(score: np.ndarray, classes: np.ndarray, count: int) -> np.ndarray:
    """The class with most votes, among equals the one whose voters are nearer."""
    votes = np.zeros((len(score), count))
    usable = score > -np.inf
    weight = usable * (1 + 1e-6 * np.where(usable, score, 0))
    np.add.at(votes, (np.arange(len(score))[:, None], classes), weight)
    return votes.argmax(1)
