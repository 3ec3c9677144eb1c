"""Query expansion: what a query finds first is added to it, and the search is done once more.

    q' = unit( unit(q) + sum_i (s_i / s_1)^a unit(v_i) ),     s_1 >= s_2 >= ... the scores of the first hits v_i

a = 0 is average query expansion (Chum et al. 2007, Total Recall), a = 3 weighs the hits by how sure they are (Radenovic
et al. 2019, Fine-tuning CNN Image Retrieval with No Human Annotation). For an image that is in the collection s_1 is 1
and the formula is theirs. For words, whose best cosine may be 0.3, dividing by it keeps the power from wiping out all
hits. Hits with a score of 0 or less have no weight. It helps where the first hits are right, and only there.
"""

from __future__ import annotations

import numpy as np

from ..errors import ClipworksError, check_range
from .queries import compose, unit

POWER = 3.0


def expand_query(query: np.ndarray, hits: np.ndarray, scores: np.ndarray, power: float = POWER) -> np.ndarray:
    """Return the query moved towards what it found.

    Parameters
    ----------
    query : vector (dim,)
    hits : vectors (n, dim) of the first hits
    scores : their cosines with the query, shape (n,)
    power : a of the formula; 0 takes all hits alike

    Returns
    -------
    float32 (dim,), length one; the query itself where nothing was found

    Examples
    --------
    >>> found = expand_query(np.array([1.0, 0.0]), np.array([[0.6, 0.8]]), np.array([0.6]))
    >>> [round(float(value), 3) for value in found]
    [0.894, 0.447]
    """
    check_range("power", power, 0.0)
    scores = np.asarray(scores, np.float64)
    if len(scores) != len(hits):
        raise ClipworksError(f"scores must have one number per hit ({len(hits)}). Got {len(scores)}.")
    query = np.asarray(query, np.float64)
    sure = scores > 0
    if not sure.any():
        return compose(unit(query[None]), [1.0])
    weights = (scores[sure] / scores[sure].max()) ** power
    rows = unit(np.concatenate([query[None], np.asarray(hits, np.float64)[sure]]))
    return compose(rows, [1.0, *weights])
