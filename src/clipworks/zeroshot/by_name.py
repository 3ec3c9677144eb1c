"""Classify features by any registered method, by its name: what a method's signature asks for, it is given.

A function of `zeroshot/` is called with features, names and encoder; a class there, or a head, is built from the class
words and fitted on the shots, or on the images themselves where it reads no labels. Nothing here names a method, but
for the forms of their results, which the explanations read.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import RegressorMixin

from ..errors import BadImage, ClipworksError, check_choice, check_range
from ..registry import get_method, methods
from ..types import Classification, Features
from .classifier import class_vectors
from .descriptions import PairDescriptions, contrasts, descriptions_of
from .seen import CHUNK
from .sentences import Scores, encode, softmax, unit
from .templates import resolve_templates

PLAIN = "zero_shot"
NONE = "none of these"
_EMPTY = inspect.Parameter.empty
ASKED = {"descriptions": "descriptions", "pairs": "descriptions", "factors": "descriptions", "pool": "descriptions"}


@dataclass
class Decision(Classification):
    """A classification by a named method.

    Attributes
    ----------
    method : its name; for "auto" with the head that it chose
    why : why this head, in one sentence (auto)
    leaderboard : a `heads.auto.Tried` for every candidate (auto)
    reasons : per image, what speaks for its class; empty unless asked for
    shot_errors : labelled images that could not be used
    """

    method: str = PLAIN
    why: str = ""
    leaderboard: list[Any] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    shot_errors: list[BadImage] = field(default_factory=list)

    def as_rows(self, top: int = 1) -> list[dict]:
        """One dictionary per item, with its reason where there is one."""
        rows = super().as_rows(top)
        return [row | {"why": why} for row, why in zip(rows, self.reasons, strict=True)] if self.reasons else rows


def classifiers() -> dict[str, str]:
    """Return the names of the methods that can classify -> their area; the plain one has none."""
    found = {PLAIN: ""} | {m.name: "zeroshot" for m in methods("zeroshot") if m.name != "classifier"}
    return found | {m.name: "heads" for m in methods("heads")}


def check_method(
    method: str,
    *,
    shots: Any = None,
    descriptions: Any = None,
    templates: str | Sequence[str] = "default",
    scale: float | None = None,
    budget: float | None = None,
) -> str:
    """Return a method's name as it is registered, or raise where it cannot work with what it is given.

    The arguments are those of `decide`; nothing is computed, so a mistake shows before any image is read.
    """
    name = check_choice("method", method.lower().replace("-", "_"), classifiers())
    takes, needs = _asks(name)
    given = {"shots": shots, "descriptions": descriptions, "scale": scale, "budget": budget,
             "templates": None if templates == "default" else templates}  # fmt: skip
    for argument, value in given.items():
        if value is not None and argument not in takes:
            raise ClipworksError(f"{argument} must be left out for method {name!r}, which has no use for it.")
    if "shots" in needs and shots is None:
        raise ClipworksError(f"method {name!r} learns from labelled images: give shots.")
    if "descriptions" in needs and descriptions is None:
        raise ClipworksError(f"method {name!r} asks what is told of the classes: give descriptions.")
    if isinstance(descriptions, str | Path):
        _json(descriptions)
    for argument, number in (("scale", scale), ("budget", budget)):
        if number is not None:
            check_range(argument, number, 0)
    chosen = resolve_templates(templates)
    if "template" in takes and templates != "default" and len(chosen) != 1:
        raise ClipworksError(f"templates must be one sentence for method {name!r}. Got {len(chosen)}.")
    return name


def check_shown(method: str, names: Sequence[str], shots: Features) -> None:
    """Raise where a method that needs an image of every class has none of some."""
    if method == PLAIN or getattr(_target(method), "unseen", True):
        return
    shown = set(shots.labels.tolist())  # type: ignore[union-attr]
    if missing := [name for name in names if name not in shown]:
        listed = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ClipworksError(f"shots must hold an image of every class in names for method {method!r}. Got none of "
                             f"{listed}; method 'auto' also takes classes that only their words tell.")  # fmt: skip


def decide(
    features: Features,
    names: Sequence[str],
    encoder: Any,
    method: str = PLAIN,
    *,
    shots: Features | None = None,
    descriptions: Any = None,
    templates: str | Sequence[str] = "default",
    scale: float | None = None,
    budget: float | None = None,
    explain: bool = False,
) -> Decision:
    """Classify features by a method.

    Parameters
    ----------
    features : of the images, by `encoder`
    names : at least two class names
    encoder : anything with `texts` and `logit_scale`
    method : "zero_shot", or the name of a method of `zeroshot` or `heads`
    shots : labelled features; labels are class names
    descriptions : a mapping or JSON file of what the method asks for: names -> descriptions, for `fudd` also pairs of
        names, for `perceptionclip` factors -> values (or nothing)
    templates, scale, budget : for methods that have such a setting; templates make the class words of all others
    explain : fill `reasons`
    """
    if len(names) < 2:
        raise ClipworksError(f"names must hold at least 2 classes to choose between. Got {list(names)!r}.")
    method = check_method(method, shots=shots, descriptions=descriptions, templates=templates, scale=scale,
                          budget=budget)  # fmt: skip
    if shots is not None:
        check_shown(method, names, shots)
    words = class_vectors(names, encoder, templates=templates).numpy()
    x = unit(np.asarray(features.vectors, np.float32))
    if shots is not None:
        rows = unit(np.asarray(shots.vectors, np.float32))
        shots = Features(rows, shots.keys, shots.labels, fingerprint=shots.fingerprint)
    scale_ = float(encoder.logit_scale) if scale is None else scale
    asked = _Asked(names, encoder, words, shots, descriptions, templates, scale, scale_, budget)
    found = Decision(list(features.keys), list(names), np.empty((0, len(names)), np.float32), method=method)
    if not len(x):
        return found
    result: Any = None
    if method == PLAIN:
        found.probabilities = softmax(scale_ * (x @ words.T))
    else:
        target = _target(method)
        if inspect.isfunction(target):
            result = target(x, names, encoder, **asked.arguments(_parameters(target)))
            p = result.probabilities
            found.probabilities = p(scale_) if callable(p) else p
        else:
            made = target(**asked.arguments(_parameters(target)))
            if not _labelled(target):
                result = made.fit(x)
            else:
                result = made.fit() if shots is None else made.fit(shots, shots.labels)
            found.names, found.probabilities = _probabilities(result, x, list(names), scale_)
    found.probabilities = np.asarray(found.probabilities, np.float32)
    if hasattr(result, "leaderboard_"):
        found.why, found.leaderboard = result.why_, result.leaderboard_
        found.method = f"{method}: {result.chosen_}"
    if explain:
        found.reasons = _reasons(result, found, x, asked)
    return found


@dataclass
class _Asked:
    """What there is to give to a method."""

    names: Sequence[str]
    encoder: Any
    words: np.ndarray
    shots: Features | None
    descriptions: Any
    templates: str | Sequence[str]
    scale: float | None
    scale_: float
    budget: float | None

    def arguments(self, parameters: Iterable[str]) -> dict[str, Any]:
        """What a method's signature asks for."""
        found: dict[str, Any] = {}
        for name in parameters:
            if name in ASKED:
                if self.descriptions is not None:
                    found[name] = getattr(self, f"_{name}")()
            elif name == "text":
                found[name] = Features(self.words, labels=np.array(self.names), keys=list(self.names))
            elif name == "names":
                found[name] = list(self.names)
            elif name == "assigned" and self.descriptions is not None:
                found[name] = [[self.pooled.index(d) for d in own] for own in self.told]
            elif name == "template" and self.templates != "default":
                (found[name],) = resolve_templates(self.templates)
            elif name == "templates" and self.templates != "default":
                found[name] = self.templates
            elif name == "scale":
                found[name] = self.scale_
            elif name == "budget" and self.budget is not None:
                found[name] = self.budget
        return found

    @functools.cached_property
    def told(self) -> list[list[str]]:
        return descriptions_of(self.names, self.descriptions)

    @functools.cached_property
    def pooled(self) -> list[str]:
        return list(dict.fromkeys(d for own in self.told for d in own))

    def _descriptions(self) -> Any:
        return self.descriptions

    def _pool(self) -> np.ndarray:
        return encode(self.pooled, self.encoder)

    def _pairs(self) -> Any:
        if isinstance(self.descriptions, str | Path) and isinstance(_json(self.descriptions), list):
            return PairDescriptions.read(self.descriptions)
        if isinstance(self.descriptions, Mapping) and all(isinstance(k, tuple) for k in self.descriptions):
            return self.descriptions
        return contrasts(self.descriptions)

    def _factors(self) -> Any:
        return _json(self.descriptions) if isinstance(self.descriptions, str | Path) else self.descriptions


def _target(method: str) -> Any:
    return get_method(f"{classifiers()[method]}/{method}")


def _parameters(target: Any) -> dict[str, inspect.Parameter]:
    """What a method can be given: of a function what comes after features, names and encoder."""
    return dict(list(inspect.signature(target).parameters.items())[3 if inspect.isfunction(target) else 0 :])


def _labelled(kind: type) -> bool:
    """Whether a class learns from labels; it says so itself, or its `fit` cannot do without them."""
    return getattr(kind, "labelled", _fit(kind)[1].default is _EMPTY)


def _fit(kind: Any) -> list[inspect.Parameter]:
    """What `fit` takes: images, labels, and more by name."""
    return list(inspect.signature(kind.fit).parameters.values())[1:]


def _asks(method: str) -> tuple[set[str], set[str]]:
    """Which arguments of `decide` a method can be given, and which it must be."""
    if method == PLAIN:
        return {"templates", "scale"}, set()
    target = _target(method)
    parameters = _parameters(target)
    takes = {ASKED.get(name, name) for name in parameters}
    needs = {ASKED[name] for name in ASKED.keys() & parameters.keys() if parameters[name].default is _EMPTY}
    if takes & {"text", "template"}:
        takes.add("templates")
    if inspect.isclass(target) and issubclass(target, RegressorMixin):
        raise ClipworksError(f"method must be a classifier. Got {method!r}, which orders images by a number.")
    if inspect.isclass(target) and _labelled(target):
        takes.add("shots")
        needs |= {"shots"} if _fit(target)[0].default is _EMPTY else set()
    return takes, needs


def _json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClipworksError(f"descriptions must be a JSON file. {str(path)!r}: {error}.") from None


def _probabilities(fitted: Any, x: np.ndarray, names: list[str], scale: float) -> tuple[list[str], np.ndarray]:
    """Class names and probabilities (n, C) of a fitted classifier, in the order of the names."""

    def all_of(ask: Callable) -> np.ndarray:
        return np.concatenate([ask(x[i : i + CHUNK]) for i in range(0, len(x), CHUNK)])

    if hasattr(fitted, "threshold_"):  # it may answer that an image is of none of the classes
        known = all_of(fitted.decision_function) > 0
        p = softmax(scale * (x @ fitted.text_.T)) * known[:, None]
        return [*names, NONE], np.column_stack([p, ~known])
    p = all_of(fitted.predict_proba) if hasattr(fitted, "predict_proba") else softmax(all_of(fitted.decision_function))
    column = {label: i for i, label in enumerate(fitted.classes_.tolist())}
    return names, p[:, [column[name] for name in names]]


def _reasons(result: Any, found: Decision, x: np.ndarray, asked: _Asked) -> list[str]:
    """What speaks for the class of every image, as far as the method can say."""
    cosine, best = x @ asked.words.T, found.probabilities.argmax(1)
    if hasattr(result, "selected"):
        chosen, pool = result.selected(x), asked._pool()
        return [_listed((asked.pooled[d], pool[d] @ x[i]) for d in chosen[i].get(found.labels[i], ()))
                for i in range(len(x))]  # fmt: skip
    if hasattr(result, "explain"):
        told = [result.explain(i) for i in range(len(x))]
        return [_listed((e.descriptor, e.similarity) for e in t.evidence if e.margin > 0) or "no descriptor fired alone"
                for t in told]  # fmt: skip
    if hasattr(result, "sentences"):
        said = [result.sentences(i)[found.labels[i]] for i in range(len(x))]
        rows = {s: row for s, row in _encoded({s for own in said for s in own}, asked.encoder)}
        return [_listed(sorted(((s, rows[s] @ v) for s in own), key=lambda e: -e[1]))
                for own, v in zip(said, x, strict=True)]  # fmt: skip
    if hasattr(result, "contexts"):
        most = result.context_probabilities.argmax(1)
        return [", ".join(f"{k}: {v or 'none'}" for k, v in result.contexts[z].items())
                + f" ({p:.2f})" for z, p in zip(most, result.context_probabilities.max(1), strict=True)]  # fmt: skip
    if isinstance(result, Scores) or asked.shots is None or getattr(result, "chosen_", "") == PLAIN:
        return [_lead(cosine[i], asked.names, int(best[i])) for i in range(len(x))]
    return nearest_shots(x, asked.shots)


def nearest_shots(x: np.ndarray, shots: Features, count: int = 3) -> list[str]:
    """The labelled images most like each image."""
    found: list[str] = []
    for start in range(0, len(x), 1024):
        cosine = x[start : start + 1024] @ shots.vectors.T
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :count]
        for of, near in zip(cosine, order, strict=True):
            found.append("like " + ", ".join(f"{shots.keys[j]} ({shots.labels[j]}, {of[j]:.2f})" for j in near))  # type: ignore[index]
    return found


def _encoded(sentences: set[str], encoder: Any) -> Iterable[tuple[str, np.ndarray]]:
    listed = sorted(sentences)
    return zip(listed, encode(listed, encoder), strict=True)


def _listed(evidence: Iterable[tuple[str, float]], count: int = 3) -> str:
    return ", ".join(f"{said} ({value:.2f})" for said, value in list(evidence)[:count])


def _lead(cosine: np.ndarray, names: Sequence[str], best: int) -> str:
    """How near the words are: of the class that was given, and of the next."""
    if best >= len(names):
        return f"nearest words: {names[int(cosine.argmax())]} ({cosine.max():.2f}), too far"
    other = max((i for i in range(len(names)) if i != best), key=lambda i: cosine[i])
    return f"words: {names[best]} ({cosine[best]:.2f}), next {names[other]} ({cosine[other]:.2f})"
