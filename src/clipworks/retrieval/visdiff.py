"""VisDiff: what is truer of one set of images than of another, as phrases ranked by how well they separate the sets.

Claim: phrases that a language model proposes from captions, checked by CLIP on all images and ranked by how well they
separate the two sets, name differences that people confirm; they are harder to find the subtler they are.

Formula: a_i = cos(v_i, t), b_j = cos(w_j, t) for a phrase t;  AUROC(t) = P(a > b) + P(a = b) / 2, descending;  p by
Welch's t-test, brought to q by Benjamini and Hochberg's procedure over all phrases;  "delta" = share of a above 0.3
minus share of b above 0.3.

Paper: Dunlap, Zhang, Wang et al. 2024, Describing Differences in Image Sets with Natural Language (CVPR).
Differs from the paper: p-values are corrected for the number of phrases; phrases come from a list, from a vocabulary by
their cosine with mean(A) - mean(B) (`propose`), or from a language model that reads captions (`proposed_by`); they can
be proposed on one part of the images and ranked on the rest. Other rankers and the judge that scores against a known
truth are not here, but for the judge's two figures (`judged`).
Defaults: level 0.05, threshold 0.3, 5,000 images of a set, seed 0 from the released configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ClipworksError, check_range
from ..registry import method
from ..zeroshot.sentences import as_vectors

QUESTION = (
    "Two sets of images are told apart. Captions of set A:\n{a}\n\nCaptions of set B:\n{b}\n\nName up to {n} short "
    "visual concepts (at most five words each) that are more often in set A than in set B. Answer with a JSON list of "
    "strings alone."
)
UNSURE = re.compile(r"\b(no|not|without|never|\d+|two|three|four|five|several|left|right|more|fewer)\b", re.I)


@dataclass
class Differences:
    """Phrases, what separates the sets best first.

    Attributes
    ----------
    phrases : n phrases
    auroc : 0.5 is no difference, below it the phrase is truer of the second set; shape (n,)
    difference : mean cosine of the first set minus that of the second
    delta : share of the first set above the threshold minus that of the second
    p, q : Welch's p-value, and corrected for the number of phrases
    significant : whether q is below the level
    unsure : whether the phrase counts, negates or relates, which CLIP cannot be trusted with
    """

    phrases: list[str]
    auroc: np.ndarray
    difference: np.ndarray
    delta: np.ndarray
    p: np.ndarray
    q: np.ndarray
    significant: np.ndarray
    unsure: np.ndarray

    def __len__(self) -> int:
        return len(self.phrases)

    def as_rows(self, top: int | None = 5, significant: bool = True) -> list[dict[str, Any]]:
        """One dictionary per phrase, the `top` best that are truer of the first set (None: all phrases)."""
        kept = range(len(self))
        if top is not None:
            kept = [i for i in kept if self.auroc[i] > 0.5 and (self.significant[i] or not significant)]  # type: ignore
        return [
            {"phrase": self.phrases[i], "auroc": round(float(self.auroc[i]), 4),
             "difference": round(float(self.difference[i]), 4), "q": float(f"{self.q[i]:.2g}"),
             "unsure": bool(self.unsure[i])}
            for i in kept[:top]
        ]  # fmt: skip


@method(card="visdiff", level="M")
def visdiff(
    first: Any,
    second: Any,
    phrases: Sequence[str],
    text: Any,
    *,
    level: float = 0.05,
    threshold: float = 0.3,
    most: int = 5000,
    seed: int = 0,
) -> Differences:
    """Rank phrases by how much truer they are of the first set of images than of the second.

    Parameters
    ----------
    first, second : vectors of the images of either set, shapes (a, dim) and (b, dim), or `Features`
    phrases : distinct phrases
    text : their vectors, shape (n, dim); the paper puts no template around a phrase
    level : of significance, after correction
    threshold : cosine above which an image is said to show the phrase, for `delta` alone
    most : images of each set that are used; where there are more, a sample is drawn
    seed : of that sample

    Returns
    -------
    Differences, by descending AUROC

    Raises
    ------
    ClipworksError
        If sizes do not fit, a set is empty, a phrase occurs twice, or a value is not finite.

    Inputs
    ------
    features of two sets of images, and words; nothing is fitted

    Relations
    ---------
    `propose` picks phrases out of a vocabulary, `proposed_by` asks a language model. `retrieval/differ.py` does all of
    it from folders.

    References
    ----------
    Dunlap et al. 2024, Describing Differences in Image Sets with Natural Language

    Examples
    --------
    >>> words = np.eye(3)
    >>> dark, light = np.array([[1.0, 0.2, 0.1], [1.0, 0.1, 0.3]]), np.array([[0.2, 1.0, 0.1], [0.1, 1.0, 0.3]])
    >>> found = visdiff(dark, light, ["at night", "at noon", "a street"], words)
    >>> found.phrases, found.auroc.tolist()
    (['at night', 'a street', 'at noon'], [1.0, 0.5, 0.0])
    """
    check_range("level", level, 0.0, 1.0)
    check_range("most", most, 1)
    names = check_phrases(phrases)
    words = as_vectors("text", text, least=1)
    if len(words) != len(names):
        raise ClipworksError(f"text must hold one vector per phrase ({len(names)}). Got {len(words)}.")
    one = _sample(as_vectors("first", first, words.shape[1], least=1), most, seed)
    other = _sample(as_vectors("second", second, words.shape[1], least=1), most, seed)
    # in double precision, so that equal images score alike whatever stands beside them in a block
    a, b = one.astype(np.float64) @ words.T.astype(np.float64), other.astype(np.float64) @ words.T.astype(np.float64)
    area = np.array([auroc(a[:, i], b[:, i]) for i in range(len(names))])
    p = np.array([welch(a[:, i], b[:, i]) for i in range(len(names))])
    q = benjamini_hochberg(p)
    apart, shown = a.mean(0) - b.mean(0), (a > threshold).mean(0) - (b > threshold).mean(0)
    order = np.lexsort((-apart, -area))
    unsure = np.array([bool(UNSURE.search(name)) for name in names])
    return Differences([names[i] for i in order], area[order], apart[order], shown[order], p[order], q[order],
                       q[order] < level, unsure[order])  # fmt: skip


def auroc(a: np.ndarray, b: np.ndarray) -> float:
    """P(a > b) + P(a = b) / 2 over all pairs, from ranks.

    >>> auroc(np.array([0.2, 0.4]), np.array([0.2, 0.1]))
    0.875
    """
    below = np.sort(b)
    wins = np.searchsorted(below, a, "left").sum() + np.searchsorted(below, a, "right").sum()
    return float(wins / (2 * len(a) * len(b)))


def welch(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of Welch's t-test; 1 where neither set varies, or one has a single image."""
    if min(len(a), len(b)) < 2 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return 1.0
    from scipy.stats import ttest_ind

    return float(ttest_ind(a, b, equal_var=False).pvalue)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """The level at which each p-value would be significant, were false discoveries kept below that share.

    >>> benjamini_hochberg(np.array([0.01, 0.5, 0.02])).round(3).tolist()
    [0.03, 0.5, 0.03]
    """
    order = np.argsort(-p)
    scaled = p[order] * len(p) / np.arange(len(p), 0, -1)
    found = np.empty_like(p)
    found[order] = np.minimum.accumulate(scaled)
    return np.minimum(found, 1.0)


def propose(first: Any, second: Any, text: Any, count: int = 100) -> np.ndarray:
    """Places of the vocabulary's words that point most from the second set to the first, best first."""
    words = as_vectors("text", text, least=1)
    check_range("count", count, 1)
    apart = as_vectors("first", first, words.shape[1], least=1).mean(0)
    apart = apart - as_vectors("second", second, words.shape[1], least=1).mean(0)
    return np.argsort(-(words @ apart), kind="stable")[:count]


def proposed_by(
    model: Callable[[Any], str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    rounds: int = 3,
    captions: int = 20,
    count: int = 10,
    seed: int = 0,
) -> list[str]:
    """Ask a language model what is more often in the images of the first captions.

    Parameters
    ----------
    model : anything called with chat messages, such as `zeroshot.endpoint.Endpoint` or `description_sources.LocalModel`
    first, second : captions of the images of either set
    rounds : questions asked, each about other captions
    captions : of each set that a question shows
    count : phrases asked for at a time
    seed : of the captions drawn

    Returns
    -------
    distinct phrases, in the order in which they came; keep them in a file, models change
    """
    if not first or not second:
        raise ClipworksError(f"first and second must hold captions. Got {len(first)} and {len(second)}.")
    rng, found = np.random.default_rng(seed), []
    for _ in range(int(check_range("rounds", rounds, 1))):
        a, b = (["- " + some[i] for i in rng.permutation(len(some))[:captions]] for some in (first, second))
        question = QUESTION.format(a="\n".join(a), b="\n".join(b), n=count)
        found += parse_phrases(model([{"role": "user", "content": question}]))[:count]
    distinct: dict[str, str] = {}
    for phrase in found:
        distinct.setdefault(phrase.lower(), phrase)
    return list(distinct.values())


def parse_phrases(answer: str) -> list[str]:
    """Phrases of a model's answer: a JSON list, or else lines with or without marks of a list."""
    start, end = answer.find("["), answer.rfind("]")
    try:
        entries = json.loads(answer[start : end + 1]) if 0 <= start < end else answer.splitlines()
    except (ValueError, RecursionError):
        entries = answer.splitlines()
    lines = [re.sub(r"^\s*(?:[-*•]|\d+[.)])\s*", "", e).strip(" \t\"'.,") for e in entries if isinstance(e, str)]
    return [line for line in lines if line and len(line) <= 100]


def judged(scores: Sequence[int]) -> tuple[float, float]:
    """Acc@1 and Acc@5 of a judge's scores of the best phrases (2 the truth, 1 part of it or more than it, 0 else).

    >>> judged([1, 0, 2, 0, 0])
    (0.5, 1.0)
    """
    if not len(scores) or set(scores) - {0, 1, 2}:
        raise ClipworksError(f"scores must be some of 0, 1 and 2, one per phrase. Got {list(scores)!r}.")
    return scores[0] / 2, max(scores[:5]) / 2


def mixed(first: Sequence[Any], second: Sequence[Any], purity: float, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Exchange a share 1 - purity of two sets of the same size, to see how subtle a difference is still found."""
    check_range("purity", purity, 0.0, 1.0)
    if len(first) != len(second):
        raise ClipworksError(f"first and second must have the same size. Got {len(first)} and {len(second)}.")
    count, rng = round((1 - purity) * len(first)), np.random.default_rng(seed)
    out, into = rng.permutation(len(first))[:count], rng.permutation(len(second))[:count]
    one, other = list(first), list(second)
    for i, j in zip(out, into, strict=True):
        one[i], other[j] = second[j], first[i]
    return one, other


def check_phrases(phrases: Sequence[str]) -> list[str]:
    """The phrases as a list, or an error if one is empty or occurs twice."""
    found = list(phrases)
    if not found or not all(isinstance(name, str) and name.strip() for name in found):
        raise ClipworksError(f"phrases must be some words each. Got {found[:3]!r}.")
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise ClipworksError(f"phrases must be distinct. {twice!r} occurs twice.")
    return found


def _sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:most])]
