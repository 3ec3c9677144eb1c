"""HEADLINES: texts that were written about the same article, mined from reprints without any annotation.

Claim: newspapers reprinted an article under headlines of their own, so headlines of near-duplicate bodies are
paraphrases: 396 million pairs from 70 years. Vectors find reprints that share few words, where n-grams fail (NEWS-COPY,
ARI: hashing 73.7, 15-grams 75.0, bi-encoder 91.5, re-ranked 93.7).

Formula: link documents i, j that are k-nearest neighbours, dated within a window, with cos >= 0.94 (or >= 0.92 if a
re-ranker agrees);  groups = Louvain communities (modularity, resolution 1) of each connected component;  pairs = all
pairs of unlike headlines of a group.

Paper: Silcock and Dell 2023, A Massive Scale Semantic Similarity Dataset of Historical English (NeurIPS).
Differs from the paper: layout, recognition of letters and the training of the body encoder are left out; its loss is
`losses/online_contrastive`. Vectors may come from any encoder. The window (30 days), the edit distance below which two
headlines are the same (a tenth of the longer) and the fewest words are proposals, the paper's are not known.
Defaults: 900 neighbours, cosine 0.94 and 0.92, resolution 1 from the companion code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ClipworksError, check_choice, check_range
from ..registry import method
from ..store.exact import top_k
from ..zeroshot.sentences import as_vectors
from .common import components, edit_distance, in_order

COMMUNITIES = ("louvain", "components")


@dataclass
class Reprints:
    """Documents in groups, and the headlines of each.

    Attributes
    ----------
    groups : number of each document's group, in the order in which they first occur
    edges : links that were found, int64 (e, 2), each pair once, i < j
    """

    groups: np.ndarray
    edges: np.ndarray

    def members(self) -> list[np.ndarray]:
        """Documents of every group of two and more."""
        order = np.argsort(self.groups, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(self.groups))[:-1]) if len(order) else []
        return [part for part in parts if len(part) > 1]

    def pairs(
        self,
        headlines: Sequence[str] | None = None,
        *,
        same: float = 0.1,
        least: int = 3,
        unrelated: int = 3,
    ) -> Iterator[tuple[int, int]]:
        """Pairs of documents of a group, made as they are read: all pairs, or those of unlike headlines.

        Parameters
        ----------
        headlines : of every document; None gives all pairs
        same : share of the longer headline by which two may differ and still be the same one, misread
        least : words that a headline must have
        unrelated : a headline that stands in as many groups says nothing ("weather") and is left out
        """
        if headlines is not None and len(headlines) != len(self.groups):
            raise ClipworksError(f"headlines must hold one text per document ({len(self.groups)}). "
                                 f"Got {len(headlines)}.")  # fmt: skip
        titles = None if headlines is None else [" ".join(title.lower().split()) for title in headlines]
        common: Counter[str] = Counter()
        if titles is not None:
            common.update(title for title, _ in set(zip(titles, self.groups.tolist(), strict=True)))
        for group in self.members():
            members = group.tolist()
            if titles is not None:
                members = [i for i in members if len(titles[i].split()) >= least and common[titles[i]] < unrelated]
            for a, i in enumerate(members):
                for j in members[a + 1 :]:
                    if titles is None or not _alike(titles[i], titles[j], same):
                        yield i, j


@method(card="headlines", level="M")
def reprints(
    vectors: Any,
    dates: Any = None,
    *,
    neighbours: int = 900,
    threshold: float = 0.94,
    agree: Callable[[int, int], bool] | None = None,
    lower: float = 0.92,
    window: float = 30.0,
    communities: str = "louvain",
    resolution: float = 1.0,
    seed: int = 0,
) -> Reprints:
    """Find documents that are copies of each other.

    Parameters
    ----------
    vectors : of the documents, shape (n, dim), or `Features`
    dates : day of each document, numbers or `datetime64`; None compares all
    neighbours : of each document that are looked at, the largest group that can be found whole
    threshold : least cosine of a link
    agree : second look at two documents (a cross-encoder); asked between `lower` and `threshold`
    lower : least cosine of a link that `agree` confirms
    window : days that may lie between two copies
    communities : "louvain" cuts groups that hang together by few links, "components" keeps them
    resolution : of the modularity; higher gives smaller groups
    seed : of Louvain's order

    Returns
    -------
    Reprints

    Raises
    ------
    ClipworksError
        If sizes do not fit, a value is not finite, or an argument is out of range.

    Inputs
    ------
    features of texts or images; nothing is fitted

    Relations
    ---------
    With communities="components" and as many neighbours as documents it is `retrieval/clippings` with single linkage.
    `losses/online_contrastive` trains the encoder; `losses/supcon` or `losses/infonce` learn from the pairs.

    References
    ----------
    Silcock and Dell 2023, A Massive Scale Semantic Similarity Dataset of Historical English

    Examples
    --------
    >>> bodies = np.array([[1.0, 0.0], [0.99, 0.05], [0.0, 1.0], [0.05, 0.99]])
    >>> found = reprints(bodies)
    >>> found.groups.tolist(), list(found.pairs())
    ([0, 0, 1, 1], [(0, 1), (2, 3)])
    """
    check_choice("communities", communities, COMMUNITIES)
    check_range("neighbours", neighbours, 1)
    check_range("threshold", threshold, -1.0, 1.0)
    check_range("window", window, 0.0)
    rows = as_vectors("vectors", vectors, least=1)
    days = None if dates is None else _days(dates, len(rows))
    edges = _edges(rows, days, neighbours, threshold, agree, min(lower, threshold), window)
    groups = components(len(rows), *edges.T)
    if communities == "louvain" and len(edges):
        groups = _louvain(groups, edges, resolution, seed)
    return Reprints(groups, edges)


def _edges(
    rows: np.ndarray,
    days: np.ndarray | None,
    neighbours: int,
    threshold: float,
    agree: Callable[[int, int], bool] | None,
    lower: float,
    window: float,
) -> np.ndarray:
    least = threshold if agree is None else lower
    scores, found = top_k(rows, rows, neighbours + 1)
    kept = (scores >= least) & (found != np.arange(len(rows))[:, None])
    if days is not None:
        kept &= np.abs(days[found] - days[:, None]) <= window
    first, place = np.nonzero(kept)
    second, score = found[first, place], scores[first, place]
    pairs, at = np.unique(np.sort(np.stack([first, second], 1), axis=1), axis=0, return_index=True)
    if agree is not None:
        sure = np.array([s >= threshold or agree(int(i), int(j)) for (i, j), s in zip(pairs, score[at], strict=True)])
        pairs = pairs[sure] if len(pairs) else pairs
    return pairs.reshape(-1, 2).astype(np.int64)


def _louvain(groups: np.ndarray, edges: np.ndarray, resolution: float, seed: int) -> np.ndarray:
    """Communities of every component of three and more nodes."""
    import networkx

    labels = groups.astype(np.int64) * (len(groups) + 1)
    owner = groups[edges[:, 0]]
    order = np.argsort(owner, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1):
        graph = networkx.Graph()
        graph.add_edges_from(edges[part].tolist())
        found = networkx.community.louvain_communities(graph, weight=None, resolution=resolution, seed=seed)
        for number, members in enumerate(found):
            labels[list(members)] += number
    return in_order(labels)


def _days(dates: Any, count: int) -> np.ndarray:
    found = np.asarray(dates)
    if found.dtype.kind in "MUO":
        try:
            found = found.astype("datetime64[h]").astype(np.int64) / 24
        except (ValueError, TypeError) as error:
            raise ClipworksError(f"dates must be days, numbers or dates as in 1935-03-02. Got {error}.") from None
    found = found.astype(np.float64)
    if found.shape != (count,) or not np.isfinite(found).all():
        raise ClipworksError(f"dates must hold one day per vector ({count}). Got shape {found.shape}.")
    return found


def _alike(one: str, other: str, share: float) -> bool:
    """Whether two headlines are the same but for some misread letters."""
    most = int(share * max(len(one), len(other)))
    return one == other or edit_distance(one, other, most) <= most
