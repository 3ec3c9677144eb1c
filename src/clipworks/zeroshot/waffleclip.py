"""WaffleCLIP, the control for descriptions: every class gets the same random words in place of its features.

Claim: "a photo of a hen, which has foot loud." and its like decide about as well as real descriptions (ImageNet,
ViT-B/32: 63.3 % against 63.1 %), so a method that uses descriptions must be compared with this.

Formula: s(c, x) = mean_r <x, text("a photo of a {c}, which has {r}.")> over 15 descriptors of random words and 15 of
random characters, the same ones for all classes, as many and as long words as the average class name has.

Paper: Roth et al. 2023, Waffling around for Performance: Visual Classification with Random Words and Broad Concepts.
Differs from the paper: the words are drawn from a short list of common ones, those nearest in length to the words of
the names, uncut; another list may be given. The paper's broad concept is a matter of the template ("a photo of an
animal: a {}."). One draw per call; the paper reports the mean accuracy of 7, which are seeds 0 to 6 here. Defaults from
the released code.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ClipworksError, check_range
from ..registry import method
from .classifier import check_names
from .sentences import Scores, as_vectors, encode
from .templates import resolve_templates

COMMON = """
act age air arm art bag bed big box bus cup cut day dry ear east edge end eye far fat fit fly foot full game gas gift
gold hand hard heat hill home hour idea iron jump keep kind know land late left life line list long look loud mark meal
mind moon move much neck news noon note open over page part path plan play poor pull push quiet race rain read rest rich
ring road room rule salt sand seat seed ship shop side sign silk sing size skin slow snow soft song sort soup step stop
sugar table talk taste thick third tower track trade train trust truth under value visit voice watch water wheat wheel
white whole world write young answer beauty bottom branch bridge broken button camera circle colour corner cotton danger
decide degree dinner double family farmer finger flight forest friend garden ground harbor history kitchen language
leather library machine measure morning mountain natural northern opinion ordinary package parallel pleasure position
possible potential question railway reaction register rhythm science sentence separate simple smooth society statement
station structure substance sudden support surprise thought thunder together tomorrow transport trousers village weather
window winter yesterday
"""
WORDS = COMMON.split()


@dataclass
class WaffleScores(Scores):
    """Scores from random words; `noise` are the descriptors that every class was given."""

    noise: list[str]


@method(card="description-selection", level="M")
def waffleclip(
    features: Any,
    names: Sequence[str],
    encoder: Any,
    *,
    count: int = 15,
    words: Sequence[str] = WORDS,
    alphabet: str = string.ascii_lowercase,
    template: str = "a photo of a {}.",
    seed: int = 0,
) -> WaffleScores:
    """Score images by class names followed by random words and characters.

    Parameters
    ----------
    features : vectors of n images, shape (n, dim), or `Features`
    names : C distinct class names
    encoder : anything with `texts(list of str) -> (n, dim)`, or a mapping from sentence to vector
    count : descriptors of random words, and as many of random characters; 0 leaves the template alone
    words : words to draw from
    alphabet : characters to draw from (the paper takes those of the descriptions it is compared with)
    template : sentence for "{name}, which has {noise}", which stands in place of {}
    seed : of the draw

    Returns
    -------
    WaffleScores: `scores` (n, C), `labels` and the `noise`

    Inputs
    ------
    words and feature vectors; no label is seen

    Relations
    ---------
    The control of `classify_by_description`, which it equals when that is given the same noise as descriptions of
    every class. With `count=0` it is plain zero-shot.

    References
    ----------
    Roth et al. 2023, Waffling around for Performance: Visual Classification with Random Words and Broad Concepts

    Examples
    --------
    >>> class Toy:
    ...     def texts(self, sentences): return np.eye(2)[[int("dog" in s) for s in sentences]]
    >>> waffleclip(np.eye(2), ["cat", "dog"], Toy(), count=2).labels
    ['cat', 'dog']
    """
    names = check_names(names)
    check_range("count", count, 0)
    (template,) = resolve_templates([template])
    noise = random_descriptors(names, count, words, alphabet, seed)
    phrases = [f"{name}, which has {n}" for name in names for n in noise] if noise else names
    vectors = encode((template.replace("{}", phrase) for phrase in phrases), encoder)
    images = as_vectors("features", features, vectors.shape[1])
    classes = vectors.reshape(len(names), -1, vectors.shape[1]).mean(1)
    return WaffleScores(names, images @ classes.T, noise)


def random_descriptors(
    names: Sequence[str],
    count: int,
    words: Sequence[str] = WORDS,
    alphabet: str = string.ascii_lowercase,
    seed: int = 0,
) -> list[str]:
    """Return `count` descriptors of random words, then `count` of random characters, as long as the average name.

    >>> random_descriptors(["oak", "elm"], 2, words=["ash", "sycamore"], alphabet="x")
    ['ash', 'ash', 'xxx', 'xxx']
    """
    if isinstance(words, str) or not len(words) or not all(isinstance(w, str) and w.strip() for w in words):
        raise ClipworksError(f"words must be a list of words. Got {words!r}.")
    if not alphabet:
        raise ClipworksError(f"alphabet must hold at least one character. Got {alphabet!r}.")
    parts = [name.split() for name in names]
    number = max(1, round(float(np.mean([len(p) for p in parts]))))
    length = max(1, round(float(np.mean([np.mean([len(word) for word in p]) for p in parts]))))
    off = np.array([abs(len(word) - length) for word in words])
    fitting = [word for word, distance in zip(words, off, strict=True) if distance == off.min()]
    rng = np.random.default_rng(seed)
    of_words = [" ".join(rng.choice(fitting, number)) for _ in range(count)]
    letters = list(alphabet)
    of_letters = [" ".join("".join(rng.choice(letters, length)) for _ in range(number)) for _ in range(count)]
    return of_words + of_letters
