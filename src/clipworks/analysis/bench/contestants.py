"""Who takes part: every registered method that classifies, found through the registry.

Heads and other classifiers with `fit` learn from shots. Functions of images' features and class names (`waffleclip`)
answer from words. Learned prompts and tuned towers learn from the images themselves and take part when they are named,
as each of their runs passes through the towers. What a method needs beyond features, labels, names and word vectors is
given where the benchmark has it (descriptions), or by the user as in Python: "tip_adapter(beta=1)",
"linear_probe(text=None)".
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ClipworksError, check_choice, closest
from ...registry import MethodInfo, get_method, methods, read_call
from ...zeroshot.sentences import softmax

if TYPE_CHECKING:
    from ...data.item import Item

AREAS = ("zeroshot", "heads")
TOWERS = ("prompts", "tuning")  # areas of the methods that learn from images, not from their features
ALL = {"all": AREAS, "images": TOWERS}
DESCRIBED = {"descriptions", "pairs", "pool", "assigned"}
BASELINE = "classifier"  # zero-shot: the class vectors themselves


@dataclass
class Material:
    """What a method may see.

    Attributes
    ----------
    x, y : vectors of the shots (n, dim) and their class numbers
    text, names : word vectors (C, dim) and names of the classes
    validation : vectors and class numbers to choose on, or None
    encoder : returns the encoder, for methods that write sentences of their own
    descriptions : class name -> what is known of it, or None
    scale : sharpness of zero-shot logits
    seed : of the trial
    items : the n images, for methods that look at them
    """

    x: np.ndarray
    y: np.ndarray
    text: np.ndarray
    names: list[str]
    validation: tuple[np.ndarray, np.ndarray] | None = None
    encoder: Callable[[], Any] = lambda: None
    descriptions: Any = None
    scale: float = 100.0
    seed: int = 0
    items: Sequence[Item] = ()


@dataclass
class Question:
    """Images to classify, and the classes.

    Attributes
    ----------
    x, y : vectors (n, dim) and right class numbers
    text, names : word vectors (C, dim) and names of the classes
    own : whether these are the classes that were learned
    items : the n images
    """

    x: np.ndarray
    y: np.ndarray
    text: np.ndarray
    names: list[str]
    own: bool = True
    items: Sequence[Item] = ()


@dataclass
class Answer:
    """Class numbers (n,), probabilities (n, C) if known, and what gave them: "method", or "words" where a method has
    nothing to say of new classes."""

    found: np.ndarray
    probabilities: np.ndarray | None = None
    by: str = "method"


@dataclass
class Contestant:
    """A method with its options.

    Attributes
    ----------
    spec : as it is written, "gda" or "gda(alpha=1.0)"
    info : what the registry knows
    options : arguments that differ from the defaults
    """

    spec: str
    info: MethodInfo
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> Any:
        return get_method(f"{self.info.area}/{self.info.name}")

    @property
    def learns(self) -> bool:
        """Whether it needs shots."""
        return inspect.isclass(self.target)

    @property
    def looks(self) -> bool:
        """Whether it learns from images, not from their features."""
        return self.info.area in TOWERS

    @property
    def draws(self) -> bool:
        """Whether it takes a seed."""
        return bool({"seed", "random_state"} & set(inspect.signature(self.target).parameters))

    @property
    def describes(self) -> bool:
        """Whether it takes descriptions of the classes, in any form."""
        return bool(DESCRIBED & set(inspect.signature(self.target).parameters))

    def missing(self, descriptions: bool) -> list[str]:
        """Arguments it must be given and the benchmark cannot give."""
        given = {"text", "features", "names", "encoder", "x", "y", "labels", *self.options}
        given |= DESCRIBED if descriptions else set()
        needs = _required(self.target)
        needs += _required(self.target.fit)[1:] if self.learns else []
        return [name for name in needs if name not in given]

    def fit(self, material: Material) -> Fitted:
        """Learn from the material; nothing else is ever seen."""
        if not self.learns:
            return Fitted(self, material, None)
        model = self.target(**self._arguments(material, self.target))
        if self.looks:
            return Fitted(self, material, model.fit(list(material.items), material.y, progress=False))
        takes = inspect.signature(model.fit).parameters
        extra = {"validation": material.validation} if material.validation and "validation" in takes else {}
        model.fit(material.x, material.y, **extra)
        return Fitted(self, material, model)

    def _arguments(self, material: Material, target: Any) -> dict[str, Any]:
        known = inspect.signature(target).parameters
        given: dict[str, Any] = {"text": material.text, "seed": material.seed, "random_state": material.seed}
        if self.looks:
            given |= {"encoder": material.encoder(), "names": material.names}
        if material.descriptions is not None and self.describes:
            given |= _described(material, known)
        return {**{k: v for k, v in given.items() if k in known}, **self.options}


@dataclass
class Fitted:
    """A contestant that has learned."""

    contestant: Contestant
    material: Material
    model: Any

    def answer(self, asked: Question) -> Answer:
        """Classify images among the classes that were learned, or among others, of which only words are known."""
        if self.model is None:
            return self._by_words(asked.x, asked.text, asked.names)
        if self.contestant.looks:
            model = self.model if asked.own else self.model.to_new(asked.names)
            probabilities = model.predict_proba(list(asked.items))
            return Answer(probabilities.argmax(1), probabilities)
        if not asked.own:
            return self._answer_new(asked.x, asked.text, asked.names)
        found = np.asarray(self.model.predict(asked.x)).astype(int)
        return Answer(found, self.model.predict_proba(asked.x) if hasattr(self.model, "predict_proba") else None)

    def _answer_new(self, x: np.ndarray, text: np.ndarray, names: list[str]) -> Answer:
        """Classify among new classes.

        In this order: the method's own way (`to_new`); the method with both old and new words, if it takes classes
        without shots, read off at the new ones; zero-shot.
        """
        material = self.material
        if getattr(self.model, "text_", None) is not None and hasattr(self.model, "to_new"):
            new = self.model.to_new(text, material.x)
            return Answer(np.asarray(new.predict(x)).astype(int), new.predict_proba(x))
        if hasattr(self.model, "predict_proba") and self.contestant.options.get("text", ...) is not None:
            words = np.vstack([material.text, text])
            both = dataclasses.replace(material, text=words, names=[*material.names, *names], descriptions=None)
            try:
                own = self.contestant.fit(both).model.predict_proba(x)[:, len(material.names) :]
            except (ClipworksError, IndexError):
                own = np.empty((0, 0))
            if own.shape == (len(x), len(names)):
                total = np.maximum(own.sum(1, keepdims=True), 1e-300)
                return Answer(own.argmax(1), own / total)
        logits = material.scale * (x @ text.T)
        return Answer(logits.argmax(1), softmax(logits), by="words")

    def _by_words(self, x: np.ndarray, text: np.ndarray, names: list[str]) -> Answer:
        contestant, material = self.contestant, self.material
        if contestant.info.name == BASELINE:
            logits = material.scale * (x @ text.T)
            return Answer(logits.argmax(1), softmax(logits))
        own = dataclasses.replace(material, text=text, names=names)
        scores = contestant.target(x, names, material.encoder(), **contestant._arguments(own, contestant.target))
        known = getattr(scores, "probabilities", None)
        return Answer(scores.predictions, known(material.scale) if callable(known) else known)


def contestants(specs: Sequence[str], descriptions: bool = False) -> tuple[list[Contestant], dict[str, str]]:
    """The methods that are meant, and those that cannot take part with the reason.

    Parameters
    ----------
    specs : "all" that classify features, "images" for all that learn from images, names, "-name" to leave one out,
        names with arguments "gda(alpha=1.0)", separated by commas or apart
    descriptions : whether there are descriptions of the classes
    """
    known = {info.name: info for area in (*AREAS, *TOWERS) for info in methods(area)}
    wanted: dict[str, Contestant] = {}
    removed = []
    for spec in (part for text in specs for part in split_specs(text)):
        if spec in ALL:
            wanted |= {info.name: Contestant(info.name, info) for info in all_methods(ALL[spec])}
        elif spec.startswith("-"):
            removed.append(check_choice("methods", spec[1:].replace("-", "_"), known))
        else:
            made = named(spec, known)
            wanted[made.spec] = made
    out: dict[str, str] = {}
    found = [c for c in wanted.values() if c.info.name not in removed or c.options]
    for contestant in found:
        if missing := contestant.missing(descriptions):
            out[contestant.spec] = f"needs {', '.join(missing)}"
    if not found:
        raise ClipworksError(f"methods must name at least one. Got {', '.join(specs)!r}.")
    return [c for c in found if c.spec not in out], out


def named(spec: str, known: dict[str, MethodInfo]) -> Contestant:
    """A method by name, perhaps with arguments."""
    name, options = read_call("methods", spec if "(" in spec else spec.replace("-", "_"), "gda(alpha=1.0)")
    made = Contestant(spec.replace(" ", ""), known[check_choice("methods", name, known)], options)
    if not classifies(made.info):
        raise ClipworksError(f"methods must classify features. {name!r} does not ({made.info.summary})")
    takes = inspect.signature(made.target).parameters
    for argument in options:
        if argument not in takes:
            raise ClipworksError(f"{name} has no argument {argument!r}. It takes {', '.join(takes)}."
                                 f"{closest(argument, takes)}")  # fmt: skip
    return made


def all_methods(areas: Sequence[str] = AREAS) -> list[MethodInfo]:
    """Every registered method that classifies, of features by default."""
    return [info for area in areas for info in methods(area) if classifies(info)]


def classifies(info: MethodInfo) -> bool:
    """Whether a method is the zero-shot baseline, a classifier with `fit`, or a function that scores features."""
    from sklearn.base import ClassifierMixin

    target = get_method(f"{info.area}/{info.name}")
    if inspect.isclass(target):
        return issubclass(target, ClassifierMixin) and hasattr(target, "fit") and hasattr(target, "predict")
    return info.name == BASELINE or list(inspect.signature(target).parameters)[:3] == ["features", "names", "encoder"]


def split_specs(text: str) -> list[str]:
    """Split at commas outside brackets.

    >>> split_specs("gda(alpha=1, prior='counts'), knn")
    ["gda(alpha=1, prior='counts')", 'knn']
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _required(target: Any) -> list[str]:
    """Arguments without a default; of a class, those of its constructor."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in inspect.signature(target).parameters.items()
            if p.default is p.empty and p.kind not in kinds and name != "self"]  # fmt: skip


def _described(material: Material, known: Any) -> dict[str, Any]:
    """Descriptions in the form that a method takes them: as they are, as differences, or as vectors."""
    from ...zeroshot.descriptions import contrasts
    from ...zeroshot.sentences import encode

    table = {name: material.descriptions[name] for name in material.names if name in material.descriptions}
    if not table:
        shown = ", ".join(repr(name) for name in material.names[:5])
        raise ClipworksError(f"descriptions must describe at least one of the classes. Got none of {shown}.")
    said = [table.get(name, []) for name in material.names]
    given: dict[str, Any] = {"descriptions": table}
    if "pairs" in known:
        given["pairs"] = contrasts(table)
    if "pool" in known:
        sentences = sorted({sentence for own in said for sentence in own})
        given["pool"] = encode(sentences, material.encoder())
        given["assigned"] = [[sentences.index(sentence) for sentence in own] for own in said]
    return given
