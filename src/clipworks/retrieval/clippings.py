"""CLIPPINGS: records of an image and a text that mean the same thing, linked by the mean of both vectors.

Claim: image and text together link better than either alone, with and without labels (newspaper photos with captions,
ARI: self-supervised 40.7 image, 31.0 text, 43.0 both; supervised 59.7, 38.9, 61.5; string Jaccard 40.3).

Formula: z = unit( w u + (1 - w) v ), u and v the unit vectors of image and text;  two records are linked if
1 - z_i . z_j <= eps, and groups are what links connect (single linkage). eps and w maximise the adjusted Rand index on
labelled records of other groups.

Paper: Arora, Yang, Jung and Dell 2023, Linking Representations with Multimodal Contrastive Learning.
Differs from the paper: average linkage is offered beside single, which chains. The training of both stages is
`link_training.train_linker`, its loss `losses/supcon`.
Defaults: w = 0.5 is that of training. eps has to be tuned: published ones are 0.13 (w = 0.636) without labels and 0.227
(w = 0.76) with them, for encoders trained on such records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ClipworksError, check_choice, check_range
from ..registry import method
from .common import ROUNDING, close_pairs, components, exact_rows, in_order

LINKAGES = ("single", "average")
WEIGHTS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # the paper searches [0.4, 1]; 0 is the text alone


@method(card="clippings", level="M")
def link_records(
    image: Any, text: Any = None, *, weight: float = 0.5, threshold: float = 0.13, linkage: str = "single"
) -> np.ndarray:
    """Put records into groups.

    Parameters
    ----------
    image : vectors of the images, shape (n, dim), or `Features`
    text : vectors of their texts, shape (n, dim); None for records that are images alone
    weight : w of the formula: 1 is the image alone, 0 the text alone
    threshold : eps, the largest cosine distance of a link; see `tune_links`
    linkage : "single" (a record belongs to a group if it is near any of it) or "average" (near the whole of it)

    Returns
    -------
    int64 (n,): number of each record's group, in the order in which the groups first occur

    Raises
    ------
    ClipworksError
        If shapes do not fit, a value is not finite, or an argument is out of range.

    Inputs
    ------
    features of records; nothing is fitted

    Relations
    ---------
    With single linkage it is DBSCAN with min_samples=1 and the cosine. `retrieval/headlines` cuts groups that chain;
    `clipworks dedupe` is this for the images of a collection.

    References
    ----------
    Arora, Yang, Jung and Dell 2023, Linking Representations with Multimodal Contrastive Learning

    Examples
    --------
    >>> image = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.7]])
    >>> text = np.array([[1.0, 0.0], [1.0, 0.1], [0.1, 1.0], [0.0, 1.0]])
    >>> link_records(image, text).tolist(), link_records(image, text, weight=0.0).tolist()
    ([0, 0, 1, 1], [0, 0, 1, 1])
    """
    check_choice("linkage", linkage, LINKAGES)
    check_range("threshold", threshold, 0.0, 2.0)
    rows = record_vectors(image, text, weight)
    if linkage == "single":
        return components(len(rows), *close_pairs(rows, threshold))
    return cut(tree(rows, linkage), threshold)


def record_vectors(image: Any, text: Any = None, weight: float = 0.5) -> np.ndarray:
    """Vectors of records: the weighted mean of the unit vectors of image and text, brought to length one.

    Parameters
    ----------
    image, text, weight : as in `link_records`
    """
    check_range("weight", weight, 0.0, 1.0)
    u = exact_rows("image", image)
    if text is None:
        return u
    v = exact_rows("text", text, u.shape[1])
    if len(v) != len(u):
        raise ClipworksError(f"text must hold one vector per image ({len(u)}). Got {len(v)}.")
    return exact_rows("image and text", weight * u + (1 - weight) * v)


@dataclass
class Tuned:
    """Settings of `link_records` that suit labelled records best.

    Attributes
    ----------
    weight, threshold : the best
    ari : the adjusted Rand index that they reach on the records they were chosen on
    grid : weight -> (best threshold, its index)
    """

    weight: float
    threshold: float
    ari: float
    grid: dict[float, tuple[float, float]]


def tune_links(
    image: Any,
    text: Any,
    labels: Sequence,
    *,
    weights: Sequence[float] = WEIGHTS,
    thresholds: Sequence[float] | None = None,
    linkage: str = "single",
) -> Tuned:
    """Choose weight and threshold by the adjusted Rand index on labelled records.

    Parameters
    ----------
    image, text, linkage : as in `link_records`
    labels : group of each record; none of these groups may occur in what is linked later
    weights, thresholds : tried (default: nine weights, 199 thresholds from 0.005 to 0.995)
    """
    from sklearn.metrics import adjusted_rand_score

    check_choice("linkage", linkage, LINKAGES)
    tried = np.linspace(0.005, 0.995, 199) if thresholds is None else np.asarray(thresholds, float)
    grid: dict[float, tuple[float, float]] = {}
    for weight in weights if text is not None else [1.0]:
        rows = record_vectors(image, text, weight)
        if len(labels) != len(rows) or len(rows) < 2:
            raise ClipworksError(f"labels must name the groups of {len(rows)} records, two at least. "
                                 f"Got {len(labels)}.")  # fmt: skip
        joined = tree(rows, linkage)
        known: dict[int, float] = {}  # cuts of a tree into as many groups are the same
        indices = []
        for eps in tried:
            groups = cut(joined, eps)
            count = int(groups.max())
            if count not in known:
                known[count] = float(adjusted_rand_score(labels, groups))
            indices.append(known[count])
        top = np.flatnonzero(np.isclose(indices, max(indices)))
        best = int(top[len(top) // 2])  # in the middle of equal ones: the farthest from a worse threshold
        grid[float(weight)] = float(tried[best]), float(indices[best])
    chosen = max(grid, key=lambda weight: grid[weight][1])
    return Tuned(chosen, *grid[chosen], grid)


def link_to(image: Any, text: Any, exemplars: Any, *, weight: float = 0.5, threshold: float = 0.13) -> np.ndarray:
    """The nearest exemplar of each record, or -1 where none is nearer than the threshold.

    Parameters
    ----------
    image, text, weight : as in `link_records`
    exemplars : vectors of the reference list, shape (m, dim), made by `record_vectors`
    threshold : cosine distance below which a record is linked
    """
    rows = record_vectors(image, text, weight)
    score = rows @ exact_rows("exemplars", exemplars, rows.shape[1]).T
    return np.where(1 - score.max(1) < threshold, score.argmax(1), -1)


def hard_batches(
    vectors: Any, labels: Sequence, *, views: int = 3, near: int = 3, batch_size: int = 126, seed: int = 0
) -> Iterator[np.ndarray]:
    """Batches for supervised training: classes beside those they are most easily taken for.

    Parameters
    ----------
    vectors : of the records, as they are now, shape (n, dim)
    labels : class of each record
    views : records of a class in a batch; of a smaller class some come twice (m: 3)
    near : classes put together, one and its nearest others (k: 3)
    batch_size : records of a batch at most, a multiple of views * near
    seed : of the order and of the records that are drawn

    Yields
    ------
    int64 (b,): records; each class is exactly `views` times in a batch, and in one of them with its nearest
    """
    rows = exact_rows("vectors", vectors)
    names, classes = np.unique(np.asarray(labels), return_inverse=True)
    if len(classes) != len(rows):
        raise ClipworksError(f"labels must name the classes of {len(rows)} records. Got {len(classes)}.")
    if batch_size < views * near or batch_size % (views * near):
        raise ClipworksError(f"batch_size must be a multiple of views * near, {views * near}. Got {batch_size}.")
    centres = np.zeros((len(names), rows.shape[1]))
    np.add.at(centres, classes, rows)
    centres = exact_rows("vectors", centres)
    score = centres @ centres.T
    np.fill_diagonal(score, np.inf)
    groups = np.argsort(-score, axis=1, kind="stable")[:, :near]
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(classes == c) for c in range(len(names))]
    filled: list[int] = []
    for anchor in rng.permutation(len(names)):
        new = [c for c in groups[anchor] if c not in filled]
        if len(filled) + len(new) > batch_size // views:
            yield np.concatenate([_draw(members[c], views, rng) for c in filled])
            filled, new = [], list(groups[anchor])
        filled += new
    yield np.concatenate([_draw(members[c], views, rng) for c in filled])


def tree(rows: np.ndarray, linkage: str) -> np.ndarray:
    """The merges of hierarchical clustering by cosine distance (scipy's form)."""
    from scipy.cluster.hierarchy import linkage as merges

    if len(rows) < 2:
        return np.empty((0, 4))
    distance = np.maximum(1 - rows @ rows.T, 0.0)
    return merges(distance[np.triu_indices(len(rows), 1)], linkage)


def cut(merges: np.ndarray, threshold: float) -> np.ndarray:
    """Groups of a tree of merges, of records that are joined at the threshold or below."""
    from scipy.cluster.hierarchy import fcluster

    return in_order(fcluster(merges, threshold + ROUNDING, "distance")) if len(merges) else np.zeros(1, np.int64)


def _draw(members: np.ndarray, views: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(members, views, replace=len(members) < views)
