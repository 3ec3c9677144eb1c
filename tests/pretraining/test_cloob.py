"""CLOOB as a recipe: its loss at a scale that stays where it is."""

import math

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.pretraining.cloob import CloobRecipe
from training.toy import tiny

from .small import step_of, trained, unit_rows


def oracle(x, y, inv_tau, beta):
    def retrieve(states, store):
        out = []
        for r in states:
            w = np.exp(beta * store @ r)
            v = (w / w.sum()) @ store
            out.append(v / np.linalg.norm(v))
        return np.array(out)

    def loob(p, q):
        k = inv_tau * p @ q.T
        n = len(k)
        return np.mean([-k[i, i] + np.log(sum(np.exp(k[i, j]) for j in range(n) if j != i)) for i in range(n)])

    return (loob(retrieve(x, x), retrieve(y, x)) + loob(retrieve(y, y), retrieve(x, y))) / inv_tau


@pytest.mark.parametrize(("inv_tau", "beta"), [(30.0, 8.0), (14.3, 14.3)])
def test_the_loss_written_out(inv_tau, beta):
    x, y = unit_rows(6, 8), unit_rows(6, 8, seed=1)
    recipe = CloobRecipe(inv_tau, beta)
    features = {"image": torch.tensor(x), "text": torch.tensor(y), "scale": torch.tensor(inv_tau)}
    assert recipe.losses(features)["cloob"].item() == pytest.approx(oracle(x, y, inv_tau, beta), abs=1e-9)


def test_the_scale_is_fixed_and_ends_up_in_the_encoder(tmp_path):
    recipe = CloobRecipe(inv_tau=20.0)
    encoder, batch = step_of(recipe)
    found = recipe.features(encoder, batch)
    assert found["scale"].item() == 20.0
    assert not found["scale"].requires_grad
    recipe.losses(found)["cloob"].backward()
    assert encoder.log_scale.grad is None
    assert trained(tmp_path, recipe).encoder.logit_scale == pytest.approx(20.0, rel=1e-6)


def test_pieces_give_the_gradient_of_the_whole_although_retrieval_sees_the_batch(tmp_path):
    whole = trained(tmp_path / "a", CloobRecipe()).encoder
    pieces = trained(tmp_path / "b", CloobRecipe(), micro_batch=3).encoder
    gaps = [float((a - b).detach().abs().max()) for a, b in zip(whole.parameters(), pieces.parameters(), strict=True)]
    assert max(gaps) < 1e-4


def test_nothing_is_added_to_the_model(tmp_path):
    report = trained(tmp_path, CloobRecipe())
    assert not report.parts
    assert sum(p.numel() for p in report.encoder.parameters()) == sum(p.numel() for p in tiny().parameters())


def test_the_loss_may_be_negative():
    rows = torch.eye(6)
    value = CloobRecipe(30.0, 8.0).losses({"image": rows, "text": rows, "scale": torch.tensor(30.0)})["cloob"]
    assert value.item() < 0
    even = CloobRecipe(30.0, 1e-9)  # every retrieval is the mean of the store
    rows = torch.tensor(unit_rows(6, 8))
    value = even.losses({"image": rows, "text": rows.flip(0), "scale": torch.tensor(30.0)})["cloob"]
    assert value.item() == pytest.approx(2 / 30 * math.log(5), abs=1e-6)


def test_faults():
    for wrong in ({"inv_tau": 0.0}, {"beta": -1.0}):
        with pytest.raises(ClipworksError, match=next(iter(wrong))):
            CloobRecipe(**wrong)
