"""Every registered function, called as its own example calls it, then again in ways that must not matter.

A class with `fit` is held to `estimators.py` instead. A method whose example does not call it (one that trains a whole
model) is tested in its own file.
"""

import copy
import inspect
import random
import traceback

import numpy as np
import pytest
import torch
from replay import Call, calls_of, differences, flat, is_real, recorded_calls

from clipworks.errors import ClipworksError
from clipworks.registry import get_method, methods

WHOLE_RUNS = {"training", "pretraining", "tuning"}  # areas in which a method may be too large to call in an example
FUNCTIONS = [m for m in methods() if not m.object[0].isupper()]

every_function = pytest.mark.parametrize("info", FUNCTIONS, ids=lambda m: f"{m.area}/{m.name}")


def calls(info):
    found = recorded_calls(info)
    if not found and info.area in WHOLE_RUNS:
        pytest.skip("its example does not run the whole method; its own tests do")
    assert found, "the example must call the method"
    return found


@every_function
def test_functions_are_lower_case_and_classes_are_not(info):
    assert inspect.isfunction(get_method(f"{info.area}/{info.name}"))


@every_function
def test_inputs_are_left_alone(info):
    for call in calls(info):
        assert not call.changed


@every_function
def test_the_same_call_gives_the_same_result(info):
    for call in calls(info):
        assert not differences(call.again(), call.again())


@every_function
def test_no_hidden_dice(info):
    """Seeds are arguments: the generators of torch, numpy and random are neither read nor moved."""
    for call in calls(info):
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
            before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
            results.append(call.again())
            after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
            assert torch.equal(before[0], after[0])
            assert np.array_equal(before[1], after[1])
            assert before[2] == after[2]
        assert not differences(*results)


@every_function
def test_memory_layout_does_not_matter(info):
    def strided(leaf):
        if isinstance(leaf, torch.Tensor):
            made = torch.stack([leaf.detach(), leaf.detach()], -1)[..., 0]
            return made.requires_grad_(leaf.requires_grad)
        made = np.stack([leaf, leaf], -1)[..., 0]
        made.setflags(write=False)  # as a memory map would be
        return made

    for call in calls(info):
        assert not differences(call.again(), call.again(strided), 1e-5)


@every_function
def test_double_precision_gives_the_same_within_rounding(info):
    def double(leaf):
        if not is_real(leaf):
            return leaf
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().double().requires_grad_(leaf.requires_grad)
        return leaf.astype(np.float64)

    for call in calls(info):
        assert not differences(call.again(), call.again(double), 1e-3)


@every_function
@pytest.mark.parametrize("fault", ["nan", "inf", "empty"])
def test_bad_values_are_an_error_of_ours_or_pass_through(info, fault):
    """Never an error out of the depths: a message that names the argument, or a result (NaN in, NaN out)."""

    def spoil(leaf):
        if fault == "empty":
            return leaf[:0] if leaf.ndim else leaf
        if not is_real(leaf) or not leaf.size if isinstance(leaf, np.ndarray) else not leaf.is_floating_point():
            return leaf
        made = leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf.copy()
        made.reshape(-1)[:1] = float(fault)
        return made.requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else made

    for call in calls(info):
        assert not foreign_error(lambda call=call: call.again(spoil))


def foreign_error(work):
    """The traceback of an error that is none of ours; a function that an example hands over may fail as it likes."""
    try:
        work()
    except ClipworksError:
        return ""
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        return "" if any(frame.filename.startswith("<doctest") for frame in frames) else traceback.format_exc()
    return ""


LOSSES = [m for m in FUNCTIONS if m.area == "losses"]


@pytest.mark.skipif(not LOSSES, reason="no losses are registered yet")
@pytest.mark.parametrize("info", LOSSES, ids=lambda m: m.name)
def test_losses_are_finite_and_so_are_their_gradients(info):
    reached = 0
    for call in calls(info):
        inputs = []

        def differentiable(leaf, inputs=inputs):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                leaf = leaf.detach().clone().requires_grad_()
                inputs.append(leaf)
            return leaf

        for value in tensors(call.again(differentiable)):
            if value.requires_grad:
                assert torch.isfinite(value).all()
                found = torch.autograd.grad(value.sum(), inputs, allow_unused=True, retain_graph=True)
                found = [g for g in found if g is not None]
                assert all(torch.isfinite(g).all() for g in found)
                reached += any(g.abs().sum() > 0 for g in found)
    assert reached, "no gradient reaches the arguments of the example"


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):
        return [t for v in result.values() for t in tensors(v)]
    if isinstance(result, list | tuple):
        return [t for v in result for t in tensors(v)]
    if hasattr(result, "__dataclass_fields__"):
        return tensors({k: getattr(result, k) for k in result.__dataclass_fields__})
    return []


# --- the contract itself: each fault is found in a function that has it ---


def good(x):
    """>>> good(torch.arange(6.0).reshape(2, 3))"""
    return x * 2


def writes(x):
    """>>> writes(torch.arange(6.0).reshape(2, 3))"""
    return x.add_(1)


def rolls(x):
    """>>> rolls(torch.arange(6.0).reshape(2, 3))"""
    return x + torch.rand(3)


def strides(x):
    """>>> strides(torch.arange(6.0).reshape(2, 3))"""
    return torch.tensor(x.stride()) + x.sum()


def only(function) -> Call:
    import sys

    (call,) = calls_of(function, sys.modules[__name__])
    return call


def test_the_recorder_finds_the_call_and_what_it_changed():
    assert not only(good).changed
    assert torch.equal(only(good).again(), torch.arange(6.0).reshape(2, 3) * 2)
    assert only(writes).changed
    assert torch.equal(only(writes).args[0], torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    ("check", "faulty"),
    [(test_inputs_are_left_alone, writes), (test_the_same_call_gives_the_same_result, rolls),
     (test_no_hidden_dice, rolls), (test_memory_layout_does_not_matter, strides)],
)  # fmt: skip
def test_the_contract_can_fail(check, faulty, monkeypatch):
    monkeypatch.setitem(globals(), "recorded_calls", only_list := lambda function: [only(function)])
    monkeypatch.setitem(globals(), "calls", only_list)
    check(good)
    with pytest.raises(AssertionError):
        check(faulty)


def test_differences_are_found_wherever_they_are():
    first = {"a": [1, torch.ones(2)], "b": "x", "c": np.array([1, np.nan])}
    assert not differences(first, copy.deepcopy(first))
    for at, change in (("b", "y"), ("c", np.array([1.0, 2.0])), ("a", [1, torch.ones(3)]), ("a", [1])):
        assert differences(first, {**first, at: change})
    assert not differences({"a": 1.0}, {"a": 1.0 + 1e-6}, 1e-5)
    assert [at for at, _ in flat(first)] == ["['a'][0]", "['a'][1]", "['b']", "['c']"]
