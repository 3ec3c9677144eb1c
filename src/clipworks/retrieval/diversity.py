"""Diversity: hits that are relevant and unlike each other, by maximal marginal relevance.

    next = argmax over the rest of  (1 - d) rel_i - d max over the chosen j of  sim_ij

Carbonell and Goldstein 1998, The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing Summaries
(SIGIR). The cosines of images with words lie in a narrow band far below those of images with each other, so both are
first stretched over the candidates to [0, 1]; otherwise any d would mean diversity alone.
"""

from __future__ import annotations

import numpy as np

from ..errors import ClipworksError, check_range
from ..zeroshot.sentences import as_vectors


def diverse_order(vectors: np.ndarray, scores: np.ndarray, k: int, diversity: float = 0.5) -> np.ndarray:
    """Choose k of n candidates one by one.

    Parameters
    ----------
    vectors : of the candidates, shape (n, dim)
    scores : relevance of each, shape (n,)
    k : how many are chosen, n at most
    diversity : d of the formula, from 0 (by relevance alone) to 1 (by difference alone, but for the first)

    Returns
    -------
    int64 (min(k, n),): places of the chosen, in the order in which they were chosen

    Examples
    --------
    >>> twins = np.array([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    >>> diverse_order(twins, np.array([0.9, 0.89, 0.5]), 2).tolist()
    [0, 2]
    """
    check_range("k", k, 1)
    check_range("diversity", diversity, 0.0, 1.0)
    rows, relevance = as_vectors("vectors", vectors), np.asarray(scores, np.float64)
    if relevance.shape != (len(rows),):
        raise ClipworksError(f"scores must have one number per vector ({len(rows)}). Got shape {relevance.shape}.")
    if not len(rows):
        return np.empty(0, np.int64)
    likeness = _stretched(rows @ rows.T, ~np.eye(len(rows), dtype=bool))
    relevance = _stretched(relevance, np.ones(len(rows), bool))
    chosen = [int(relevance.argmax())]
    nearest = likeness[chosen[0]].copy()
    open_ = np.ones(len(rows), bool)
    open_[chosen] = False
    while len(chosen) < min(k, len(rows)):
        gain = np.where(open_, (1 - diversity) * relevance - diversity * nearest, -np.inf)
        best = int(gain.argmax())
        chosen.append(best)
        open_[best] = False
        nearest = np.maximum(nearest, likeness[best])
    return np.array(chosen, np.int64)


def _stretched(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Values moved and scaled so that those counted reach from 0 to 1; all 0 where they are equal."""
    some = values[counted]
    low, high = (some.min(), some.max()) if len(some) else (0.0, 0.0)
    return (values - low) / (high - low) if high > low else np.zeros_like(values, np.float64)
