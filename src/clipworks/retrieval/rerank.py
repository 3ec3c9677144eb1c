"""A second look at rankings: neighbours that find each other (k-reciprocal), and the fusion of several rankings.

K-reciprocal re-ranking (Zhong et al. 2017, Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR): two
vectors are alike if the same others are near both of them, and near means that each is among the k1 nearest of the
other. Sets of such neighbours, weighted by exp(-distance) and averaged over the k2 nearest, are compared by Jaccard's
distance:

    d = lambda (1 - cos) + (1 - lambda) (1 - sum_j min(V_ij, V_qj) / sum_j max(V_ij, V_qj))

Reciprocal rank fusion (Cormack, Clarke and Buettcher 2009, SIGIR): score(i) = sum over rankings of 1 / (k + rank_i). It
needs no comparable scores, so that words and an image, or two encoders, can vote on the same collection.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ClipworksError, check_range
from ..types import Ranking
from ..zeroshot.sentences import as_vectors


def fuse(rankings: Sequence[Ranking], k: float = 60.0, weights: Sequence[float] | None = None) -> Ranking:
    """Return one ranking of all keys, by reciprocal rank fusion.

    Parameters
    ----------
    rankings : answers of searches; a key that one does not hold gets nothing from it
    k : how little the first places count above the later ones (60: the paper)
    weights : of the rankings (default 1 each)

    Examples
    --------
    >>> one, two = Ranking(["a", "b"], np.array([0.3, 0.2])), Ranking(["b", "c"], np.array([9.0, 8.0]))
    >>> fuse([one, two]).keys
    ['b', 'a', 'c']
    """
    check_range("k", k, 0.0)
    given = [1.0] * len(rankings) if weights is None else [float(w) for w in weights]
    if len(given) != len(rankings):
        raise ClipworksError(f"weights must have one number per ranking ({len(rankings)}). Got {len(given)}.")
    total: dict[str, float] = {}
    columns: dict[str, dict] = {}
    for weight, ranking in zip(given, rankings, strict=True):
        for place, key in enumerate(ranking.keys, 1):
            total[key] = total.get(key, 0.0) + weight / (k + place)
        columns |= dict(zip(ranking.keys, ranking.columns, strict=False))
    keys = sorted(total, key=lambda key: -total[key])  # stable: equal ones stay in the order in which they came
    query = " | ".join(ranking.query for ranking in rankings)
    return Ranking(keys, np.array([total[key] for key in keys]), query, [columns[k] for k in keys] if columns else [])


def reciprocal_distances(
    queries: np.ndarray, gallery: np.ndarray, *, k1: int = 20, k2: int = 6, mix: float = 0.3
) -> np.ndarray:
    """Distances by which a gallery is ordered anew; all pairs are compared, so hand in the first few hundred hits.

    Parameters
    ----------
    queries : vectors (q, dim)
    gallery : vectors (n, dim)
    k1 : neighbours that must find each other (20: the paper)
    k2 : nearest over which the sets are averaged (6: the paper); 1 leaves them as they are
    mix : lambda, the share of the plain distance (0.3: the paper); 1 is the plain order

    Returns
    -------
    (q, n), smaller is better
    """
    check_range("k1", k1, 1)
    check_range("k2", k2, 1, k1)
    check_range("mix", mix, 0.0, 1.0)
    stock = as_vectors("gallery", gallery, least=1)
    asked = as_vectors("queries", queries, stock.shape[1], least=1)
    rows = np.concatenate([asked, stock]).astype(np.float64)
    plain = np.maximum(1 - rows @ rows.T, 0.0)
    encoded = _encode(plain, k1, k2)
    one, other = encoded[: len(asked)], encoded[len(asked) :]
    jaccard = np.empty((len(asked), len(stock)))
    for i, row in enumerate(one):
        shared = np.minimum(row, other).sum(1)
        jaccard[i] = 1 - shared / (row.sum() + other.sum(1) - shared)  # min + max is the sum of both
    return mix * plain[: len(asked), len(asked) :] + (1 - mix) * jaccard


def _encode(distance: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """Weights (n, n) of the expanded reciprocal neighbours of every row; each row sums to 1."""
    np.fill_diagonal(distance, -1.0)  # a row is its own nearest neighbour, twins or not
    order = np.argsort(distance, axis=1, kind="stable")
    np.fill_diagonal(distance, 0.0)
    wide, narrow = _reciprocal(order, k1), _reciprocal(order, max(1, round(k1 / 2)))
    encoded = np.zeros_like(distance)
    for i, near in enumerate(wide):
        members = near.copy()
        for j in np.flatnonzero(near):
            if (narrow[j] & near).sum() > 2 / 3 * narrow[j].sum():
                members |= narrow[j]
        encoded[i, members] = np.exp(-distance[i, members])
        encoded[i] /= encoded[i].sum()
    return encoded if k2 == 1 else encoded[order[:, :k2]].mean(1)


def _reciprocal(order: np.ndarray, k: int) -> np.ndarray:
    """Whether i and j are among the k nearest of each other, themselves not counted; (n, n)."""
    near = np.zeros(order.shape, bool)
    np.put_along_axis(near, order[:, : k + 1], True, 1)
    return near & near.T
