"""Runs a method's own docstring example and records the calls, so that a contract can repeat them in other ways."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import doctest
import importlib
import inspect
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from clipworks.registry import MethodInfo


@dataclasses.dataclass
class Call:
    """One call of a function, or of an estimator's `fit`, as the example made it.

    Attributes
    ----------
    target : what was called; for an estimator a function that clones it and fits the clone
    args, kwargs : arguments as they were before the call
    result : what came back
    owner : the estimator, None for functions
    changed : arguments that the call altered
    """

    target: Callable
    args: tuple
    kwargs: dict[str, Any]
    result: Any
    owner: Any = None
    changed: list[str] = dataclasses.field(default_factory=list)

    def again(self, change: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
        """Call it once more on copies of the arguments, every tensor and array in them passed through `change`."""
        args, kwargs = leaves(copied((self.args, self.kwargs)), change)
        return self.target(*args, **kwargs)


def recorded_calls(info: MethodInfo) -> list[Call]:
    """Run the example of a method and return its calls of the method."""
    module = importlib.import_module(f"clipworks.{info.area}.{info.name}")
    return calls_of(getattr(module, info.object), module)


def calls_of(found: Any, module: Any) -> list[Call]:
    """The same for a function or class of any module."""
    calls: list[Call] = []
    names = dict(vars(module))
    (example,) = doctest.DocTestFinder(recurse=False).find(found, found.__name__, module=module)
    example.globs = names
    if inspect.isclass(found):
        original, fit = found, recorder(found.fit, calls)
        found.fit = fit
    else:
        names[found.__name__] = recorder(found, calls)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            doctest.DocTestRunner(verbose=False).run(example, out=lambda text: None, clear_globs=False)
    finally:
        if inspect.isclass(found):
            original.fit = inspect.unwrap(fit)
    return calls


def recorder(function: Callable, calls: list[Call]) -> Callable:
    import functools

    method = "self" in inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        owner, given = (args[0], args[1:]) if method else (None, args)
        kept = copied((given, kwargs))
        result = function(*args, **kwargs)
        entry = Call(function, *kept, result, owner)
        entry.changed = differences(kept, (given, kwargs))
        if owner is not None:
            entry.target = lambda *a, **k: function(fresh(owner), *a, **k)
        calls.append(entry)
        return result

    return call


def fresh(estimator: Any) -> Any:
    """An unfitted estimator with the same settings."""
    from sklearn.base import clone

    return clone(estimator)


def copied(value: Any) -> Any:
    """A deep copy in which tensors stay leaves and functions are kept."""
    return leaves(value, lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad)
                  if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf))  # fmt: skip


def leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Rebuild nested containers with `change` applied to every tensor and array."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return change(value)
    if isinstance(value, Mapping):
        return {key: leaves(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        made = [leaves(entry, change) for entry in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value


def flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor, array, number and string in a result, with where it is."""
    if isinstance(value, torch.Tensor):
        yield at, value.detach().cpu().numpy() if value.dtype != torch.bfloat16 else value.detach().float().numpy()
    elif isinstance(value, np.ndarray | np.generic | int | float | str | bool | type(None)):
        yield at, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from flat(entry, f"{at}[{key!r}]")
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from flat(entry, f"{at}[{number}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from flat(getattr(value, field.name), f"{at}.{field.name}")


def differences(first: Any, second: Any, tolerance: float = 0.0) -> list[str]:
    """Where two results differ: exactly, or by more than `tolerance` of the larger values."""
    one, two = dict(flat(first)), dict(flat(second))
    found = sorted(set(one) ^ set(two))
    for at in one.keys() & two.keys():
        a, b = np.asarray(one[at]), np.asarray(two[at])
        if a.shape != b.shape:
            found.append(f"{at}: shapes {a.shape} and {b.shape}")
        elif a.dtype.kind in "fc" or b.dtype.kind in "fc":
            if not np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
                found.append(f"{at}: {a} and {b}")
        elif not np.array_equal(a, b):
            found.append(f"{at}: {a} and {b}")
    return found


def is_real(leaf: Any) -> bool:
    """Whether a tensor or array holds real numbers (not ids, labels or masks)."""
    return leaf.is_floating_point() if isinstance(leaf, torch.Tensor) else leaf.dtype.kind == "f"
