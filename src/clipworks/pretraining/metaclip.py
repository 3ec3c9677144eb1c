"""MetaCLIP's curation: keep the pairs whose words name something known, and cap what is named too often.

Claim: a pool of raw pairs, matched against a list of entries and balanced so that no entry counts more than about t
times, trains a better CLIP than the unpublished data of CLIP itself (400M pairs, ViT-B/16, ImageNet zero-shot: 68.3
and 70.8 %), from the text alone and without any model as a filter.

Formula: entry e matches a text if " e " is in the spaced text; c_e = number of texts of the whole pool that e matches;
p_e = t / max(c_e, t); a text is kept if any of its entries' draws succeeds: P(keep) = 1 - prod_e (1 - p_e).

Paper: Xu et al. 2024, Demystifying CLIP Data (ICLR).
Differs from the paper: matching walks an Aho-Corasick automaton over words, which gives the same entries as looking for
every string, in one pass; the decision is per text, so a record with several texts is not repeated. The list of entries
is an argument (the paper's 500,000 come from WordNet and Wikipedia).
Defaults: t = 20,000 from the paper, for a pool of 400M; it should grow with the pool so that the share of the head
entries stays (170,000 for 2.5B).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ClipworksError, check_range
from ..registry import method

# punctuation stands alone and line ends are spaces, so that "a cat." holds the word "cat"
_SPACED = str.maketrans({**{mark: f" {mark} " for mark in ",.;:?!`"}, "\t": " ", "\n": " ", "\r": " "})


def spaced(text: str) -> str:
    """Return a text between spaces, with spaces around punctuation; case stays.

    >>> spaced("a cat, two dogs.")
    ' a cat ,  two dogs .  '
    """
    return f" {text.translate(_SPACED)} "


class Matcher:
    """Finds which of many entries occur in a text as whole words: an Aho-Corasick automaton whose letters are words.

    " e " occurs in a spaced text exactly if the words of e, split at single spaces, follow each other among the words
    of the text, so walking words loses nothing against walking characters, and is several times as fast.

    Parameters
    ----------
    entries : the strings to look for; a repeated or empty one is an error
    """

    def __init__(self, entries: Iterable[str]):
        self.entries = list(entries)
        if not self.entries:
            raise ClipworksError("metadata must hold at least one entry. Got none.")
        self._next: list[dict[str, int]] = [{}]
        self._entry = [-1]
        for number, entry in enumerate(self.entries):
            self._add(number, entry)
        self._link()

    def _add(self, number: int, entry: str) -> None:
        if not entry.strip():
            raise ClipworksError(f"metadata entries must have a letter. Entry {number} is {entry!r}.")
        node = 0
        for word in entry.split(" "):
            following = self._next[node].get(word)
            if following is None:
                following = self._next[node][word] = len(self._next)
                self._next.append({})
                self._entry.append(-1)
            node = following
        if self._entry[node] >= 0:
            raise ClipworksError(f"metadata must hold an entry once. Got {entry!r} twice.")
        self._entry[node] = number

    def _link(self) -> None:
        """Fail links (longest proper suffix that is a node), and all entries that end at a node."""
        self._fail = [0] * len(self._next)
        self._ends: list[tuple[int, ...]] = [() if e < 0 else (e,) for e in self._entry]
        waiting = deque(self._next[0].values())
        while waiting:
            node = waiting.popleft()
            for word, child in self._next[node].items():
                back = self._fail[node]
                while back and word not in self._next[back]:
                    back = self._fail[back]
                self._fail[child] = self._next[back].get(word, 0)
                self._ends[child] += self._ends[self._fail[child]]
                waiting.append(child)

    def __call__(self, text: str) -> list[int]:
        """Return the distinct entries of a text, in ascending order."""
        following, fail, ends, first = self._next, self._fail, self._ends, self._next[0].get
        node = 0
        found: set[int] = set()
        for word in spaced(text)[1:-1].split(" "):  # the words that have a space on either side
            here = following[node].get(word) if node else first(word)
            while here is None and node:
                node = fail[node]
                here = following[node].get(word)
            node = here or 0  # no word leads back to the root, so 0 is "not found"
            if node and ends[node]:
                found.update(ends[node])
        return sorted(found)

    def rows(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the matches of many texts as one flat list.

        Returns
        -------
        entries : int64 (matches,), text by text
        starts : int64 (texts + 1,); those of text i are `entries[starts[i]:starts[i + 1]]`
        """
        found: list[int] = []
        starts = [0]
        for text in texts:
            found += self(text)
            starts.append(len(found))
        return np.array(found, np.int64), np.array(starts, np.int64)


@dataclass
class Curation:
    """What was kept of a pool.

    Attributes
    ----------
    kept : bool (texts,), in the order of the pool
    probability : float64 (texts,), the chance that each text had
    counts : int64 (entries,), texts of the whole pool that each entry matches
    entry_probability : float64 (entries,), t / max(counts, t)
    matched : how many texts match at least one entry
    """

    kept: np.ndarray
    probability: np.ndarray
    counts: np.ndarray
    entry_probability: np.ndarray
    matched: int

    @property
    def indices(self) -> np.ndarray:
        """Positions of the kept texts."""
        return np.flatnonzero(self.kept)


@method(card="metaclip", level="M")
def curate(texts: Sequence[str], metadata: Sequence[str] | Matcher, t: float = 20_000, seed: int = 0) -> Curation:
    """Choose a balanced subset of a pool by its texts.

    Parameters
    ----------
    texts : one text per pair, as written; matching minds case, as the reference does
    metadata : distinct entries such as names of things, or a `Matcher` of them that is used again
    t : how often an entry may count before it is thinned (20,000 in the paper; inf keeps every matched text)
    seed : of the draws

    Returns
    -------
    Curation

    Raises
    ------
    ClipworksError
        If there is no entry, an entry is empty or repeated, or t is negative.

    Inputs
    ------
    texts only; the images of the kept positions are then trained on as usual

    Relations
    ---------
    For pools beyond memory, `entry_counts` over all shards and then `balance` shard by shard give the same decisions.

    References
    ----------
    Xu et al. 2024, Demystifying CLIP Data

    Examples
    --------
    >>> found = curate(["a cat.", "category theory", "cat, dog", "nothing"], ["cat", "dog"], t=1)
    >>> found.counts.tolist(), found.probability.tolist()
    ([2, 1], [0.5, 0.0, 1.0, 0.0])
    """
    matcher = metadata if isinstance(metadata, Matcher) else Matcher(metadata)
    entries, starts = matcher.rows(texts)
    counts = np.bincount(entries, minlength=len(matcher.entries))
    chances = entry_probability(counts, t)
    draws = np.random.default_rng(seed).random(len(entries))
    kept, probability = decide(entries, starts, chances, draws)
    return Curation(kept, probability, counts, chances, int((np.diff(starts) > 0).sum()))


def entry_counts(shards: Iterable[Sequence[str]], matcher: Matcher) -> np.ndarray:
    """First pass over a pool in shards: how many texts each entry matches, uint64 (entries,)."""
    counts = np.zeros(len(matcher.entries), np.uint64)
    for texts in shards:
        counts += np.bincount(matcher.rows(texts)[0], minlength=len(counts)).astype(np.uint64)
    return counts


def balance(
    shards: Iterable[Sequence[str]], matcher: Matcher, counts: np.ndarray, t: float = 20_000, seed: int = 0
) -> Iterator[np.ndarray]:
    """Second pass: yield for every shard which of its texts are kept, bool (texts,).

    Parameters
    ----------
    shards : the same shards in the same order as for `entry_counts`; the draws go on from one to the next
    matcher : of the metadata
    counts : of the whole pool; those of a single shard would keep too much
    t, seed : as in `curate`
    """
    chances = entry_probability(counts, t)
    rng = np.random.default_rng(seed)
    for texts in shards:
        entries, starts = matcher.rows(texts)
        yield decide(entries, starts, chances, rng.random(len(entries)))[0]


def entry_probability(counts: np.ndarray, t: float) -> np.ndarray:
    """Return t / max(counts, t), and 1 for entries that no text has."""
    check_range("t", t, 0)
    if t == np.inf:
        return np.ones(len(counts))
    largest = np.maximum(counts.astype(np.float64), t)
    return np.divide(t, largest, out=np.ones(len(counts)), where=largest > 0)


def decide(
    entries: np.ndarray, starts: np.ndarray, chances: np.ndarray, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keep a text if the draw of any of its entries lies below the entry's chance.

    Parameters
    ----------
    entries, starts : matches as `Matcher.rows` gives them
    chances : keep probability per entry
    draws : uniform numbers in [0, 1), one per match

    Returns
    -------
    kept, bool (texts,), and its probability, float64 (texts,)
    """
    texts = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    kept = np.bincount(texts[draws < chances[entries]], minlength=len(starts) - 1) > 0
    lost = np.ones(len(starts) - 1)
    np.multiply.at(lost, texts, 1 - chances[entries])
    return kept, 1 - lost
