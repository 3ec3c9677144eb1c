"""DreamLIP: the mixture of patches, both losses, and the order in which rows are put."""

import math

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.pretraining.dreamlip import DreamlipRecipe, group_patches
from clipworks.training.recipe import ContrastiveRecipe
from training.toy import spawn, tiny

from .small import items, same, step_of, trained, unit_rows

POOLS = {f"p{i}": [f"The photo of number {i}. A red square. A blue cross."] for i in range(16)}


def oracle(text, patches, delta):
    """One text and one patch at a time."""
    grouped, weights = np.zeros_like(text), np.zeros((*text.shape[:2], patches.shape[1]))
    floor = 1 / patches.shape[1] if delta < 0 else delta
    for n in range(text.shape[0]):
        for k in range(text.shape[1]):
            s = np.array([text[n, k] @ v for v in patches[n]])
            s = (s - s.min()) / (s.max() - s.min())
            s[s < floor] = 0
            weights[n, k] = s / s.sum()
            mixed = weights[n, k] @ patches[n]
            grouped[n, k] = mixed / np.linalg.norm(mixed)
    return grouped, weights


@pytest.mark.parametrize("delta", [0.0, 0.4, -1.0, 1.0])
def test_grouping_follows_the_formula(delta):
    text, patches = unit_rows(3, 4, 8), unit_rows(3, 9, 8, seed=1)
    found, weights = group_patches(torch.tensor(text), torch.tensor(patches), delta)
    expected = oracle(text, patches, delta)
    assert np.allclose(found, expected[0], atol=1e-12)
    assert np.allclose(weights, expected[1], atol=1e-12)
    assert np.allclose(weights.sum(-1), 1)
    assert (weights >= 0).all()
    assert np.allclose(found.norm(dim=-1), 1)


def test_delta_one_leaves_the_best_patch_and_delta_zero_drops_only_the_worst():
    text, patches = torch.tensor(unit_rows(3, 4, 8)), torch.tensor(unit_rows(3, 9, 8, seed=1))
    _, weights = group_patches(text, patches, 1.0)
    assert ((weights > 0).sum(-1) == 1).all()
    assert torch.equal(weights.argmax(-1), (text @ patches.transpose(1, 2)).argmax(-1))
    assert ((group_patches(text, patches, 0.0)[1] > 0).sum(-1) == 8).all()


def test_softmax_over_patches():
    text, patches = torch.tensor(unit_rows(2, 3, 8)), torch.tensor(unit_rows(2, 5, 8, seed=1))
    _, weights = group_patches(text, patches, norm="softmax")
    assert torch.allclose(weights, (text @ patches.transpose(1, 2)).softmax(-1))
    # nothing reaches a high delta: the best patch stays alone
    assert ((group_patches(text, patches, 0.99, "softmax")[1] > 0).sum(-1) == 1).all()


def test_one_patch_or_equal_patches_give_no_nan():
    text = torch.tensor(unit_rows(2, 3, 8), requires_grad=True)
    for count in (1, 4):
        patches = torch.tensor(unit_rows(2, 1, 8, seed=1)).repeat(1, count, 1).requires_grad_()
        grouped, weights = group_patches(text, patches)
        assert torch.allclose(weights, torch.full_like(weights, 1 / count))
        grouped.sum().backward()
        assert torch.isfinite(patches.grad).all()


def test_the_order_of_patches_does_not_matter():
    text, patches = torch.tensor(unit_rows(2, 3, 8)), torch.tensor(unit_rows(2, 6, 8, seed=1))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(group_patches(text, patches)[0], group_patches(text, patches[:, order])[0])


def test_without_sentences_and_grouping_it_is_plain_clip(tmp_path):
    plain = trained(tmp_path / "a", ContrastiveRecipe())
    dream = trained(tmp_path / "b", DreamlipRecipe(POOLS, sentences_per_image=0, grouping=0))
    assert same(plain.encoder, dream.encoder)


def test_the_own_caption_comes_first_and_then_sentences():
    encoder, batch = step_of(DreamlipRecipe(POOLS, sentences_per_image=2))
    assert batch["tokens"].shape[:2] == (8, 3)
    own = encoder.tokenize([item.caption for item in items(8)])
    assert torch.equal(batch["tokens"][:, 0, : own.shape[1]], own)


def features(n, k, dim=8, seed=0):
    make = lambda s, *shape: torch.tensor(unit_rows(*shape, dim, seed=seed + s))  # noqa: E731
    return {"image": make(0, n), "text": make(1, n, k), "grouped": make(2, n, k), "scale": torch.tensor(5.0)}


def test_grouping_contrasts_all_texts_of_the_batch_sample_by_sample():
    f = features(4, 3)
    found = DreamlipRecipe(grouping=0.5, multi_positive=2.0).losses(f)
    rows = [(f["grouped"][i, k], f["text"][i, k]) for i in range(4) for k in range(3)]
    logits = np.array([[5.0 * float(g @ t) for _, t in rows] for g, _ in rows])
    log = lambda z: np.diag(z) - np.log(np.exp(z).sum(1))  # noqa: E731
    assert found["grouping"].item() == pytest.approx(-0.5 * (log(logits).mean() + log(logits.T).mean()) / 2, abs=1e-9)
    slots = [5.0 * f["image"].numpy() @ f["text"][:, k].numpy().T for k in range(3)]
    multi = -np.mean([(log(s).mean() + log(s.T).mean()) / 2 for s in slots])
    assert found["infonce"].item() == pytest.approx(2 * multi, abs=1e-9)


def test_limits_of_the_grouping_loss():
    f = features(40, 5, dim=64)
    assert DreamlipRecipe().losses({**f, "scale": torch.tensor(1.0)})["grouping"].item() == pytest.approx(
        math.log(200), abs=0.05
    )
    f["grouped"] = f["text"]
    assert DreamlipRecipe().losses({**f, "scale": torch.tensor(100.0)})["grouping"].item() < 1e-6


def test_a_repeated_sentence_is_its_own_false_negative():
    f = features(6, 4, dim=64)
    f["text"][:, 1] = f["text"][:, 0]
    f["grouped"] = f["text"]
    # half of the texts have a twin in their own image
    assert DreamlipRecipe().losses({**f, "scale": torch.tensor(100.0)})["grouping"].item() >= 0.5 * math.log(2) - 1e-6


def test_patches_go_through_the_projection_and_get_gradient():
    recipe = DreamlipRecipe(POOLS, sentences_per_image=2)
    encoder, batch = step_of(recipe)
    assert encoder.visual.projection.out_features == 32
    found = recipe.encode(encoder, batch)
    assert found["grouped"].shape == (8, 3, 32)
    image = encoder.encode_image(batch["pixels"])
    assert torch.allclose(found["image"], image, atol=1e-6)
    found["grouped"].sum().backward()
    assert encoder.visual.projection.weight.grad.abs().sum() > 0


def test_pieces_and_parameters(tmp_path):
    recipe = DreamlipRecipe(POOLS, sentences_per_image=2)
    whole = trained(tmp_path / "a", recipe).encoder
    pieces = trained(tmp_path / "b", recipe, micro_batch=3).encoder
    gaps = [float((a - b).detach().abs().max()) for a, b in zip(whole.parameters(), pieces.parameters(), strict=True)]
    assert max(gaps) < 1e-4
    assert sum(p.numel() for p in whole.parameters()) == sum(p.numel() for p in tiny().parameters())


def test_faults():
    for wrong in ({"sentences_per_image": -1}, {"grouping": -1.0}, {"delta": 2.0}, {"norm": "max"}):
        with pytest.raises(ClipworksError, match=next(iter(wrong))):
            DreamlipRecipe(**wrong)


def _two(rank, count, path):
    """A process's share of the losses, its gradient averaged as data-parallel training does."""
    whole = features(4, 3)
    leaves = {k: v[2 * rank : 2 * rank + 2].clone().requires_grad_() if v.ndim else v for k, v in whole.items()}
    losses = DreamlipRecipe().losses(leaves)
    sum(losses.values()).backward()
    grads = {k: v.grad / count for k, v in leaves.items() if v.ndim}
    torch.save({"losses": {k: v.detach() for k, v in losses.items()}, "grads": grads}, f"{path}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    spawn(_two, 2, str(tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = {k: v.clone().requires_grad_() if v.ndim else v for k, v in features(4, 3).items()}
    losses = DreamlipRecipe().losses(whole)
    sum(losses.values()).backward()
    for name, value in losses.items():
        mean = (parts[0]["losses"][name] + parts[1]["losses"][name]) / 2
        assert torch.allclose(mean, value, atol=1e-12)
    for name, value in whole.items():
        if value.ndim:
            assert torch.allclose(torch.cat([p["grads"][name] for p in parts]), value.grad, atol=1e-12)
