"""What the heads share: checked shots, folds, the sum with zero-shot logits, the choice of settings, temperature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from ..errors import ClipworksError, check_range, closest
from ..types import Features
from ..zeroshot.sentences import softmax, unit
from .temperature import calibrate, fit_temperature, spread

if TYPE_CHECKING:
    from typing_extensions import Self

SCALE = 100.0  # zero-shot logits are SCALE * cosine, as in CLIP after training
ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)  # weights of a head beside the zero-shot logits, cautious first


@dataclass
class Shots:
    """Labelled images that passed the checks.

    Attributes
    ----------
    x : vectors (n, dim), float64
    y : numbers of classes (n,), into `classes_`
    classes : how many classes there are
    groups : n numbers; rows that share one are views of one image
    validation : vectors and class numbers of the images to choose on; None: the shots choose by cross-validation
    """

    x: np.ndarray
    y: np.ndarray
    classes: int
    groups: np.ndarray
    validation: tuple[np.ndarray, np.ndarray] | None = None

    @cached_property
    def testable(self) -> np.ndarray:
        """Rows (as a mask) that can be left out: their class has another image."""
        return fold_numbers(self.y, self.groups, 2) >= 0

    @property
    def held(self) -> tuple[np.ndarray, np.ndarray]:
        """Vectors and class numbers of the images to choose on: validation, or the rows that can be left out."""
        return self.validation or (self.x[self.testable], self.y[self.testable])

    @cached_property
    def images(self) -> np.ndarray:
        """Number of every row's image: rows of one class and group share it."""
        return np.unique(np.stack([self.y, self.groups]), axis=1, return_inverse=True)[1].reshape(-1)

    @property
    def held_images(self) -> np.ndarray | None:
        """The image of every row of `held` that is a shot itself, which its own image may not answer; else None."""
        return self.images[self.testable] if self.validation is None else None

    def splits(self, folds: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows to train on, vectors and class numbers to choose on: the validation images, or one split per fold."""
        if self.validation is not None:
            return [(np.arange(len(self.y)), *self.validation)]
        fold = fold_numbers(self.y, self.groups, folds)
        parts = ((np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(folds))
        return [(train, self.x[held], self.y[held]) for train, held in parts if len(held)]


class Head(ClassifierMixin, BaseEstimator, ABC):
    """Base of the heads. A head defines `_learn` (or a `fit` of its own) and `_scores`; `text` and `alpha` are settings
    of every head.

    After `fit`: `classes_` (sorted labels, the order of all columns), `text_` (C, dim) unit rows or None, `alpha_`
    weight of the head beside the zero-shot logits, `temperature_`.
    """

    alphas: Sequence[float] = ALPHAS
    unseen: ClassVar[bool] = False  # whether there may be classes without shots, known by their words
    labelled: ClassVar[bool] = True  # whether it learns from the labels of images, and not from the words' answers
    steady: ClassVar[bool] = False  # whether `auto` prefers it where held-out shots cannot tell it from the best
    effort: ClassVar[int] = 2  # to fit: 0 nothing, 1 closed form or nothing trained, 2 convex search, 3 gradient steps

    text: Any
    alpha: float | None
    classes_: np.ndarray
    text_: np.ndarray | None
    alpha_: float
    temperature_: float

    def fit(self, x: Any, y: Any = None, *, groups: Any = None, validation: Any = None) -> Self:
        """Learn from shots; the settings left open come from shots that are held out, or from `validation`.

        Parameters
        ----------
        x : vectors (n, dim), or `Features`; views of an image are rows of their own
        y : n labels (default: those of the features)
        groups : n numbers or names; rows that share one are views of one image and are held out together
        validation : (x, y) or `Features` with labels: choose on these images instead

        Returns
        -------
        the head itself

        Raises
        ------
        ClipworksError
            If rows, labels, words, groups or `validation` do not fit together, hold NaN or infinity, or are of fewer
            than two classes; if a class of `text` has no shot, but for heads that learn it from its word; or if a
            setting is out of its range.
        """
        shots = self._open(x, y, groups, validation)
        self._take(self._learn(shots), shots)
        return self

    def logits(self, x: Any) -> np.ndarray:
        """Return uncalibrated logits (n, C): SCALE * cos(x, text) + alpha_ * scores, or the scores without text."""
        check_is_fitted(self, "temperature_")
        x = check_vectors(self, x)
        return self._sum(x, self._scores(x))

    def predict_proba(self, x: Any) -> np.ndarray:
        """Return calibrated probabilities (n, C), columns in the order of `classes_`."""
        return softmax(self.logits(x) / self.temperature_)

    def predict(self, x: Any) -> np.ndarray:
        """Return the most probable label of every row."""
        best = self.logits(x).argmax(1)
        return self.classes_[best]

    def score(self, x: Any, y: Any = None) -> float:  # type: ignore[override]
        """Return the share of rows that get their label (`y`, or the labels of `Features`)."""
        y = x.labels if y is None and isinstance(x, Features) else y
        if y is None:
            raise ClipworksError("y must hold one label per row to score against. Got None.")
        found, labels = self.predict(x), np.asarray(y)
        if labels.shape != found.shape:
            raise ClipworksError(f"y must hold one label per row ({len(found)}). Got shape {labels.shape}.")
        return float(np.mean(found == labels))

    def _learn(self, shots: Shots) -> Choice:
        """Check the settings, learn from shots, return what was chosen on images held out (here: nothing)."""
        return self._choice()

    @abstractmethod
    def _scores(self, x: np.ndarray) -> np.ndarray:
        """Return scores (n, C) of checked rows."""

    def _sum(self, x: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return scores if self.text_ is None else zero_shot(x, self.text_) + self.alpha_ * scores

    def _open(self, x: Any, y: Any, groups: Any = None, validation: Any = None) -> Shots:
        """Check everything `fit` is given; sets `classes_`, `text_`."""
        y = x.labels if y is None and isinstance(x, Features) else y
        vectors, y = check_vectors(self, x, y, fit=True)
        self.classes_, self.text_ = class_words(self.text, y, vectors.shape[1], fingerprint(x))
        if len(self.classes_) < 2:
            raise ClipworksError(f"y must hold at least 2 classes. Got 1 class, {self.classes_[0]!r}.")
        codes = class_numbers("y", y, self.classes_)
        count = np.bincount(codes, minlength=len(self.classes_))
        if not self.unseen and not count.all():
            names = ", ".join(repr(c) for c in self.classes_[count == 0][:5].tolist())
            raise ClipworksError(f"y must hold a shot of every class of text. Got none of {names}.")
        if self.alpha is not None:
            check_range("alpha", self.alpha, 0)
        groups = np.arange(len(codes)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
        if groups.shape != codes.shape:
            raise ClipworksError(f"groups must have one entry per row ({len(codes)}). Got shape {groups.shape}.")
        return Shots(vectors, codes, len(self.classes_), groups, self._validation(validation))

    def _validation(self, validation: Any) -> tuple[np.ndarray, np.ndarray] | None:
        if validation is None:
            return None
        if isinstance(validation, Features):
            validation = (validation, validation.labels)
        if not isinstance(validation, tuple | list) or len(validation) != 2 or validation[1] is None:
            raise ClipworksError(f"validation must be (x, y) or Features with labels. Got {type(validation).__name__}.")
        x, y = check_vectors(self, validation[0]), np.asarray(validation[1])
        if y.shape != (len(x),):
            raise ClipworksError(f"validation must have one label per row ({len(x)}). Got shape {y.shape}.")
        return x, class_numbers("validation", y, self.classes_)

    def _choice(self, *held: tuple[np.ndarray, ...]) -> Choice:
        """An empty choice on held-out images: vectors and class numbers, also as the end of `Shots.splits`."""
        y = np.concatenate([part[-1] for part in held]) if held else np.zeros(0, int)
        rows = None if self.text_ is None or not held else np.concatenate([part[-2] for part in held])
        zero = None if rows is None or self.text_ is None else zero_shot(rows, self.text_)
        return Choice(y, zero, tuple(self.alphas) if self.alpha is None else (self.alpha,))

    def _take(self, choice: Choice, shots: Shots | None = None) -> None:
        """Set `alpha_` and `temperature_` from a choice.

        Where nothing could be held out the temperature is 1, and the head has as much say as the words: its scores of
        the shots, times alpha, spread over the classes as far as the zero-shot logits do.
        """
        self.alpha_ = 1.0 if self.alpha is None or self.text_ is None else float(self.alpha)
        self.temperature_ = 1.0
        if choice.logits is not None:
            self.alpha_, self.temperature_ = choice.alpha, fit_temperature(choice.logits, choice.y)
        elif shots is not None and self.text_ is not None and self.alpha is None:
            own, words = spread(self._scores(shots.x)), spread(zero_shot(shots.x, self.text_))
            self.alpha_ = words / own if own > 0 else 1.0


class Choice:
    """The setting with the highest accuracy on held-out images.

    Among equals it is the one whose probabilities, once calibrated, are the likeliest: a few images often get the same
    answers from the words alone and with a head beside them, which is then surer. What is left goes to the first.

    Parameters
    ----------
    y : class numbers of the held-out images
    zero : their zero-shot logits, or None
    alphas : weights to try for the head beside them
    """

    def __init__(self, y: np.ndarray, zero: np.ndarray | None, alphas: tuple[float, ...]):
        self.y, self.zero, self.alphas = y, zero, alphas if zero is not None else (1.0,)
        self.setting: Any = None
        self.alpha, self.accuracy = 1.0, -1.0
        self.logits: np.ndarray | None = None
        self._loss: float | None = None  # of the best, once another was as accurate

    def offer(self, setting: Any, scores: np.ndarray) -> float:
        """Try a setting that gives the held-out images these scores (m, C); returns its accuracy at its best weight."""
        best = -1.0
        for alpha in self.alphas if len(self.y) else ():
            logits = scores if self.zero is None else self.zero + alpha * scores
            accuracy = float(np.mean(logits.argmax(1) == self.y))
            best = max(best, accuracy)
            loss = None
            if accuracy == self.accuracy and self.logits is not None:
                self._loss = calibrate(self.logits, self.y)[1] if self._loss is None else self._loss
                loss = calibrate(logits, self.y)[1]
            if accuracy > self.accuracy or (loss is not None and self._loss is not None and loss < self._loss - 1e-9):
                self.setting, self.alpha, self.accuracy, self.logits = setting, alpha, accuracy, logits
                self._loss = loss
        return best


def zero_shot(x: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Return SCALE * cosine between rows of x and (unit) rows of text."""
    return SCALE * (unit(x) @ text.T)


def one_hot(y: np.ndarray, classes: int) -> np.ndarray:
    """Return (n, classes) with a 1 in the column of each row's class."""
    return (y[:, None] == np.arange(classes)).astype(float)


def fold_numbers(y: np.ndarray, groups: np.ndarray, folds: int) -> np.ndarray:
    """Return the fold of every row; -1 for the only image of a class, which is never held out.

    The images of a class go round the folds, each class starting one later than the last, so that with fewer images
    than folds only a few classes lose one at a time.

    >>> fold_numbers(np.array([0, 0, 1, 1, 2]), np.arange(5), 5)
    array([ 0,  1,  1,  2, -1])
    """
    images, inverse = np.unique(np.stack([y, groups]), axis=1, return_inverse=True)
    owner = images[0]
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
    single = np.bincount(owner)[owner] < 2
    return np.where(single, -1, (rank + owner) % folds)[inverse.reshape(-1)]


def class_words(text: Any, y: np.ndarray, dim: int, made_by: str = "") -> tuple[np.ndarray, np.ndarray | None]:
    """Return the sorted classes and their unit word vectors in that order (None without text).

    A matrix goes with the labels 0..C-1, or with the sorted labels if they are numbers and as many; `Features` name
    their rows by `labels`, in any order. Labels that are words need these: sorted, they may not be in the order of the
    matrix.
    """
    seen = np.unique(y)
    if text is None:
        return seen, None
    classes, vectors = named_words(text, dim, made_by)
    if isinstance(text, Features) and text.labels is not None:
        return classes, vectors
    if seen.dtype.kind not in "biuf":
        raise ClipworksError("text must be Features with labels (the class of each row) where the labels are words. "
                             f"Got {type(text).__name__}.")  # fmt: skip
    if np.isin(seen, np.arange(len(vectors))).all():
        return np.arange(len(vectors)).astype(seen.dtype if seen.dtype.kind in "iuf" else int), vectors
    if len(seen) == len(vectors):
        return seen, vectors
    raise ClipworksError(f"text must have one row per class ({len(seen)} labels in y). Got {len(vectors)} rows.")


def named_words(text: Any, dim: int, made_by: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Return the classes as the words alone name them, sorted, and their unit vectors: the labels of `Features`, else
    0..C-1."""
    vectors = check_text(text, dim, made_by)
    if not isinstance(text, Features) or text.labels is None:
        return np.arange(len(vectors)), vectors
    classes, order = np.unique(np.asarray(text.labels), return_index=True)
    if len(classes) < len(vectors):
        raise ClipworksError(f"text must have one row per class. Got {len(vectors)} for {len(classes)} labels.")
    return classes, vectors[order]


def check_text(text: Any, dim: int, made_by: str = "", name: str = "text") -> np.ndarray:
    """Return word vectors as unit rows in float64, or raise where they cannot belong to vectors of `dim` columns."""
    given = fingerprint(text)
    if given and made_by and given != made_by:
        raise ClipworksError(f"{name} must come from the encoder of x, {made_by[:12]}. Got {given[:12]}.")
    try:
        vectors = check_array(as_array(text), dtype=np.float64, input_name=name)
    except ValueError as error:
        raise ClipworksError(str(error)) from error
    if vectors.shape[1] != dim:
        raise ClipworksError(f"{name} must have the {dim} columns of x. Got {vectors.shape[1]}.")
    return unit(vectors)


def class_numbers(argument: str, y: np.ndarray, classes: np.ndarray, of: str = "classes") -> np.ndarray:
    """Return the position of every label among the classes, or raise naming one that is not there.

    >>> class_numbers("y", np.array(["cat", "dgo"]), np.array(["cat", "dog"]))
    Traceback (most recent call last):
    clipworks.errors.ClipworksError: y must hold only labels of the 2 classes, 'cat', 'dog'. Got 'dgo'. Did you mean \
'dog'?
    """
    known = {label: number for number, label in enumerate(classes.tolist())}
    try:
        return np.array([known[label] for label in y.tolist()], dtype=np.intp)
    except (KeyError, TypeError):  # TypeError: a list is no key
        bad = next(label for label in y.tolist() if not isinstance(label, Hashable) or label not in known)
        shown = ", ".join(map(repr, list(known)[:5])) + " ..." * (len(known) > 5)
        allowed = f"numbers from 0 to {len(known) - 1}" if list(known) == list(range(len(known))) else shown
        raise ClipworksError(f"{argument} must hold only labels of the {len(known)} {of}, {allowed}. "
                             f"Got {bad!r}.{closest(bad, known)}") from None  # fmt: skip


def check_vectors(head: BaseEstimator, x: Any, y: Any = None, fit: bool = False, labelled: bool = True) -> Any:
    """Return x as finite float64 (n, dim) (and y in `fit`), checked as scikit-learn does; errors are ours."""
    try:
        if not fit:
            return validate_data(head, as_array(x), dtype=np.float64, reset=False)
        if not labelled:
            return validate_data(head, as_array(x), dtype=np.float64, ensure_min_samples=2)
        x, y = validate_data(head, as_array(x), y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        return x, y
    except NotFittedError:
        raise
    except ValueError as error:
        raise ClipworksError(str(error)) from error


def as_array(x: Any) -> Any:
    """The vectors of `Features`, an array of a tensor; everything else as it is."""
    if isinstance(x, Features):
        return x.vectors
    return x.detach().cpu().numpy() if hasattr(x, "detach") else x


def fingerprint(x: Any) -> str:
    """The fingerprint of `Features`, an empty string for arrays."""
    return x.fingerprint if isinstance(x, Features) else ""
