"""What the methods of this room share: an estimator that changes an encoder's weights and classifies with the result.

A method is a subclass of `Tuner` with its settings as keywords, `Method(names=None, *, encoder=None, ..., seed=0)`, and
with as many of these parts as it needs:

    _shape(encoder)                  brings a copy of the encoder into the form that is trained: module swaps
                                     (`layers.swap`), longer tables. `load` repeats it, so settings, seed and the
                                     encoder's weights alone may decide what it does.
    _train(start, shots, progress)   trains and returns `Tuned`: the encoder, and a classifier head if it has its own.
                                     Usually one call of `run`, which is the training loop with a recipe.
    _merge(encoder)                  undoes `_shape` with the change folded in; left out where `_shape` swaps nothing.
    frozen                           patterns of what does not learn, see `training.optim.freeze` and `only`
    pairs = True                     `fit` takes a text per image (labels speak through the templates).
    neutral = False                  with a step of size zero it is something else than zero-shot CLIP
    merges = False                   no ordinary encoder says the same
    also_written                     tensors that chance gave and `save` writes though training leaves them as they are

The base does the rest: it checks images and labels, averages start and result (`alpha`, WiSE-FT), classifies (class
words in the changed encoder, or the head), saves the tensors that changed and nothing else, and loads them onto the
same encoder. Recipes to build on: `class_words.ClassRecipe` (cross-entropy against the class words, encoded anew in
every step where the text tower learns), `ClassifierRecipe` and `SentenceRecipe` of `training/finetune.py`, all of
`pretraining/`. `linears` names the linear maps of both towers. Settings have to fit JSON, for `save`.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from ..data.item import Item
from ..encoders.encoder import Encoder
from ..encoders.loading import resolve
from ..errors import BadWeights, ClipworksError, check_choice, check_range
from ..heads.common import class_numbers, softmax
from ..training.augment import resolve_augment
from ..training.finetune import ClassifierRecipe
from ..training.loop import train
from ..training.optim import freeze
from ..training.recipe import Recipe
from ..training.wise_ft import interpolate
from ..zeroshot.classifier import check_names, class_vectors
from .files import read_change, write_change
from .shots import Shots, as_given, captioned, check_images, labelled

TEMPLATE = "a photo of a {}."
ALPHAS = tuple(step / 10 for step in range(11))  # shares of the change to choose from, cautious first
PARTS = {"q": "attention.q", "k": "attention.k", "v": "attention.v", "o": "attention.out", "up": "mlp.up",
         "down": "mlp.down"}  # fmt: skip
TOWERS = {"both": ("visual", "text"), "vision": ("visual",), "text": ("text",)}
T = TypeVar("T", bound="Tuner")


class Tuned(NamedTuple):
    """What training gives: the encoder, the losses of the last step, and what the recipe itself has learned."""

    encoder: Encoder
    losses: dict[str, float]
    parts: Mapping[str, torch.Tensor] = MappingProxyType({})

    @property
    def head(self) -> torch.Tensor | None:
        """Rows of a trained classifier head, (C, dim)."""
        return self.parts.get("head.weight")


class Tuner(ClassifierMixin, BaseEstimator, ABC):
    """Base of the methods that change weights.

    After `fit`: `encoder_` (the changed encoder), `classes_` (labels, the order of all columns), `classifier_` (C, dim)
    rows that images are compared with, `alpha_` share of the change that was kept, `losses_` of the last step.
    """

    pairs: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ("log_scale",)  # small sets make the scale drift
    also_changed: ClassVar[frozenset[str]] = frozenset()  # tensors that `_train` sets besides what learns
    also_written: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    names: Any
    encoder: Any
    templates: Any
    seed: int
    encoder_: Encoder
    names_: list[str] | None
    classes_: np.ndarray
    classifier_: torch.Tensor | None
    alpha_: float
    losses_: dict[str, float]

    # -- what a method defines -----------------------------------------------------------------------------------

    def _shape(self, encoder: Encoder) -> None:
        """Bring the copy of the encoder into the form that is trained, in place."""

    @abstractmethod
    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        """Train what `_shape` gave; a copy, as `run` makes it."""

    def _merge(self, encoder: Encoder) -> None:
        """Undo `_shape` in place, with the change folded in."""

    # -- what the base does --------------------------------------------------------------------------------------

    def fit(self: T, images: Any, y: Any, *, validation: Any = None, progress: bool | None = None) -> T:
        """Learn from images with labels, or with texts if the method takes pairs.

        Parameters
        ----------
        images : list of paths, PIL images, encoded bytes or uint8 arrays; or a float tensor of preprocessed pixels
            (n, 3, H, W), of which no views are drawn
        y : n labels: numbers into `names`, or the names themselves; a method on pairs also takes n captions
        validation : (images, labels) on which `alpha` is chosen, where that is None
        progress : True shows a bar; default: on a terminal

        Raises
        ------
        ClipworksError
            If images, labels and names do not fit together, there are fewer than two classes, or a setting is out of
            its range.
        BadImage
            At the first image that cannot be read.
        """
        shots = self._open(images, y)
        start = self._shaped(resolve(self.encoder))
        chosen = getattr(self, "alpha", 1.0)
        if chosen is not None:
            check_range("alpha", chosen, 0, 1)
        if (chosen is None) != (validation is not None):
            got = "no" if validation is None else "a"
            raise ClipworksError("validation and alpha=None go together: alpha is chosen on the validation images. "
                                 f"Got alpha {chosen!r} and {got} validation.")  # fmt: skip
        held = None if validation is None else self._held(validation)
        self._take(start, self._train(start, shots, progress), chosen, held)
        return self

    def logits(self, images: Any, *, batch_size: int = 32, progress: bool | None = None) -> np.ndarray:
        """Return logit scale * cosine of every image and class, (n, C); a head's rows have their own lengths."""
        check_is_fitted(self, "encoder_")
        if self.classifier_ is None:
            raise ClipworksError("names must be given to classify: the method was fitted on captions alone. Got None.")
        rows = self.encoder_.images(as_given(images), batch_size=batch_size, progress=progress)
        return (self.encoder_.logit_scale * (rows @ self.classifier_.T)).numpy()

    def predict_proba(self, images: Any) -> np.ndarray:
        """Return probabilities (n, C), columns in the order of `classes_`."""
        return softmax(self.logits(images))

    def predict(self, images: Any) -> np.ndarray:
        """Return the most probable label of every image."""
        best = self.logits(images).argmax(1)
        return self.classes_[best]

    def score(self, images: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the share of images that get their label."""
        best, labels = self.logits(images).argmax(1), np.asarray(y)
        if labels.shape != best.shape:
            raise ClipworksError(f"y must have one entry per image ({len(best)}). Got shape {labels.shape}.")
        return float(np.average(best == class_numbers("y", labels, self.classes_), weights=sample_weight))

    def merge(self) -> Encoder:
        """Return an ordinary encoder with the change folded into its weights, for `encoders.loading.save` too."""
        check_is_fitted(self, "encoder_")
        if not self.merges:
            raise ClipworksError(f"merge needs a change that can be folded into an ordinary encoder. That of "
                                 f"{type(self).__name__} cannot: use encoder_, and save.")  # fmt: skip
        encoder = copy.deepcopy(self.encoder_)
        self._merge(encoder)
        return encoder

    def to_new(self: T, names: Sequence[str]) -> T:
        """Return the same changed encoder with other classes, read by their words; labels are 0, 1, ..."""
        check_is_fitted(self, "encoder_")
        made = copy.copy(self)
        made.names_, made._own_head = check_names(names), False
        made.classes_ = np.arange(len(made.names_))
        made.classifier_ = made._words(made.encoder_)
        return made

    def save(self, path: str | os.PathLike) -> Path:
        """Write the tensors that changed, and the settings, into one safetensors file; returns its path."""
        check_is_fitted(self, "encoder_")
        base = resolve(self.encoder)
        before, after = self._shaped(base).state_dict(), self.encoder_.state_dict()
        changed = {
            name: value for name, value in after.items()
            if name in self.also_written or not torch.equal(value.cpu(), before[name].cpu())
        }  # fmt: skip
        if self._own_head:
            changed["classifier"] = self.classifier_  # type: ignore[assignment]
        every = self.get_params(deep=False)
        settings = {k: v for k, v in every.items() if k != "encoder" and not isinstance(v, torch.nn.Module)}
        record = {
            "method": type(self).__name__, "settings": settings, "classes": self.classes_.tolist(),
            "names": self.names_, "alpha": self.alpha_, "fingerprint": base.fingerprint,
            "encoder": self.encoder if isinstance(self.encoder, str) else None,
        }  # fmt: skip
        return write_change(path, record, changed)

    @classmethod
    def load(cls: type[T], path: str | os.PathLike, *, encoder: Any = None, **modules: Any) -> T:
        """Return the fitted method of a file that `save` wrote.

        Parameters
        ----------
        path : the file
        encoder : the encoder it was fitted on, or its name (default: the name in the file, else the bundled one)
        modules : other settings that are models, which are not in the file
        """
        record, changed = read_change(path)
        if record["method"] != cls.__name__:
            raise ClipworksError(f"path must be a file of {cls.__name__}. {str(path)!r} is one of {record['method']}.")
        settings = {**record["settings"], **modules}
        made = cls(**settings, encoder=record["encoder"] if encoder is None else encoder)
        base = resolve(made.encoder)
        if base.fingerprint != record["fingerprint"]:
            raise ClipworksError(f"encoder must be the one that {str(path)!r} was fitted on, "
                                 f"{record['fingerprint'][:12]}. Got {base.fingerprint[:12]}.")  # fmt: skip
        head = changed.pop("classifier", None)
        made.encoder_ = made._shaped(base)
        if unknown := made.encoder_.load_state_dict(changed, strict=False).unexpected_keys:
            raise BadWeights(f"{path}: unknown tensors, for example {unknown[0]!r}.")
        made.names_, made.classes_ = record["names"], np.asarray(record["classes"])
        made.alpha_, made.losses_, made._own_head = record["alpha"], {}, head is not None
        made.classifier_ = made._words(made.encoder_) if head is None else head
        return made

    # -- inside --------------------------------------------------------------------------------------------------

    _own_head = False

    def _shaped(self, base: Encoder) -> Encoder:
        encoder = copy.deepcopy(base).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._shape(encoder)
        return encoder.to(encoder.device).eval()  # what was added to it comes from the CPU

    def _open(self, images: Any, y: Any) -> Shots:
        """Check what `fit` is given; sets `classes_` and `names_`."""
        listed = check_images(images)
        labels = np.asarray(y)
        if y is None or labels.shape != (len(listed),):
            got = "None" if y is None else f"shape {labels.shape}"
            raise ClipworksError(f"y must have one entry per image ({len(listed)}). Got {got}.")
        words = labels.dtype.kind in "UOS"
        self.names_ = None if self.names is None else check_names(self.names)
        if self.pairs and words and not set(labels.tolist()) <= set(self.names_ or ()):
            self.classes_ = np.asarray(self.names_ or [])
            return captioned(listed, labels.tolist())
        if self.names_ is None:
            if not words:
                raise ClipworksError("names must be given where y holds numbers. Got None.")
            self.names_ = check_names(sorted(set(labels.tolist())))
        if len(self.names_) < 2:
            raise ClipworksError(f"names must hold at least 2 classes. Got {self.names_}.")
        self.classes_ = np.asarray(self.names_) if words else np.arange(len(self.names_))
        return labelled(listed, class_numbers("y", labels, self.classes_), self.names_)

    def _held(self, validation: Any) -> tuple[Any, np.ndarray]:
        if not isinstance(validation, tuple | list) or len(validation) != 2:
            raise ClipworksError(f"validation must be (images, labels). Got {type(validation).__name__}.")
        count, labels = len(check_images(validation[0])), np.asarray(validation[1])
        if labels.shape != (count,) or not len(self.classes_):
            raise ClipworksError(f"validation must have one label per image ({count}), and names must be given. "
                                 f"Got shape {labels.shape}.")  # fmt: skip
        return validation[0], class_numbers("validation", labels, self.classes_)

    def _words(self, encoder: Encoder) -> torch.Tensor | None:
        """Class-word vectors in an encoder, None without names."""
        if self.names_ is None:
            return None
        rows = class_vectors(self.names_, encoder, templates=self.templates)
        return rows.to(torch.promote_types(encoder.dtype, torch.float32))

    def _take(self, start: Encoder, tuned: Tuned, alpha: float | None, held: Any) -> None:
        """Set what was learned, at `alpha` on the way from the start; None: where held-out images are best."""
        encoder, head = tuned.encoder.eval(), tuned.head
        self.losses_, self._own_head = tuned.losses, head is not None
        ends: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        if alpha != 1:
            rows = ({}, {}) if head is None else ({"head": self._words(start)}, {"head": head})
            last = {name: value.clone() for name, value in encoder.state_dict().items()}
            ends = ({**start.state_dict(), **rows[0]}, {**last, **rows[1]})

        def move(share: float) -> None:
            own = head
            if ends[0]:
                state = interpolate(*ends, share)
                own = state.pop("head", None)
                encoder.load_state_dict(state)
                encoder.refresh()
            self.encoder_, self.alpha_ = encoder, share
            self.classifier_ = self._words(encoder) if own is None else own

        def accuracy(share: float) -> float:
            move(share)
            return float(np.mean(self.logits(held[0]).argmax(1) == held[1]))

        move(max(ALPHAS, key=accuracy) if alpha is None else alpha)  # the first of equals


def run(start: Encoder, items: Sequence[Item], recipe: Recipe, *, batch_size: int, **options: Any) -> Tuned:
    """Train a copy of an encoder with a recipe, in memory; `options` as in `training.loop.train`.

    Parameters
    ----------
    start : as it came from `_shape`; it is not changed
    items : images; whole batches only, so a batch is never larger than their number
    """
    check_range("batch_size", batch_size, 1)
    report = train(list(items), start, out=None, recipe=recipe, batch_size=min(batch_size, len(items)), **options)
    return Tuned(report.encoder, report.losses, report.parts)  # type: ignore[arg-type]


def run_head(start: Encoder, items: Sequence[Item], table: Mapping[str, str], head: torch.Tensor, augment: str,
             **options: Any) -> Tuned:  # fmt: skip
    """Train a classifier head, and what of the encoder is not frozen; `options` as in `run`.

    Parameters
    ----------
    table : label -> class name, in the order of the head's rows
    head : rows to begin with, (C, dim)
    augment : name of the views
    """
    return run(start, items, ClassifierRecipe(list(table), head, resolve_augment(augment)), **options)


def only(*patterns: str) -> tuple[str, ...]:
    """Return `freeze` patterns that leave nothing to learn but what these match.

    >>> only("visual.*")
    ('*', '!visual.*')
    """
    return ("*", *(f"!{pattern}" for pattern in patterns))


def linears(encoder: Encoder, parts: Sequence[str] = tuple(PARTS), towers: str = "both") -> list[str]:
    """Return the paths of linear maps in the blocks of the towers, front to back.

    Parameters
    ----------
    parts : of "q", "k", "v", "o", "up", "down"
    towers : "both", "vision" or "text"; a ResNet has no blocks
    """
    if isinstance(parts, str) or not parts:
        raise ClipworksError(f"parts must be a list of {', '.join(map(repr, PARTS))}. Got {parts!r}.")
    inner = [PARTS[check_choice("parts", part, PARTS)] for part in parts]
    found = [
        f"{tower}.blocks.{i}.{path}"
        for tower in TOWERS[check_choice("towers", towers, TOWERS)]
        for i in range(len(getattr(getattr(encoder, tower), "blocks", ())))
        for path in inner
    ]
    if not found:
        raise ClipworksError(f"towers must name a transformer. Got {towers!r}, which has no blocks in this encoder.")
    return found


def learning(encoder: Encoder, patterns: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the parameters that learn under `freeze` patterns, by name; the encoder is left as it is."""
    names = dict(encoder.named_parameters())
    before = {name: parameter.requires_grad for name, parameter in names.items()}
    frozen = set(freeze(encoder, patterns))
    for name, parameter in names.items():
        parameter.requires_grad_(before[name])
    return {name: parameter for name, parameter in names.items() if name not in frozen}
