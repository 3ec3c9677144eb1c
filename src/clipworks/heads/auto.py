"""Auto: the head that does best on shots held out, or a steadier one within its noise; words alone if none is better.

Claim: which few-shot method is best depends on the data and on how many shots there are, and with one or two shots
words alone are often better (linear probe with one shot 46 %, zero-shot 65 %, mean of 11 sets); cross-validation on the
shots tells, without a look at the test images.

Formula: acc_m = share of held-out shots that method m gets right, fitted on the other folds;  best = argmax acc;
behind_m = mean_i (right_i(best) - right_i(m)) with standard error s_m over the held-out shots i;  chosen: the most
accurate of the steady m with behind_m <= 2 s_m and acc_m >= acc of zero-shot, else the best; zero-shot only if nothing
is more accurate: it is measured as it will be, a head with a fold's shots less than it will have.

Papers: Stone 1974, Cross-Validatory Choice and Assessment of Statistical Predictions; the rule of one standard error:
Breiman et al. 1984, Classification and Regression Trees.
Differs from the papers: the rule is applied to methods, with the standard error of the difference on the same images,
which is smaller than that of either accuracy, allows two of them, and prefers not the simplest but the steady: the
probes that class words join, whose minimum is unique and which fall back on the words where shots are few. On sets
apart from those that `auto` is judged on this loses less than to take the simplest, or the best of few shots. A head's
own choices are made inside the outer training folds. Candidates are all registered heads that need no more than shots
and words. Images are held out together with the others of their group.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from ..errors import ClipworksError, check_choice, check_range
from ..registry import get_method, method, methods
from ..types import Features
from .common import Choice, Head, Shots, check_vectors, named_words

ZERO_SHOT = "zero_shot"
NOISE = 2  # standard errors; the best of some fifteen heads is about one ahead of its worth
UNMEASURED = "linear_probe"  # where nothing can be held out: with one shot, shots and words have equal say in it


@dataclass
class Tried:
    """One line of the leaderboard.

    Attributes
    ----------
    method : its name
    accuracy, error : share of held-out shots that are right, and its standard error over the folds
    behind, behind_error : how much less than the best, and the standard error of that over the held-out shots
    seconds : of one fit, in the mean over the folds
    settings : what it chose by itself: for the chosen one on all shots, else most often over the folds
    note : "chosen", or why there are no figures
    """

    method: str
    accuracy: float | None = None
    error: float | None = None
    behind: float | None = None
    behind_error: float | None = None
    seconds: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    steady: bool = False
    right: np.ndarray | None = field(default=None, repr=False)

    def as_row(self) -> dict[str, Any]:
        """The line without what only the choice needs, ready for JSON or a table."""
        return {k: v for k, v in asdict(self).items() if k not in ("steady", "right")}


class ZeroShot(Head):
    """The words alone; shots only say how sure their answers should be."""

    unseen, effort = True, 0

    def __init__(self, text: Any = None, alpha: float | None = 0.0):
        self.text, self.alpha = text, alpha

    def _learn(self, shots: Shots) -> Choice:
        if self.text_ is None:
            raise ClipworksError("text must hold the vectors of the classes' words for zero-shot. Got None.")
        rows, y = shots.validation or (shots.x, shots.y)  # nothing is learned, so every shot is held out
        choice = self._choice((rows, y))
        choice.offer(None, np.zeros((len(rows), shots.classes)))
        return choice

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return np.zeros((len(x), len(self.classes_)))


@method(card="few-shot-foundations", level="MR")
class Auto(Head):
    """Choose among zero-shot and all heads by cross-validation on the shots.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; needed without shots
    alpha : None; every head chooses its own
    methods : names of the heads to choose among, "zero_shot" included; default: every registered one that fits
    folds : parts of the shots that are held out in turn
    budget : seconds after which no further head or fold is begun; heads of little effort come first, the first of all
        is always tried

    Attributes
    ----------
    chosen_, best_, why_ : the head's name, the head fitted on all shots, and the reason in one sentence
    leaderboard_ : a `Tried` per candidate, best first
    classes_, temperature_ : labels, temperature of the probabilities

    Inputs
    ------
    features of labelled images (or none), and of class words

    Relations
    ---------
    Without shots it is zero-shot. Where no class has two nothing can be measured: it is the linear probe, in which the
    one shot and the words have equal say; without words, or where `methods` leaves the probe out, the simplest head.

    References
    ----------
    Stone 1974, Cross-Validatory Choice and Assessment of Statistical Predictions

    Examples
    --------
    >>> x = np.array([[1.0, 0.2, 0.0], [0.9, 0.1, 0.3], [0.8, 0.3, 0.2], [0.2, 1.0, 0.1], [0.1, 0.9, 0.2]])
    >>> head = Auto(text=np.eye(3)[:2], methods=["zero_shot", "ridge", "gda"]).fit(x, [0, 0, 0, 1, 1])
    >>> head.chosen_, head.predict(x).tolist()
    ('zero_shot', [0, 0, 0, 1, 1])
    """

    unseen = True  # some candidates take classes that have only words

    def __init__(
        self,
        text: Any = None,
        alpha: None = None,
        methods: Sequence[str] | None = None,
        folds: int = 5,
        budget: float = 120.0,
    ):
        self.text, self.alpha, self.methods, self.folds, self.budget = text, alpha, methods, folds, budget

    def fit(self, x: Any = None, y: Any = None, *, groups: Any = None, validation: Any = None) -> Auto:
        """Choose a head and fit it on all shots.

        Parameters
        ----------
        x : vectors (n, dim), or `Features`; None: there are no shots
        y : n labels (default: those of the features)
        groups : n numbers or names; rows that share one are views of one image and are held out together
        validation : (x, y) or `Features` with labels: compare the heads on these images instead of folds of the shots
        """
        end = time.monotonic() + check_range("budget", self.budget, 0)
        check_range("folds", self.folds, 2)
        if x is None:
            return self._without_shots()
        candidates = self._candidates()
        shots = self._open(x, y, groups, validation)
        splits = shots.splits(self.folds)
        tried = [self._try(*entry, shots, splits, end if number else None) for number, entry in enumerate(candidates)]
        winner = self._choose(tried)
        rows = {"groups": shots.groups} if shots.validation is None else {"groups": shots.groups, "validation":
                (shots.validation[0], self.classes_[shots.validation[1]])}  # fmt: skip
        self._settle(winner, tried, self._fitted(dict(candidates)[winner.method], shots.x, shots.y, **rows))
        return self

    def logits(self, x: Any) -> np.ndarray:
        """Return the chosen head's uncalibrated logits (n, C)."""
        check_is_fitted(self, "best_")
        return self.best_.logits(check_vectors(self, x))

    def predict_proba(self, x: Any) -> np.ndarray:
        """Return the chosen head's calibrated probabilities (n, C), columns in the order of `classes_`."""
        check_is_fitted(self, "best_")
        return self.best_.predict_proba(check_vectors(self, x))

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return self.best_._scores(x)

    def _without_shots(self) -> Auto:
        if self.text is None:
            raise ClipworksError("text must be given where there are no shots (x). Got neither.")
        self.n_features_in_ = np.shape(getattr(self.text, "vectors", self.text))[-1]
        self.classes_, self.text_ = named_words(self.text, self.n_features_in_)
        head = ZeroShot(self.text)
        head.classes_, head.text_, head.n_features_in_ = self.classes_, self.text_, self.n_features_in_
        head._take(head._choice())
        self.leaderboard_, self.why_ = [Tried(ZERO_SHOT)], "there are no shots: the words alone decide."
        self._settle(self.leaderboard_[0], self.leaderboard_, head)
        return self

    def _candidates(self) -> list[tuple[str, type[Head]]]:
        """Names and classes, those of least effort first."""
        found = candidates()
        if self.methods is not None:
            for name in self.methods:
                check_choice("methods", name, found)
            found = {name: found[name] for name in self.methods}
        if self.text is None:
            found.pop(ZERO_SHOT, None)
        if not found:
            raise ClipworksError("methods must name at least one head that needs no words where text is None.")
        return sorted(found.items(), key=lambda entry: (entry[1].effort, entry[0]))

    def _fitted(self, kind: type[Head], x: np.ndarray, y: np.ndarray, **more: Any) -> Head:
        words = None if self.text_ is None else Features(self.text_, labels=self.classes_)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(text=words).fit(x, self.classes_[y], **more)  # type: ignore[call-arg]

    def _try(
        self, name: str, kind: type[Head], shots: Shots, splits: Sequence[tuple[np.ndarray, ...]], end: float | None
    ) -> Tried:
        """Fit on every fold, or say why not; after `end` no fold is begun."""
        found = Tried(name, steady=kind.steady)
        right: list[np.ndarray] = []
        seconds, taken = [], []
        for rows, x, y in splits:
            if end is not None and time.monotonic() >= end:
                found.note = f"stopped after {len(right)} of {len(splits)} folds" if right else "not begun"
                found.note += f": the budget of {self.budget:g} s was spent"
                return found
            begun = time.perf_counter()
            try:
                head = self._fitted(kind, shots.x[rows], shots.y[rows], groups=shots.groups[rows])
                right.append(head.predict(x) == self.classes_[y])
            except Exception as error:  # one head that fails must not stop the others; the leaderboard says so
                found.note = str(error) if isinstance(error, ClipworksError) else f"{type(error).__name__}: {error}"
                return found
            seconds.append(time.perf_counter() - begun)
            taken.append(settings(head))
        if right:
            each = [float(part.mean()) for part in right]
            found.right = np.concatenate(right)
            found.accuracy, found.seconds = float(found.right.mean()), float(np.mean(seconds))
            found.error = deviation(np.array(each) if len(each) > 1 else found.right)
            found.settings = {k: Counter(own.get(k) for own in taken).most_common(1)[0][0] for k in taken[0]}
        return found

    def _choose(self, tried: list[Tried]) -> Tried:
        """Mark the chosen line; sets `why_` and `leaderboard_`."""
        measured = [t for t in tried if t.right is not None]
        if not measured:
            usable = [t for t in tried if not t.note]
            if not usable:
                raise ClipworksError(f"methods must hold a head that can be fitted. {tried[0].method}: {tried[0].note}")
            mixed = [t for t in usable if t.method == UNMEASURED and self.text is not None]
            chosen = (mixed or usable)[0]
            reason = "which gives shots and words equal say" if mixed else "the simplest"
            self.why_ = "no class has two images to hold one out, so nothing can be compared: " \
                        f"{chosen.method}, {reason}."  # fmt: skip
            self.leaderboard_ = tried
            return chosen
        # of equals the first, which takes the least effort
        best = max(measured, key=lambda t: t.accuracy)  # type: ignore[arg-type, return-value]
        for t in measured:
            lead = best.right.astype(float) - t.right  # type: ignore[union-attr, operator]
            t.behind, t.behind_error = float(lead.mean()), deviation(lead)
        floor = next((t.accuracy for t in measured if t.method == ZERO_SHOT), 0.0)
        near = [t for t in measured if t.behind <= NOISE * t.behind_error + 1e-12 and t.accuracy >= floor]  # type: ignore[operator]
        steady = [t for t in near if t.steady and best.method != ZERO_SHOT]
        chosen = max(steady or [best], key=lambda t: t.accuracy)  # type: ignore[arg-type, return-value]
        self.why_ = _reason(chosen, best, len(best.right))  # type: ignore[arg-type]
        self.leaderboard_ = sorted(tried, key=lambda t: (t.accuracy is None, -(t.accuracy or 0)))
        return chosen

    def _settle(self, winner: Tried, tried: list[Tried], head: Head) -> None:
        self.best_, self.chosen_, self.alpha_, self.temperature_ = head, winner.method, head.alpha_, head.temperature_
        winner.settings, winner.note = settings(head), "chosen"


def candidates() -> dict[str, type[Head]]:
    """Return zero-shot and every registered head that can be fitted with shots and words alone, by name."""
    found: dict[str, type[Head]] = {ZERO_SHOT: ZeroShot}
    for info in methods("heads"):
        kind = get_method(f"heads/{info.name}")
        if inspect.isclass(kind) and issubclass(kind, Head) and kind is not Auto and kind.labelled:
            needed = [p.name for f in (kind, kind.fit) for p in inspect.signature(f).parameters.values()
                      if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # fmt: skip
            if set(needed) <= {"self", "text", "x", "y"}:
                found[info.name] = kind
    return found


def settings(head: Head) -> dict[str, Any]:
    """Return what a fitted head chose by itself: its learned attributes that are single numbers or words."""
    skipped = ("n_features_in_", "n_iter_", "temperature_")
    values = {k: v for k, v in vars(head).items() if k.endswith("_") and not k.startswith("_") and k not in skipped}
    values = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
    if head.text_ is None or isinstance(head, ZeroShot):
        values.pop("alpha_", None)
    return {k.rstrip("_"): v for k, v in values.items() if isinstance(v, bool | int | float | str)}


def deviation(values: np.ndarray) -> float:
    """Return the standard error of a mean.

    >>> round(deviation(np.array([0.0, 1.0, 0.0, 1.0])), 4)
    0.2887
    """
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def _reason(chosen: Tried, best: Tried, count: int) -> str:
    held = f"on {count} shots held out"
    if chosen.method == ZERO_SHOT:
        return f"no head is more accurate {held} than the words alone ({chosen.accuracy:.3f})."
    if chosen is best:
        return f"{chosen.method} is the most accurate {held} ({chosen.accuracy:.3f})."
    return (f"{chosen.method} ({chosen.accuracy:.3f}) is the steadier choice and cannot be told from the most accurate "
            f"{held}, {best.method} ({best.accuracy:.3f}): behind by {chosen.behind:.3f} with an error of "
            f"{chosen.behind_error:.3f}.")  # fmt: skip
