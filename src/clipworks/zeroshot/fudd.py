"""FuDD: a second look at the likeliest classes, with sentences written to tell these apart.

Claim: among classes that are nearly alike, what they have in common does not help; descriptions of the differences of
the k likeliest classes of an image do (ImageNet, ViT-B/32: 61.9 -> 64.2 %).

Formula: S = top-k of <x, text("a photo of a {c}.")>;  P_a = all sentences written for a against some b in S, each once;
f_a = norm( mean_{p in P_a} text(p) );  prediction argmax_{a in S} <x, f_a>.

Paper: Esfandiarpoor and Bach 2024, Follow-Up Differential Descriptions: Language Models Resolve Ambiguities for Image
Classification.
Differs from the paper: class names stand as they are given, not capitalised. Differences may come from anywhere, also
from plain descriptions (`contrasts`); each pair is asked for once. A likely pair without sentences falls back to the
template for both. Default k from the released code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ClipworksError, check_range
from ..registry import method
from .classifier import check_names
from .descriptions import PairDescriptions, PairSource
from .sentences import Scores, as_vectors, best, encode, grouped, unit
from .templates import resolve_templates


@dataclass
class FollowUp(Scores):
    """Scores of the second look; -inf outside the candidates.

    Attributes
    ----------
    first : scores of the first look, shape (n, C)
    candidates : shape (n, k), best of the first look first
    said : candidates, sorted -> the sentences of each of them
    """

    first: np.ndarray
    candidates: np.ndarray
    said: dict[tuple[int, ...], list[list[str]]]

    def sentences(self, row: int) -> dict[str, list[str]]:
        """The sentences by which the candidates of one image were compared."""
        key = tuple(sorted(self.candidates[row].tolist()))
        return {self.names[a]: list(told) for a, told in zip(key, self.said[key], strict=True)}


@method(card="fudd", level="M")
def fudd(
    features: Any,
    names: Sequence[str],
    encoder: Any,
    pairs: PairSource | Mapping[tuple[str, str], Iterable[Sequence[str]]],
    *,
    k: int = 10,
    template: str = "a photo of a {}.",
) -> FollowUp:
    """Score the k likeliest classes of each image by sentences about their differences.

    Parameters
    ----------
    features : vectors of n images, shape (n, dim), or `Features`
    names : C distinct class names
    encoder : anything with `texts(list of str) -> (n, dim)`, or a mapping from sentence to vector
    pairs : {(a, b): [(sentence for a, sentence for b), ...]}, `PairDescriptions`, or a function of two names
    k : candidates per image; C or more compares all classes and gives one classifier for all images
    template : sentence of the first look and of pairs of which nothing is known

    Returns
    -------
    FollowUp: `scores` (n, C) that are -inf outside the candidates, `labels`, `first`, `candidates`, `sentences(row)`

    Raises
    ------
    ClipworksError
        If an argument cannot be used, or a pair is not one sentence for each class.

    Inputs
    ------
    words and feature vectors; no label is seen. Which pairs are asked for depends on the images.

    Relations
    ---------
    With k = 1, or without sentences, the labels are those of plain zero-shot. `description_selection` chooses for the
    candidates among plain descriptions, by labelled images.

    References
    ----------
    Esfandiarpoor and Bach 2024, Follow-Up Differential Descriptions: Language Models Resolve Ambiguities

    Examples
    --------
    >>> class Toy:
    ...     def texts(self, sentences): return np.array([[1.0, "spotted" in s, "plain" in s] for s in sentences])
    >>> told = {("wren", "lark"): [("a plain wren", "a spotted lark")]}
    >>> fudd(np.array([[0.5, 0.8, 0.1]]), ["wren", "lark"], Toy(), told).labels
    ['lark']
    """
    names = check_names(names)
    check_range("k", k, 1)
    (template,) = resolve_templates([template])
    ask = PairDescriptions(pairs) if isinstance(pairs, Mapping) else pairs
    if not callable(ask):
        raise ClipworksError(f"pairs must be a mapping or a function of two names. Got {type(pairs).__name__}.")
    plain = [template.replace("{}", name) for name in names]
    text = encode(plain, encoder)
    images = as_vectors("features", features, text.shape[1])
    first = images @ text.T
    candidates = best(first, k)
    groups = grouped(candidates)

    told: dict[tuple[int, int], list[list[str]]] = {}  # a < b -> sentences for a, sentences for b
    for a, b in itertools.chain.from_iterable(itertools.combinations(group, 2) for group, _ in groups):
        if (a, b) not in told:
            told[a, b] = _two_sides(ask(names[a], names[b]), plain[a], plain[b])
    rows = {s: i for i, s in enumerate(sorted({s for sides in told.values() for side in sides for s in side}))}
    vectors = encode(rows, encoder) if rows else text[:0]

    scores = np.full_like(first, -np.inf)
    said = {}
    for group, of in groups:
        sentences, classes = [], []
        for a in group:
            sides = (told[min(a, b), max(a, b)][int(a > b)] for b in group if b != a)
            own = sorted(set(itertools.chain.from_iterable(sides)))  # a set, sorted: the sum is the same in every run
            sentences.append(own or [plain[a]])
            classes.append(vectors[[rows[s] for s in own]].mean(0) if own else text[a])
        scores[of[:, None], group] = images[of] @ unit(np.stack(classes)).T
        said[tuple(group)] = sentences
    return FollowUp(names, scores, first, candidates, said)


def _two_sides(told: Sequence[Sequence[str]], plain_a: str, plain_b: str) -> list[list[str]]:
    """Sentences for a and sentences for b; the template's, where nothing is told."""
    pairs = [tuple(two) for two in told]
    if any(isinstance(two, str) for two in told) or any(
        len(two) != 2 or not all(isinstance(s, str) and s.strip() for s in two) for two in pairs
    ):
        raise ClipworksError(f"pairs must give one sentence for each of the two classes. Got {list(told)!r}.")
    return [[two[0] for two in pairs], [two[1] for two in pairs]] if pairs else [[plain_a], [plain_b]]
