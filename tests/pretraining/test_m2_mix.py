"""Geodesic mixup as a recipe: its draws, its weights over the epochs, plain CLIP without them."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from clipworks.errors import ClipworksError
from clipworks.losses.m2_mix import m2_mix
from clipworks.pretraining.m2_mix import M2MixRecipe
from clipworks.training.feed import step_generator
from clipworks.training.recipe import ContrastiveRecipe
from training.toy import spawn, tiny

from .small import items, same, step_of, trained, unit_rows

M3 = {"images": 0.05, "texts": 0.05, "both": 0.1}


def test_the_losses_are_those_of_the_function():
    recipe = M2MixRecipe(weight=0.2, temperature=0.1, epoch_steps=2, **M3)
    encoder, batch = step_of(recipe, step=5)
    features = recipe.features(encoder, batch)
    found = recipe.losses(features)
    expected = m2_mix(features["image"], features["text"], features["scale"], batch["share"], weight=0.2,
                      temperature=0.1, partner_share=batch["partner_share"], **M3)  # fmt: skip
    assert set(found) == {"infonce", "m2", *M3}
    for name, value in expected.items():
        faded = value if name == "infonce" else value / 3  # step 5 lies in the third epoch
        assert found[name].item() == pytest.approx(faded.item(), rel=1e-6)


def test_without_weights_it_is_plain_clip(tmp_path):
    plain = trained(tmp_path / "a", ContrastiveRecipe())
    assert same(plain.encoder, trained(tmp_path / "b", M2MixRecipe(weight=0)).encoder)
    assert not same(plain.encoder, trained(tmp_path / "c", M2MixRecipe(weight=1)).encoder)


def test_shares_are_one_per_step_and_beta_distributed():
    recipe = M2MixRecipe(beta=0.5, partner_beta=2.0)
    recipe.bind(tiny(), None)
    data = items(2)
    drawn = [recipe.batch(data, step, step_generator(0, step)) for step in range(300)]
    for name, beta in (("share", 0.5), ("partner_share", 2.0)):
        shares = [float(batch[name]) for batch in drawn]
        assert kstest(shares, "beta", args=(beta, beta)).pvalue > 0.01
    # the second process of two draws the same numbers, and other views
    again = recipe.batch(data, 7, step_generator(0, 7, first=1))
    assert torch.equal(again["share"], drawn[7]["share"])


def test_weights_fall_with_the_epoch():
    assert [M2MixRecipe(epoch_steps=4).fading(s) for s in (0, 3, 4, 8)] == [1.0, 1.0, 0.5, pytest.approx(1 / 3)]
    assert M2MixRecipe().fading(10**6) == 1.0


def test_pieces_give_the_gradient_of_the_whole(tmp_path):
    whole = trained(tmp_path / "a", M2MixRecipe(weight=0.5, **M3)).encoder
    pieces = trained(tmp_path / "b", M2MixRecipe(weight=0.5, **M3), micro_batch=3).encoder
    gaps = [float((a - b).detach().abs().max()) for a, b in zip(whole.parameters(), pieces.parameters(), strict=True)]
    assert max(gaps) < 1e-4
    assert sum(p.numel() for p in whole.parameters()) == sum(p.numel() for p in tiny().parameters())


def _features(n=4, dim=8):
    rows = {"image": torch.tensor(unit_rows(n, dim)), "text": torch.tensor(unit_rows(n, dim, seed=1))}
    numbers = {"scale": 5.0, "share": 0.4, "partner_share": 0.7, "fading": 0.5}
    return rows | {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


def _two(rank, count, path):
    leaves = {k: v[2 * rank : 2 * rank + 2].clone().requires_grad_() if v.ndim else v for k, v in _features().items()}
    losses = M2MixRecipe(weight=0.5, **M3).losses(leaves)
    sum(losses.values()).backward()
    grads = {k: v.grad / count for k, v in leaves.items() if v.ndim}
    torch.save({"losses": {k: v.detach() for k, v in losses.items()}, "grads": grads}, f"{path}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    spawn(_two, 2, str(tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = {k: v.clone().requires_grad_() if v.ndim else v for k, v in _features().items()}
    losses = M2MixRecipe(weight=0.5, **M3).losses(whole)
    sum(losses.values()).backward()
    for name, value in losses.items():
        assert np.mean([p["losses"][name].item() for p in parts]) == pytest.approx(value.item(), abs=1e-12)
    for name in ("image", "text"):
        assert torch.allclose(torch.cat([p["grads"][name] for p in parts]), whole[name].grad, atol=1e-12)


def test_faults():
    for wrong in ({"weight": -1.0}, {"beta": 0.0}, {"partner_beta": -1.0}, {"temperature": 0.0}, {"epoch_steps": 0}):
        with pytest.raises(ClipworksError, match=next(iter(wrong))):
            M2MixRecipe(**wrong)
