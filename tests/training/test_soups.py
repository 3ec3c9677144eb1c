"""Soups: closed forms, the greedy rule, and one start against different starts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from clipworks.errors import ClipworksError
from clipworks.training.soups import greedy_soup, uniform_soup


def _state(value):
    return {"w": torch.tensor([value]), "count": torch.tensor(3)}


def test_uniform_soup_facts():
    states = [_state(v) for v in (0.1, 0.7, 2.3)]
    soups = [uniform_soup(order)["w"] for order in itertools.permutations(states)]
    assert all(torch.equal(soups[0], s) for s in soups)
    assert soups[0].item() == pytest.approx(3.1 / 3)
    for n in (1, 3, 7):
        assert torch.equal(uniform_soup([_state(0.1)] * n)["w"], torch.tensor([0.1]))
    assert uniform_soup(states)["count"] == 3


def test_greedy_is_never_below_the_best_and_drops_what_hurts():
    calls = []

    def score(state):
        calls.append(state)
        return -abs(state["w"].item() - 1.0)

    soup = greedy_soup([_state(v) for v in (0.5, 9.0, 1.4, -3.0)], score)
    assert soup.members == [2, 0]  # 1.4 is best alone, with 0.5 the mean is 0.95
    assert soup.score == pytest.approx(-0.05)
    assert soup.score >= max(soup.scores)
    assert len(calls) == 7
    alone = greedy_soup([_state(v) for v in (1.0, 3.0, 4.0)], score)
    assert alone.members == [0]
    assert torch.equal(alone.weights["w"], torch.tensor([1.0]))


def test_equal_scores_are_not_an_improvement():
    assert greedy_soup([_state(1.0), _state(1.0)], lambda s: 0.5).members == [0]


def test_faults():
    with pytest.raises(ClipworksError, match="at least one"):
        greedy_soup([], lambda s: 0.0)
    with pytest.raises(ClipworksError, match="same names"):
        uniform_soup([_state(1.0), {"w": torch.zeros(1)}])


def _trained(start, data_seed, steps=150):
    """A small network fitted to a fixed two-class problem by one random stream."""
    torch.manual_seed(start)
    module = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    draw = torch.Generator().manual_seed(data_seed)
    for _ in range(steps):
        x = torch.randn(64, 8, generator=draw)
        loss = nn.functional.cross_entropy(module(x), _target(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module


def _target(x):
    return ((x[:, 0] * x[:, 1] > 0) ^ (x[:, 2] > 0.3)).long()


def _loss(module, state):
    module.load_state_dict(state)
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return nn.functional.cross_entropy(module(x), _target(x)).item()


def test_the_middle_is_good_between_runs_of_one_start_only():
    base = _trained(0, 0, 400)
    shared = {n: v.clone() for n, v in base.state_dict().items()}
    ends = []
    for seed in (1, 2):
        base.load_state_dict(shared)
        optimizer = torch.optim.SGD(base.parameters(), lr=0.05)
        draw = torch.Generator().manual_seed(seed)
        for _ in range(60):
            x = torch.randn(64, 8, generator=draw) + 0.3
            optimizer.zero_grad()
            nn.functional.cross_entropy(base(x), _target(x)).backward()
            optimizer.step()
        ends.append({n: v.clone() for n, v in base.state_dict().items()})
    middle = _loss(base, uniform_soup(ends))
    assert middle <= sum(_loss(base, e) for e in ends) / 2 + 0.01
    other = [{n: v.clone() for n, v in _trained(s, s, 400).state_dict().items()} for s in (3, 4)]
    apart = _loss(base, uniform_soup(other)) - sum(_loss(base, e) for e in other) / 2
    assert apart > 0.1
