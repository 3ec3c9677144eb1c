"""CLIP-Refine as a recipe: the frozen copy, the references, both forms of its rows, and a gap that closes."""

import copy

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.clip_refine import clip_refine
from clipworks.pretraining.clip_refine import RefineRecipe
from clipworks.training.feed import step_generator
from clipworks.training.loop import train
from clipworks.training.recipe import ContrastiveRecipe
from training.toy import drawings, tiny

from .small import items, same, step_of, trained


def moved(encoder):
    """The same encoder a few steps later."""
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return other


@pytest.mark.parametrize("normalise", [False, True])
def test_the_losses_are_those_of_the_function_on_the_rows_of_both(normalise):
    recipe = RefineRecipe(alpha=0.3, temperature=2.0, alignment=0.5, distillation=0.7, normalise=normalise)
    encoder, batch = step_of(recipe)
    student = moved(encoder)
    found = recipe.forward(student, batch)

    def rows(model):
        both = model.encode_image(batch["pixels"], normalize=False), model.encode_text(batch["tokens"], normalize=False)
        return [x / x.norm(dim=1, keepdim=True) for x in both] if normalise else both

    image, text = rows(student)
    scales = (student.logit_scale, encoder.logit_scale) if normalise else (1.0, 1.0)
    expected = clip_refine(image, text, scales[0], *rows(encoder), scales[1], batch["reference"], alpha=0.3,
                           temperature=2.0, alignment=0.5, distillation=0.7)  # fmt: skip
    assert set(found) == {"alignment", "distillation"}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_references_are_normal_one_per_pair_and_new_at_every_step():
    recipe = RefineRecipe()
    recipe.bind(tiny(), None)
    data = items(16)
    drawn = torch.cat([recipe.batch(data, step, step_generator(0, step))["reference"] for step in range(20)])
    assert drawn.shape == (320, 32)
    assert abs(drawn.mean().item()) < 0.03
    assert drawn.std().item() == pytest.approx(1.0, abs=0.03)
    assert len(torch.unique(drawn[:, 0])) == 320
    # of whichever process a sample falls to, it gets the same
    second = recipe.batch(data[8:], 3, step_generator(0, 3, first=8))["reference"]
    assert torch.equal(second, recipe.batch(data, 3, step_generator(0, 3))["reference"][8:])
    recipe.normalise = True
    assert torch.allclose(recipe.batch(data, 0, step_generator(0, 0))["reference"].norm(dim=1), torch.ones(16))


def test_the_teacher_is_the_start_and_stays_it(tmp_path):
    recipe = RefineRecipe()
    start = tiny()
    report = trained(tmp_path, recipe, lr=1e-3)
    assert same(recipe.teacher, start)
    assert all(p.grad is None and not p.requires_grad for p in recipe.teacher.parameters())
    assert not same(report.encoder, start)
    assert not report.parts
    assert sum(p.numel() for p in report.encoder.parameters()) == sum(p.numel() for p in start.parameters())


def test_at_the_start_the_teacher_alone_asks_for_nothing():
    steepest = {}
    for alpha in (0.0, 0.5):
        recipe = RefineRecipe(alpha=alpha, alignment=0.0)
        encoder, batch = step_of(recipe)
        encoder.double()
        recipe.bind(encoder, None)
        value = sum(recipe.forward(encoder, batch).values())
        value.backward()
        steepest[alpha] = max(p.grad.abs().max().item() for p in encoder.parameters() if p.grad is not None)
        assert value.item() == pytest.approx(0.0, abs=1e-12) or alpha
    assert steepest[0.0] < 1e-6 * steepest[0.5]


def test_pieces_give_the_gradient_of_the_whole(tmp_path):
    whole = trained(tmp_path / "a", RefineRecipe()).encoder
    pieces = trained(tmp_path / "b", RefineRecipe(), micro_batch=3).encoder
    gaps = [float((a - b).detach().abs().max()) for a, b in zip(whole.parameters(), pieces.parameters(), strict=True)]
    assert max(gaps) < 1e-4


def test_a_run_goes_on_only_from_the_same_start(tmp_path):
    trained(tmp_path, RefineRecipe())
    with pytest.raises(ClipworksError, match="teacher differs"):
        train(items(), tiny(seed=5), out=tmp_path, recipe=RefineRecipe(), steps=3, batch_size=8, lr=1e-3, workers=1,
              device="cpu")  # fmt: skip


def test_the_gap_closes_and_pairs_are_still_found(tmp_path):
    data = items(32)
    start = trained(tmp_path / "a", ContrastiveRecipe(), data, steps=60, batch_size=16, lr=2e-3).encoder

    def judge(encoder):
        image = encoder.images([i for i, _ in drawings(32)]).numpy()
        text = encoder.texts([t for _, t in drawings(32)]).numpy()
        hit = np.mean([drawings(32)[j][1] == drawings(32)[i][1] for i, j in enumerate((image @ text.T).argmax(1))])
        return np.linalg.norm(image.mean(0) - text.mean(0)), hit

    gap, hit = judge(start)
    refined = train(data, start, out=tmp_path / "b", recipe=RefineRecipe(normalise=True), steps=30, batch_size=16,
                    lr=2e-4, schedule="constant", warmup=0, workers=1, device="cpu").encoder  # fmt: skip
    new_gap, new_hit = judge(refined)
    assert new_gap < 0.9 * gap
    assert new_hit >= hit - 0.05


def test_faults():
    for wrong in ({"alpha": 2.0}, {"temperature": 0.0}, {"alignment": -1.0}, {"distillation": -0.5}):
        with pytest.raises(ClipworksError, match=next(iter(wrong))):
            RefineRecipe(**wrong)
