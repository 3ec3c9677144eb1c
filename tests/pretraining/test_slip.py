"""SLIP: three views, two losses, a head on the feature before its projection."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.pretraining.slip import WEAK, SlipRecipe
from clipworks.training.augment import Augment
from clipworks.training.recipe import ContrastiveRecipe

from .small import same, step_of, trained

SMALL = {"hidden": 16, "out": 8}


def nt_xent(a, b, tau=0.1):
    """Both directions, row by row: the partner against all other rows of both views."""
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    n, total = len(a), 0.0
    for x, y in ((a, b), (b, a)):
        for i in range(n):
            others = np.concatenate([y @ x[i], np.delete(x @ x[i], i)]) / tau
            total += np.log(np.exp(others).sum()) - others[i]
    return total / (2 * n)


def test_both_losses_written_out():
    recipe = SlipRecipe(weight=0.7, **SMALL)
    encoder, batch = step_of(recipe)
    found = recipe.forward(encoder, batch)
    heads = []
    for name in ("first", "second"):
        x = encoder.visual.norm_post(encoder.visual.run(batch[name]).tokens[:, 0])
        heads.append(recipe.head(x).detach().double().numpy())
    assert found["simclr"].item() == pytest.approx(0.7 * nt_xent(*heads), rel=1e-4)
    plain = ContrastiveRecipe()
    plain.bind(encoder, None)
    expected = plain.forward(encoder, {"pixels": batch["pixels"], "tokens": batch["tokens"]})["infonce"]
    assert found["infonce"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_identical_views_have_a_closed_form():
    """mean_i log(1 + 2 sum_{j != i} exp((c_ij - 1) / tau))."""
    whole = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    recipe = SlipRecipe(strong=whole, **SMALL)
    encoder, batch = step_of(recipe)
    assert torch.equal(batch["first"], batch["second"])
    recipe.eval()  # batch norm of both passes alike
    found = recipe.features(encoder, batch)
    rows = torch.nn.functional.normalize(found["first"].double(), dim=1).detach().numpy()
    apart = np.exp((rows @ rows.T - 1) / 0.1) * (1 - np.eye(8))
    assert recipe.losses(found)["simclr"].item() == pytest.approx(np.log(1 + 2 * apart.sum(1)).mean(), rel=1e-4)


def test_weight_zero_is_plain_clip(tmp_path):
    plain = trained(tmp_path / "a", ContrastiveRecipe("infonce", WEAK))
    assert same(plain.encoder, trained(tmp_path / "b", SlipRecipe(weight=0)).encoder)


def test_views_differ_and_the_projection_learns_from_words_alone():
    recipe = SlipRecipe(**SMALL)
    encoder, batch = step_of(recipe)
    assert not torch.equal(batch["first"], batch["second"])
    found = recipe.forward(encoder, batch)
    found["simclr"].backward()
    assert encoder.visual.projection.weight.grad is None
    assert encoder.text.projection.weight.grad is None
    assert encoder.visual.stem.projection.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in recipe.head.parameters())


def test_training_saves_the_head_apart(tmp_path):
    report = trained(tmp_path, SlipRecipe(**SMALL))
    assert set(report.losses) == {"loss", "infonce", "simclr"}
    assert any(name.startswith("head.") for name in report.parts)
    assert not any("head" in name for name in report.encoder.state_dict())


def test_faults():
    with pytest.raises(ClipworksError, match="weight"):
        SlipRecipe(weight=-1)
