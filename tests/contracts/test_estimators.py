"""Every registered class with `fit` keeps the estimator contract, on the data of its own docstring example."""

import contextlib
import inspect
import pickle
import sys

import numpy as np
import pytest
import torch
from replay import calls_of, copied, differences, fresh, is_real, leaves, recorded_calls
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError

from clipworks.errors import ClipworksError
from clipworks.registry import get_method, methods

CLASSES = [m for m in methods() if m.object[0].isupper() and hasattr(get_method(f"{m.area}/{m.name}"), "fit")]


def fitted(call):
    return call.again()


def answers(estimator, x):
    """What the fitted estimator says of x, by every method it has for that."""
    names = ("predict", "predict_proba", "decision_function", "transform", "score_samples")
    return {name: getattr(estimator, name)(copied(x)) for name in names if hasattr(estimator, name)}


def constructor_round_trip(call):
    settings = call.owner.get_params(deep=False)
    again = type(call.owner)(**settings)
    assert all(getattr(again, name) is value for name, value in settings.items()), "settings are kept as they are given"
    assert set(settings) == set(inspect.signature(type(call.owner)).parameters)


def fit_returns_itself_and_changes_no_setting(call):
    estimator = fresh(call.owner)
    before = copied(estimator.get_params(deep=False))
    args, kwargs = copied((call.args, call.kwargs))
    assert estimator.fit(*args, **kwargs) is estimator
    assert not differences(before, estimator.get_params(deep=False))
    learned = [n for n in vars(estimator) if n not in before and not n.startswith("_")]
    assert learned
    assert all(n.endswith("_") for n in learned), "what is learned ends with an underscore"


def unfitted_says_so(call):
    with pytest.raises((NotFittedError, ClipworksError)):
        answers(clone(fitted(call)), call.args[0])


def inputs_left_alone(call):
    given = copied((call.args, call.kwargs))
    call.target(*given[0], **given[1])
    assert not differences(given, (call.args, call.kwargs))
    x = copied(call.args[0])
    estimator = fitted(call)
    for name in ("predict", "predict_proba"):
        if hasattr(estimator, name):
            getattr(estimator, name)(x)
    assert not differences(x, call.args[0])


def same_seed_same_answers(call):
    assert not differences(answers(fitted(call), call.args[0]), answers(fitted(call), call.args[0]))


def batch_size_does_not_matter(call):
    estimator, x = fitted(call), call.args[0]
    whole = answers(estimator, x)
    rows = [answers(estimator, x[i : i + 1]) for i in range(len(x))]
    for name, value in whole.items():
        assert not differences(np.concatenate([np.asarray(r[name]) for r in rows]), np.asarray(value), 1e-5)


def saved_and_loaded_it_answers_alike(call):
    estimator, x = fitted(call), call.args[0]
    assert not differences(answers(pickle.loads(pickle.dumps(estimator)), x), answers(estimator, x))


def bad_input_is_named(call):
    x, rest = call.args[0], call.args[1:]

    def spoiled(leaf):
        made = leaf.clone() if isinstance(leaf, torch.Tensor) else leaf.copy()
        if is_real(made):
            made[0, 0] = float("nan")
        return made

    faults = {"empty": x[:0], "not finite": leaves(x, spoiled), "one-dimensional": x[0]}
    for fault, bad in faults.items():
        cut = [r[:0] if fault == "empty" and hasattr(r, "__len__") and len(r) == len(x) else r for r in rest]
        with pytest.raises(ClipworksError):
            call.target(bad, *cut, **call.kwargs)
    estimator = fitted(call)
    narrow = x[:, :-1]
    with pytest.raises(ClipworksError):
        answers(estimator, narrow)
    if rest and hasattr(rest[0], "__len__") and len(rest[0]) == len(x):
        with pytest.raises(ClipworksError):
            call.target(x, rest[0][:-1], *rest[1:], **call.kwargs)
        one_class = rest[0].copy() if isinstance(rest[0], np.ndarray) else type(rest[0])(rest[0])
        one_class[:] = one_class[0] if isinstance(one_class, np.ndarray | torch.Tensor) else [one_class[0]] * len(x)
        with contextlib.suppress(ClipworksError):  # refused with a reason; learning one class is fine too
            call.target(x, one_class, *rest[1:], **call.kwargs)


def no_way_to_hand_in_test_data(call):
    names = inspect.signature(type(call.owner).fit).parameters
    assert not [n for n in names if "test" in n]


CONTRACT = [
    constructor_round_trip, fit_returns_itself_and_changes_no_setting, unfitted_says_so, inputs_left_alone,
    same_seed_same_answers, batch_size_does_not_matter, saved_and_loaded_it_answers_alike, bad_input_is_named,
    no_way_to_hand_in_test_data,
]  # fmt: skip


@pytest.mark.parametrize("check", CONTRACT, ids=lambda c: c.__name__)
@pytest.mark.parametrize("info", CLASSES, ids=lambda m: f"{m.area}/{m.name}")
def test_contract(info, check):
    found = recorded_calls(info)
    assert found, "the example must fit the estimator"
    for call in found:
        check(call)


# --- the contract itself: a sound estimator passes, and each fault is found in one that has it ---


class Nearest(BaseEstimator):
    """Nearest class mean.

    >>> x = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5], [0.9, 0.1, 0.5]])
    >>> _ = Nearest().fit(x, np.array([0, 1, 1]))
    """

    def __init__(self, shift: float = 0.0):
        self.shift = shift

    def fit(self, x, y):
        self._check(x)
        if len(x) == 0 or len(x) != len(y):
            raise ClipworksError(f"x and y must have the same number of rows, at least one. Got {len(x)} and {len(y)}.")
        self.classes_ = np.unique(y)
        self.means_ = np.stack([x[y == c].mean(0) for c in self.classes_]) + self.shift
        return self

    def predict(self, x):
        if not hasattr(self, "means_"):
            raise NotFittedError("fit it first.")
        self._check(x, self.means_.shape[1])
        return self.classes_[((x[:, None] - self.means_) ** 2).sum(-1).argmin(1)]

    def _check(self, x, width=None):
        if x.ndim != 2 or not np.isfinite(x).all() or width not in (None, x.shape[1]):
            raise ClipworksError(f"x must be finite, of shape (n, {width or 'd'}). Got shape {x.shape}.")


class Rounds(Nearest):
    def __init__(self, shift: float = 0.0):
        self.shift = round(shift + 0.25, 1)


class Forgets(Nearest):
    def fit(self, x, y):
        super().fit(x, y)
        self.shift, self.size = 1.0, len(x)


class Guesses(Nearest):
    def predict(self, x):
        return np.zeros(len(x))


class Writes(Nearest):
    def fit(self, x, y):
        super().fit(x, y)
        x -= x.mean(0)
        return self


class Rolls(Nearest):
    def predict(self, x):
        return super().predict(x) + np.random.rand()


class Centres(Nearest):
    def predict(self, x):
        return super().predict(x) + len(x)


class Loses(Nearest):
    def __getstate__(self):
        return {k: v + 5 if k == "classes_" else v for k, v in vars(self).items()}


class Trusts(Nearest):
    def _check(self, x, width=None):
        pass


class Peeks(Nearest):
    def fit(self, x, y, x_test=None):
        return super().fit(x, y)


def call_of(kind):
    kind.__doc__ = Nearest.__doc__.replace("Nearest", kind.__name__)
    (call,) = calls_of(kind, sys.modules[__name__])
    return call


@pytest.mark.parametrize("check", CONTRACT, ids=lambda c: c.__name__)
def test_a_sound_estimator_passes(check):
    check(call_of(Nearest))


@pytest.mark.parametrize(
    ("check", "faulty"),
    list(zip(CONTRACT, [Rounds, Forgets, Guesses, Writes, Rolls, Centres, Loses, Trusts, Peeks], strict=True)),
    ids=lambda c: c.__name__,
)
def test_each_fault_is_found(check, faulty):
    with pytest.raises((AssertionError, pytest.fail.Exception, IndexError, ValueError)):
        check(call_of(faulty))
