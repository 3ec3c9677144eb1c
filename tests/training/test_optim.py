"""Parameter groups, layer-wise decay and freezing, on a module with the names of an encoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipworks.errors import ClipworksError
from clipworks.training.optim import adamw, freeze, parameter_groups, still


class Tower(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(4))
        self.positions = nn.Parameter(torch.zeros(3, 4))
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(layers))
        self.projection = nn.Linear(4, 2, bias=False)


class Names(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.text = Tower(3), Tower(2)
        self.log_scale = nn.Parameter(torch.zeros(()))


def _flat(groups):
    return {n: (g["weight_decay"], g["lr_scale"]) for g in groups for n in g["names"]}


def test_decay_only_on_matrices():
    found = _flat(parameter_groups(Names().named_parameters(), weight_decay=0.2))
    assert len(found) == len(list(Names().parameters()))
    for name, parameter in Names().named_parameters():
        assert found[name] == (0.2 if parameter.ndim >= 2 else 0.0, 1.0)
    assert found["log_scale"][0] == found["visual.blocks.0.1.bias"][0] == found["visual.class_token"][0] == 0.0
    more = _flat(parameter_groups(Names().named_parameters(), weight_decay=0.2, no_decay=["*.positions"]))
    assert more["visual.positions"][0] == 0.0
    assert more["visual.projection.weight"][0] == 0.2


def test_layer_decay_counts_from_the_top_of_each_tower():
    found = {n: s for n, (_, s) in _flat(parameter_groups(Names().named_parameters(), layer_decay=0.5)).items()}
    assert [found[f"visual.blocks.{i}.1.weight"] for i in range(3)] == [0.25, 0.5, 1.0]
    assert [found[f"text.blocks.{i}.1.weight"] for i in range(2)] == [0.5, 1.0]
    assert found["visual.positions"] == 0.125
    assert found["text.positions"] == 0.25
    assert found["visual.projection.weight"] == found["log_scale"] == 1.0


def test_rates_by_pattern():
    module = Names()
    found = _flat(parameter_groups(module.named_parameters(), layer_decay=0.5, rates={"*": 3.0, "visual.*": 0.1}))
    plain = _flat(parameter_groups(module.named_parameters(), layer_decay=0.5))
    for name, (decay, scale) in found.items():
        assert decay == plain[name][0]
        assert scale == pytest.approx(plain[name][1] * (0.1 if name.startswith("visual.") else 3.0)), name
    for argument in ({"rates": {"visul.*": 1.0}}, {"no_decay": ["visul.*"]}):
        with pytest.raises(ClipworksError, match=r"must match parameters that learn. Nothing matches 'visul"):
            parameter_groups(module.named_parameters(), **argument)
    with pytest.raises(ClipworksError, match="rates"):
        parameter_groups(module.named_parameters(), rates={"*": -1.0})


def test_freeze_by_pattern():
    module = Names()
    frozen = freeze(module, ["text.*", "visual.blocks.[01].*"])
    assert set(frozen) == {n for n, p in module.named_parameters() if not p.requires_grad}
    assert "visual.blocks.2.1.weight" not in frozen
    assert set(_flat(parameter_groups(module.named_parameters()))).isdisjoint(frozen)
    assert set(freeze(Names(), ["*", "!*.projection.*"])) == {
        n for n, _ in Names().named_parameters() if ".projection." not in n
    }
    with pytest.raises(ClipworksError, match=r"Nothing matches 'textt\.\*'"):
        freeze(module, "textt.*")


def test_nothing_left_to_learn_is_an_error():
    module = Names()
    freeze(module, "*")
    with pytest.raises(ClipworksError, match="no parameter that could learn"):
        adamw(parameter_groups(module.named_parameters()), lr=1.0, betas=(0.9, 0.98), eps=1e-6)


def test_frozen_batch_norm_keeps_its_statistics():
    norm = nn.BatchNorm1d(2).train()
    still(norm)
    assert norm.training
    norm.requires_grad_(False)
    still(norm)
    norm(torch.randn(8, 2) + 5)
    assert norm.running_mean.tolist() == [0.0, 0.0]
