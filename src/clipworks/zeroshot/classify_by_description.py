"""Classification by description: a class is the list of features it shows, and every decision can be explained by them.

Claim: the mean similarity of an image to sentences such as "tiger, which has sharp teeth" decides better than the name
alone (ImageNet, ViT-B/32: 62.0 -> 63.1 %), and the single similarities say why.

Formula: s(c, x) = mean_{d in D(c)} <x, t_(c,d)>,  t_(c,d) = text("{c}, which has {d}") of length 1; the joiner follows
the descriptor's first word. A class without descriptors has one sentence, its name.

Paper: Menon and Vondrick 2023, Visual Classification via Description from Large Language Models.
Differs from the paper: the descriptions may come from anywhere. The mean of the vectors, made length 1 again, is kept
as an option (`aggregate="vectors"`), as is a noun in place of all names (`subject`), which shows what the descriptions
do without the names. Too long sentences are cut by the encoder's tokenizer. Defaults from the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ClipworksError, check_choice
from ..registry import method
from .classifier import check_names
from .descriptions import Source, describe, descriptions_of
from .sentences import Scores, as_vectors, encode, means, unit
from .templates import resolve_templates


@dataclass
class Evidence:
    """What one descriptor says for a decision.

    Attributes
    ----------
    descriptor : its words (the name, for a class without descriptors)
    similarity : cosine of the image and the descriptor's sentence
    margin : similarity less the score of the class it was compared with; the descriptor fired if this is above 0
    """

    descriptor: str
    similarity: float
    margin: float


@dataclass
class Explanation:
    """Why an image was given a class: `evidence` of each descriptor, best first.

    The mean of the similarities is the class's score and the mean of the margins the score's lead over `against`
    (both exact for `aggregate="similarities"`).
    """

    name: str
    against: str | None
    evidence: list[Evidence]

    @property
    def fired(self) -> list[str]:
        """Descriptors that by themselves speak for `name` and against the other class."""
        return [e.descriptor for e in self.evidence if e.margin > 0]

    def as_rows(self) -> list[dict]:
        """One dictionary per descriptor, ready for JSON or a table."""
        return [{"descriptor": e.descriptor, "similarity": e.similarity, "margin": e.margin} for e in self.evidence]


@dataclass
class DescribedScores(Scores):
    """Scores that can explain themselves.

    Attributes
    ----------
    descriptors : per class, the words of its descriptors (its name, where it has none)
    vectors : unit vectors of all sentences, class after class
    features : the images' unit vectors
    """

    descriptors: list[list[str]]
    vectors: np.ndarray
    features: np.ndarray

    def explain(self, row: int, name: str | None = None, against: str | None = None) -> Explanation:
        """Say what speaks for a class.

        Parameters
        ----------
        row : which image
        name : class to explain; default: the predicted one
        against : class to compare with; default: the best of the others (None where there is one class)
        """
        if not -len(self.scores) <= row < len(self.scores):
            raise ClipworksError(f"row must be one of the {len(self.scores)} images. Got {row}.")
        order = np.argsort(-self.scores[row], kind="stable")
        of = int(order[0]) if name is None else self._position("name", name)
        others = [int(i) for i in order if i != of]
        other = self._position("against", against) if against is not None else others[0] if others else None
        start = sum(map(len, self.descriptors[:of]))
        similarities = self.vectors[start : start + len(self.descriptors[of])] @ self.features[row]
        base = 0.0 if other is None else float(self.scores[row, other])
        pairs = sorted(zip(self.descriptors[of], similarities.tolist(), strict=True), key=lambda pair: -pair[1])
        found = [Evidence(descriptor, similarity, similarity - base) for descriptor, similarity in pairs]
        return Explanation(self.names[of], None if other is None else self.names[other], found)

    def _position(self, argument: str, name: str) -> int:
        return self.names.index(check_choice(argument, name, self.names))


@method(card="classify-by-description", level="M")
def classify_by_description(
    features: Any,
    names: Sequence[str],
    encoder: Any,
    descriptions: Source,
    *,
    template: str = "{}",
    subject: str | None = None,
    aggregate: str = "similarities",
) -> DescribedScores:
    """Score images by the descriptions of the classes.

    Parameters
    ----------
    features : vectors of n images, shape (n, dim), or `Features`
    names : C distinct class names
    encoder : anything with `texts(list of str) -> (n, dim)`, or a mapping from sentence to vector
    descriptions : mapping or JSON file from names to lists of visible features, or a function of a name
    template : sentence around each phrase "tiger, which has sharp teeth"; it stands in place of {}
    subject : noun in place of every class name ("an animal"), to see what descriptions do without the names
    aggregate : "similarities" averages cosines (the paper); "vectors" averages vectors and makes them length 1 again

    Returns
    -------
    DescribedScores: `scores` (n, C), `labels`, and `explain(row)`

    Raises
    ------
    ClipworksError
        If an argument cannot be used; where `subject` leaves a class without descriptors without a sentence of its own.

    Inputs
    ------
    words and feature vectors; no label is seen

    Relations
    ---------
    Without descriptions it is `class_vectors` with the same template. `waffleclip` is its control, `fudd` describes the
    differences of likely classes, `description_selection` keeps the descriptions that separate them.

    References
    ----------
    Menon and Vondrick 2023, Visual Classification via Description from Large Language Models

    Examples
    --------
    >>> words = {"hen, which is a comb": [1, 0, 0], "hen, which has wings": [0, 1, 0], "cat, which has fur": [0, 0, 1]}
    >>> told = {"hen": ["a comb", "wings"], "cat": ["fur"]}
    >>> found = classify_by_description(np.array([[0.8, 0.6, 0.0]]), ["hen", "cat"], words, told)
    >>> found.labels, found.explain(0).fired
    (['hen'], ['a comb', 'wings'])
    """
    names = check_names(names)
    check_choice("aggregate", aggregate, ("similarities", "vectors"))
    (template,) = resolve_templates([template])
    given = descriptions_of(names, descriptions)
    if subject is not None and not all(given):
        empty = names[[bool(d) for d in given].index(False)]
        raise ClipworksError(f"descriptions must describe every class when subject is given. Got none for {empty!r}.")
    phrases = [
        [describe(subject or name, d) for d in own] or [name] for name, own in zip(names, given, strict=True)
    ]
    vectors = encode((template.replace("{}", p) for own in phrases for p in own), encoder)
    images = as_vectors("features", features, vectors.shape[1])
    classes = means(vectors, [len(own) for own in phrases])
    if aggregate == "vectors":
        classes = unit(classes)
    shown = [own or [name] for name, own in zip(names, given, strict=True)]
    return DescribedScores(names, images @ classes.T, shown, vectors, images)
