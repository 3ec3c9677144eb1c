"""What the methods of this area share: close pairs, groups, how good groups are, strings, mean average precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ClipworksError, check_range
from ..zeroshot.sentences import as_vectors

CELLS = 1 << 22  # similarities computed at a time
ROUNDING = 1e-9  # of a cosine distance in double precision: what is equal is at distance 0


def exact_rows(name: str, rows: object, dim: int | None = None, least: int = 1) -> np.ndarray:
    """Unit rows in double precision, so that equal vectors are at distance 0 to rounding."""
    found = as_vectors(name, rows, dim, least).astype(np.float64)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def close_pairs(rows: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Places i < j of all pairs of unit rows whose cosine distance is at most `threshold`, computed in blocks."""
    height = max(1, CELLS // max(1, len(rows)))
    first, second = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, len(rows), height):
        near = 1 - rows[start : start + height] @ rows[start:].T <= threshold + ROUNDING
        i, j = np.nonzero(near)
        kept = i < j
        first.append(i[kept] + start)
        second.append(j[kept] + start)
    return np.concatenate(first), np.concatenate(second)


def components(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Number of the connected component of each of `count` nodes, components in the order of their first node."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(first), np.int8), (first, second)), shape=(count, count))
    return in_order(connected_components(graph, directed=False)[1])


def in_order(labels: np.ndarray) -> np.ndarray:
    """Group numbers 0, 1 ... in the order in which the groups first occur.

    >>> in_order(np.array([7, 7, 2, 7])).tolist()
    [0, 0, 1, 0]
    """
    _, first, numbers = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[numbers.reshape(-1)]


def group_scores(truth: Sequence, found: Sequence) -> dict[str, float]:
    """How well groups agree with the true ones: pairs found and missed, and indices over whole partitions.

    Parameters
    ----------
    truth, found : group of each record; records that are alone in their group count in all indices

    Returns
    -------
    `precision`, `recall`, `f1` over pairs of one group; `rand`, `ari` (adjusted Rand), `nmi`, `ami` (mutual
    information, normalised and adjusted)
    """
    from sklearn import metrics

    if np.shape(truth) != np.shape(found) or np.ndim(truth) != 1 or not len(truth):
        raise ClipworksError(f"truth and found must hold one group per record. Got shapes {np.shape(truth)} and "
                             f"{np.shape(found)}.")  # fmt: skip
    (_, wrong), (missed, right) = metrics.cluster.pair_confusion_matrix(truth, found) / 2
    precision, recall = (right / n if n else 1.0 for n in (right + wrong, right + missed))
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(2 * right / (2 * right + wrong + missed)) if right + wrong + missed else 1.0,
        "rand": float(metrics.rand_score(truth, found)),
        "ari": float(metrics.adjusted_rand_score(truth, found)),
        "nmi": float(metrics.normalized_mutual_info_score(truth, found)),
        "ami": float(metrics.adjusted_mutual_info_score(truth, found)),
    }


def ngram_jaccard(texts: Sequence[str], n: int = 3) -> np.ndarray:
    """Jaccard index (N, N) of the sets of character n-grams, the baseline that sees the surface alone.

    A text shorter than n has no n-gram, and an index of 0 with all texts, itself included.
    """
    check_range("n", n, 1)
    ids: dict[str, int] = {}
    rows, columns = [], []
    for i, text in enumerate(texts):
        for gram in {text[j : j + n] for j in range(len(text) - n + 1)}:
            rows.append(i)
            columns.append(ids.setdefault(gram, len(ids)))
    from scipy.sparse import csr_matrix

    table = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(texts), max(1, len(ids))))
    shared = (table @ table.T).toarray()
    size = np.asarray(table.sum(1)).reshape(-1)
    whole = size[:, None] + size[None] - shared
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def edit_distance(one: str, other: str, most: int | None = None) -> int:
    """Levenshtein's distance; above `most` it is not computed any further and `most + 1` is returned.

    >>> edit_distance("kitten", "sitting"), edit_distance("kitten", "sitting", most=1)
    (3, 2)
    """
    limit = max(len(one), len(other)) if most is None else most
    if abs(len(one) - len(other)) > limit:
        return limit + 1
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, own in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != own))
        if min(row) > limit:
            return limit + 1
    return min(row[-1], limit + 1)


def average_precision_at_r(scores: np.ndarray, relevant: np.ndarray, itself: bool = False) -> np.ndarray:
    """Average precision within the first R hits of every query, R being the number of its relevant items (mAP@R).

    Parameters
    ----------
    scores : (q, n), higher is better; -inf takes an item out, such as the query itself
    relevant : truth values (q, n)
    itself : count the items that are taken out as relevant ones, as the released code of Cross the Gap does: R is then
        one too large wherever a query stands in its own gallery

    Returns
    -------
    (q,), NaN for queries without a relevant item
    """
    scores, relevant = np.asarray(scores, np.float64), np.asarray(relevant, bool)
    if scores.shape != relevant.shape or scores.ndim != 2:
        raise ClipworksError(f"relevant must have the shape of scores, {scores.shape}. Got {relevant.shape}.")
    usable = relevant & (scores > -np.inf)
    total = (relevant if itself else usable).sum(1)
    order = np.argsort(-scores, axis=1, kind="stable")
    hit = np.take_along_axis(usable, order, 1)
    inside = np.arange(scores.shape[1]) < total[:, None]
    precision = hit.cumsum(1) / np.arange(1, scores.shape[1] + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (precision * hit * inside).sum(1) / total
