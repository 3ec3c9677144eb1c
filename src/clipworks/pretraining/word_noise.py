"""Small changes of a caption's words: stop words out, words swapped, deleted or replaced by synonyms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

_STOP = """
a an and are as at be but by for from had has have he her his i in into is it its me my of on or our she so some such
that the their them then there these they this to too very was we were what when where which who will with you your
"""
STOP_WORDS = frozenset(_STOP.split())


def without_stop_words(text: str, stop_words: frozenset[str] = STOP_WORDS) -> str:
    """Return a text without its stop words, or the text itself if nothing else is in it.

    >>> without_stop_words("a photo of the cat"), without_stop_words("of the")
    ('photo cat', 'of the')
    """
    return " ".join(w for w in text.split() if w.lower() not in stop_words) or text


def swapped(text: str, draw: np.random.Generator, share: float = 0.1) -> str:
    """Return a text in which pairs of words have changed places, one pair or `share` of the words."""
    words = text.split()
    if len(words) > 1:
        for _ in range(max(1, int(share * len(words)))):
            i, j = draw.choice(len(words), 2, replace=False)
            words[i], words[j] = words[j], words[i]
    return " ".join(words)


def deleted(text: str, draw: np.random.Generator, probability: float = 0.1) -> str:
    """Return a text in which each word is left out with a probability; one word always stays."""
    words = text.split()
    kept = [w for w, r in zip(words, draw.random(len(words)), strict=True) if r >= probability]
    return " ".join(kept or ([words[int(draw.integers(len(words)))]] if words else []))


def with_synonyms(
    text: str, draw: np.random.Generator, synonyms: Mapping[str, Sequence[str]], share: float = 0.1
) -> str:
    """Return a text in which one word, or `share` of the words, that have synonyms are replaced by one of them."""
    words = text.split()
    known = [i for i, w in enumerate(words) if synonyms.get(w.lower())]
    if known:
        count = min(len(known), max(1, int(share * len(words))))
        for i in draw.choice(known, count, replace=False):
            others = synonyms[words[i].lower()]
            words[i] = others[int(draw.integers(len(others)))]
    return " ".join(words)
