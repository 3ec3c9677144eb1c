"""PerceptionCLIP: infer what surrounds the object (background, light, angle), then classify given that.

Claim: sentences that name the right context classify better than those without, and what the context is can be read off
the image by the same words; the gain is largest for the worst group of a spurious background (Waterbirds, ViT-L/14:
+16.5 points in the paper).

Formula: f(y, z) = scale * <x, t_(y,z)>,  t_(y,z) = norm(mean of the sentences of class y in context z);
p(z|x) = softmax_z( logsumexp_y f(y, z) / tau ),  p(y|x,z) = softmax_y f(y, z),  p(y|x) = sum_z p(z|x) p(y|x,z).

Paper: An et al. 2024, PerceptionCLIP: Visual Classification by Inferring and Conditioning on Contextual Attributes.
Differs from the paper: tau is 1 unless set, where p(y|x) is the class marginal of the softmax over all pairs of class
and context; the released scripts pick it on the test set. The phrases of a combination are joined by ", ". The number
of combinations is limited. Factors that no one gave are four of the paper's for photos in general, each with a value
that says nothing; the paper has more of them, with phrases from a language model, chosen for each data set.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ClipworksError, check_choice, check_range
from ..registry import method
from .classifier import check_names
from .sentences import as_vectors, encode, means, softmax, unit
from .templates import resolve_templates

BLOCK = 2**24  # numbers in the table of images x classes x contexts held at a time
CLASSES = 256  # classes whose sentences are encoded at a time
Factors = Mapping[str, Sequence[str | Sequence[str]]]
GENERAL: Factors = {
    "orientation": ["", "upside-down"],
    "quality": ["", "blurry"],
    "illumination": ["", "in the dark"],
    "medium": ["", "as a painting", "as a sketch", "as a cartoon"],
}


@dataclass
class InContext:
    """Classes and contexts of every image.

    Attributes
    ----------
    names : the C class names
    contexts : the Z combinations, each a value per factor
    probabilities : p(class | image), shape (n, C), rows sum to 1
    context_probabilities : p(context | image), shape (n, Z), rows sum to 1
    """

    names: list[str]
    contexts: list[dict[str, str]]
    probabilities: np.ndarray
    context_probabilities: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        """Position of the likeliest class of every image; shape (n,)."""
        return self.probabilities.argmax(1)

    @property
    def labels(self) -> list[str]:
        return [self.names[i] for i in self.predictions]

    def factor(self, name: str) -> dict[str, np.ndarray]:
        """Probability of each value of one factor, summed over the others: value -> shape (n,)."""
        check_choice("name", name, self.contexts[0])
        found: dict[str, np.ndarray] = {}
        for z, context in enumerate(self.contexts):
            found[context[name]] = found.get(context[name], 0) + self.context_probabilities[:, z]
        return found


@method(card="perceptionclip", level="M")
def perceptionclip(
    features: Any,
    names: Sequence[str],
    encoder: Any,
    factors: Factors | None = None,
    *,
    templates: str | Sequence[str] = "a photo of a {}",
    infer: str = "names",
    noun: str = "object",
    choose: str = "all",
    tau: float = 1.0,
    scale: float | None = None,
    limit: int = 1000,
) -> InContext:
    """Infer the context of each image, and its class given the context.

    Parameters
    ----------
    features : vectors of n images, shape (n, dim), or `Features`
    names : C distinct class names
    encoder : anything with `texts(list of str) -> (n, dim)`, or a mapping from sentence to vector
    factors : {"background": ["", "on grass", ["in water", "on a lake"]], ...}; each value is a phrase, "" for none, or
        several phrases that mean the same and are averaged; a context is one value of every factor; default: `GENERAL`,
        orientation, quality, illumination and medium of a picture
    templates : name of a set, a template or several; phrases follow before its full stop
    infer : the context by the class "names" (summed over the classes), or by the "noun" in place of them
    noun : word for all classes ("bird" among birds), if `infer="noun"`
    choose : "all" contexts weighted by their probability, or the "best" one
    tau : flattens the probabilities of contexts where above 1 (the paper searches 1, 3, 5, 10)
    scale : sharpness (default: the encoder's `logit_scale`, 100 if it has none)
    limit : largest number of contexts

    Returns
    -------
    InContext: `probabilities` (n, C), `context_probabilities` (n, Z), `labels`, `factor(name)`

    Raises
    ------
    ClipworksError
        If an argument cannot be used, or the factors have more than `limit` combinations.

    Inputs
    ------
    words and feature vectors; no label is seen

    Relations
    ---------
    With one context it is plain zero-shot with that sentence. With `tau=1`, `infer="names"` it is the softmax over all
    pairs of class and context, summed over the contexts.

    References
    ----------
    An et al. 2024, PerceptionCLIP: Visual Classification by Inferring and Conditioning on Contextual Attributes

    Examples
    --------
    >>> class Toy:
    ...     def texts(self, sentences): return np.array([["duck" in s, "hen" in s, "water" in s] for s in sentences])
    >>> seen = np.array([[0.4, 0.5, 0.9]])
    >>> found = perceptionclip(seen, ["duck", "hen"], Toy(), {"background": ["on land", "in water"]}, scale=5)
    >>> found.labels, round(float(found.factor("background")["in water"][0]), 2)
    (['hen'], 0.91)
    """
    names = check_names(names)
    check_choice("infer", infer, ("names", "noun"))
    check_choice("choose", choose, ("all", "best"))
    scale = float(getattr(encoder, "logit_scale", 100.0)) if scale is None else check_range("scale", scale, 0)
    if not tau > 0:
        raise ClipworksError(f"tau must be above 0. Got {tau!r}.")
    chosen = resolve_templates(templates)
    values, contexts = _contexts(GENERAL if factors is None else factors, limit)

    def vectors(subjects: list[str]) -> np.ndarray:
        """Shape (subjects, Z, dim): every subject in every context, averaged over templates and synonyms."""
        rows = [[s for t in chosen for s in _sentences(t, subject, z)] for subject in subjects for z in values]
        found = encode(itertools.chain.from_iterable(rows), encoder)
        return unit(means(found, [len(r) for r in rows])).reshape(len(subjects), len(values), -1)

    text = np.concatenate([vectors(names[i : i + CLASSES]) for i in range(0, len(names), CLASSES)])
    images = as_vectors("features", features, text.shape[2])
    general = vectors([noun])[0] if infer == "noun" else None
    classes = np.empty((len(images), len(names)), np.float32)
    weights = np.empty((len(images), len(values)), np.float32)
    flat = text.reshape(-1, text.shape[2])
    step = max(1, BLOCK // len(flat))
    for start in range(0, len(images), step):
        part = images[start : start + step]
        logits = scale * (part @ flat.T).reshape(len(part), *text.shape[:2])
        seen = _logsumexp(logits / tau) if general is None else scale * (part @ general.T) / tau
        weights[start : start + step] = p = softmax(seen)
        if choose == "best":
            p = np.eye(len(values), dtype=np.float32)[p.argmax(1)]
        classes[start : start + step] = np.einsum("nz,nyz->ny", p, softmax(logits.swapaxes(1, 2)).swapaxes(1, 2))
    return InContext(names, contexts, classes, weights)


def _contexts(factors: Factors, limit: int) -> tuple[list[tuple[list[str], ...]], list[dict[str, str]]]:
    """Every combination of values: the synonyms per factor, and the first synonym under the factor's name."""
    if not isinstance(factors, Mapping):
        raise ClipworksError(f"factors must map a factor's name to its values. Got {type(factors).__name__}.")
    lists = []
    for name, values in factors.items():
        if isinstance(values, str) or not len(values):
            raise ClipworksError(f"factors must have a list of values. Got {values!r} for {name!r}.")
        for value in values:
            if not isinstance(value, str) and not (
                isinstance(value, Sequence) and value and all(isinstance(s, str) for s in value)
            ):
                raise ClipworksError(f"factors must have phrases, or lists of them, as values. Got {value!r}.")
        lists.append([[v] if isinstance(v, str) else list(v) for v in values])
    count = int(np.prod([len(values) for values in lists]))
    if count > limit:
        raise ClipworksError(f"factors must have at most {limit} combinations (limit). Got {count}; use fewer factors.")
    combined = list(itertools.product(*lists))
    return combined, [{n: v[0] for n, v in zip(factors, z, strict=True)} for z in combined]


def _sentences(template: str, subject: str, context: Sequence[Sequence[str]]) -> list[str]:
    """The sentences of one class in one context, one for each choice of synonyms."""
    body, stop = (template[:-1], ".") if template.endswith(".") else (template, "")
    said = body.replace("{}", subject)
    return [", ".join([said, *filter(None, phrases)]) + stop for phrases in itertools.product(*context)]


def _logsumexp(logits: np.ndarray) -> np.ndarray:
    """Over the classes, axis 1."""
    top = logits.max(1)
    return top + np.log(np.exp(logits - top[:, None]).sum(1))
