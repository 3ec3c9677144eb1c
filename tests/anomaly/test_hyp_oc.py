"""Hyp-OC: the ball's geometry against closed forms, and a class learned against noise."""

import numpy as np
import pytest
import torch

from clipworks.anomaly.hyp_oc import Ball, HypOC, clipped
from clipworks.anomaly.hyperbolic import add, distance, exp_map, into_ball, log_map, plane_logits
from clipworks.errors import ClipworksError
from clipworks.metrics.detection import auroc


def points(n, seed=0, dim=3, length=0.8):
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return length * x / x.norm(dim=1, keepdim=True) * torch.linspace(0.1, 1, n, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_addition_by_its_formula_and_its_inverse(c):
    """Card, fact 3."""
    for x, y in zip(points(8, 1), points(8, 2), strict=True):
        a, b = x.numpy(), y.numpy()
        top = (1 + 2 * c * a @ b + c * b @ b) * a + (1 - c * a @ a) * b
        np.testing.assert_allclose(add(x, y, c), top / (1 + 2 * c * a @ b + c**2 * (a @ a) * (b @ b)), atol=1e-12)
    x = points(8)
    torch.testing.assert_close(add(torch.zeros_like(x), x, c), x)
    torch.testing.assert_close(add(-x, x, c), torch.zeros_like(x))


def test_distances():
    """Card, facts 1 and 2."""
    x, y, z = points(8, 1), points(8, 2), points(8, 3)
    torch.testing.assert_close(distance(x, y, 1e-9), 2 * (x - y).norm(dim=1), rtol=1e-4, atol=1e-6)
    for c in (0.1, 1.0):
        torch.testing.assert_close(distance(torch.zeros_like(x), exp_map(x, c), c), 2 * x.norm(dim=1))
        torch.testing.assert_close(log_map(exp_map(x, c), c), x)
        torch.testing.assert_close(distance(x, y, c), distance(y, x, c))
        assert (distance(x, x, c) < 1e-6).all()
        assert (distance(x, z, c) <= distance(x, y, c) + distance(y, z, c) + 1e-9).all()
    direct = torch.arccosh(1 + 2 * (x - y).square().sum(1) / (1 - x.square().sum(1)) / (1 - y.square().sum(1)))
    torch.testing.assert_close(distance(x, y, 1.0), direct)  # the textbook form, curvature -1


def test_maps_stay_inside_and_follow_geodesics():
    """Card, fact 4."""
    for c in (0.1, 1.0):
        for length in (1e-9, 1.0, 1e4):
            assert (c**0.5 * exp_map(points(5, length=length), c).norm(dim=1) < 1).all()
        base, v = points(5, 1, length=0.5), points(5, 2)
        scale = 2 / (1 - c * base.square().sum(1))
        torch.testing.assert_close(distance(base, exp_map(v, c, base), c), scale * v.norm(dim=1))
    far = into_ball(torch.tensor([[9.0, 0], [0.1, 0]]), 1.0)
    torch.testing.assert_close(far, torch.tensor([[0.999, 0], [0.1, 0]]))


def test_logits_of_planes():
    """Card, facts 1 and 6."""
    x, p, a = points(6, 1), points(2, 2), points(2, 3)
    flat = 4 * ((x[:, None] - p) * a).sum(-1)
    torch.testing.assert_close(plane_logits(x, p, a, 1e-10), flat, rtol=1e-4, atol=1e-7)
    assert plane_logits(p, p, a, 0.5).diagonal().abs().max() < 1e-9
    torch.testing.assert_close(plane_logits(x, p, -a, 0.5), -plane_logits(x, p, a, 0.5))


def test_clip():
    """Card, fact 5."""
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(clipped(x, 2.0), torch.tensor([[1.2, 1.6], [0.3, 0.4]]))
    assert torch.equal(clipped(x[1:], 2.0), x[1:])


@pytest.mark.parametrize("seed", range(2))
def test_the_toy_of_the_card(seed):
    """Card, fact 8: 200 steps."""
    rng = np.random.default_rng(seed)
    real, other = rng.normal(0, 0.1, (160, 16)), rng.normal(3, 0.1, (100, 16))
    head = HypOC(widths=(64, 32), spread=1.0, epochs=10, held_out=0, seed=seed).fit(real)
    fresh = rng.normal(0, 0.1, (100, 16))
    assert auroc(head.score(np.concatenate([fresh, other])), np.arange(200) >= 100) > 0.999
    assert head.history_[-1, 1] < 0.02
    assert head.history_[-1, 0] < 0.5 * head.history_[0, 0]


def test_pseudo_negatives_are_drawn_around_the_running_mean(monkeypatch):
    """Card, fact 7."""
    seen = []
    monkeypatch.setattr(Ball, "embed", lambda self, x: (seen.append(x.detach().clone()), Ball_embed(self, x))[1])
    rows = np.random.default_rng(0).normal(5, 0.2, (64, 6))
    HypOC(widths=(4,), spread=1.5, epochs=40, held_out=0).fit(rows)
    noise = torch.cat([x[len(x) // 2 :] for x in seen[:-1]])
    assert (noise.mean(0) - 5).abs().max() < 0.12
    assert (noise.std(0) - 1.5).abs().max() < 0.1


Ball_embed = Ball.embed


def test_the_threshold_is_set_on_images_that_were_not_learned_from():
    x = np.random.default_rng(0).normal(1, 0.1, (100, 4))
    head = HypOC(widths=(16,), epochs=3, rate=0.2).fit(x)
    order = np.random.default_rng(0).permutation(100)
    held = np.sort(head.score(x[order[:20]]))
    assert head.threshold_ == held[16]  # ceil(0.8 * 21) = 17th
    assert np.array_equal(head.predict(x) == -1, head.score(x) > head.threshold_)


@pytest.mark.parametrize(
    ("settings", "n", "message"),
    [
        ({"curvature": 0}, 9, "curvature and clip must be above 0"),
        ({"momentum": 2}, 9, "momentum must lie in"),
        ({"batch_size": 1}, 9, "batch_size must lie in"),
        ({}, 3, "at least 4 vectors. Got 3"),
    ],
)
def test_mistakes_are_named(settings, n, message):
    with pytest.raises(ClipworksError, match=message):
        HypOC(**settings).fit(np.random.default_rng(0).normal(size=(n, 3)))
