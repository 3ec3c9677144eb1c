"""GradCache against the gradient of the whole batch, for every parameter."""

from __future__ import annotations

import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.training.gradcache import cached_backward, cut

from .toy import Pair, gradients, infonce, vectors


def _losses(features):
    return {"infonce": infonce(features["image"], features["text"], features["scale"])}


def _whole(model, batch):
    loss = _losses(model(batch))["infonce"]
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("micro_batch", [None, 1, 3, 4, 12, 100])
def test_gradients_equal_the_full_batch(micro_batch):
    batch = vectors(12)
    value, expected = _whole(Pair(), batch)
    model = Pair()
    got = cached_backward(model, _losses, batch, micro_batch=micro_batch)
    assert got["infonce"].item() == pytest.approx(value, abs=1e-14)
    assert not got["infonce"].requires_grad
    assert set(gradients(model)) == set(expected)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, expected[name], rtol=0, atol=1e-14), name
    assert expected["log_scale"].abs() > 1e-3


def test_accumulating_small_losses_is_something_else():
    batch = vectors(12)
    _, expected = _whole(Pair(), batch)
    model = Pair()
    for piece in cut(batch, 4):
        (_losses(model(piece))["infonce"] / 3).backward()
    assert not torch.allclose(model.text.weight.grad, expected["text.weight"], rtol=1e-2, atol=1e-2)


def test_pasting_pieces_among_cached_ones_counts_the_scale_once_per_piece():
    """The common way: each piece with its graph among the others without, and the whole loss each time."""
    batch = vectors(12)
    _, expected = _whole(Pair(), batch)
    model = Pair()
    pieces = cut(batch, 3)
    with torch.no_grad():
        cached = [model(piece) for piece in pieces]
    for number, piece in enumerate(pieces):
        here = [*cached[:number], model(piece), *cached[number + 1 :]]
        joined = {name: torch.cat([part[name] for part in here]) for name in ("image", "text")}
        _losses({**joined, "scale": here[number]["scale"]})["infonce"].backward()
    for name, gradient in gradients(model).items():
        times = 4.0 if name == "log_scale" else 1.0
        assert torch.allclose(gradient, times * expected[name], rtol=0, atol=1e-13), name


def test_dropout_draws_the_same_in_both_passes():
    """With the masks of each piece known, the expected gradient follows from the pieces joined in one graph."""
    batch = vectors(8)
    seed = lambda piece: torch.manual_seed(100 + piece)  # noqa: E731
    reference = Pair(dropout=0.5)
    parts = []
    for number, piece in enumerate(cut(batch, 4)):
        seed(number)
        parts.append(reference(piece))
    joined = {n: torch.cat([p[n] for p in parts]) for n in ("image", "text")} | {"scale": parts[0]["scale"]}
    _losses(joined)["infonce"].backward()
    model = Pair(dropout=0.5)
    cached_backward(model, _losses, batch, micro_batch=4, before=seed)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, gradients(reference)[name], rtol=0, atol=1e-14), name


def test_frozen_tower_and_values_without_rows():
    model, batch = Pair(), vectors(6) | {"note": "passed on as it is"}
    model.visual.requires_grad_(False)
    cached_backward(model, _losses, batch, micro_batch=2)
    assert all(p.grad is None for p in model.visual.parameters())
    _, expected = _whole(Pair(), batch)
    assert torch.allclose(model.text.weight.grad, expected["text.weight"], rtol=0, atol=1e-14)
    assert [piece["note"] for piece in cut(batch, 4)] == ["passed on as it is"] * 2
    assert [len(piece["pixels"]) for piece in cut(batch, 4)] == [4, 2]


def test_micro_batch_below_one_is_refused():
    with pytest.raises(ClipworksError, match="micro_batch must lie in"):
        cached_backward(Pair(), _losses, vectors(4), micro_batch=0)
