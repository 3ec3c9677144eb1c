"""CLOC: the prompter, both ways to read a box, limits of the weights, and regions that are learned."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from clipworks.errors import BadWeights, ClipworksError
from clipworks.losses.cloc import cloc
from clipworks.losses.regions import box_distance
from clipworks.pretraining.cloc import ClocRecipe, Prompter, image_tokens
from clipworks.segment.regions import classify_regions, region_rows
from clipworks.training.feed import step_generator
from clipworks.training.recipe import ContrastiveRecipe
from training.toy import spawn, tiny

from .scenes import NAMES, scenes
from .small import same, trained


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def prompter(**options):
    torch.manual_seed(0)
    return Prompter(16, 8, **options).double()


def step(recipe, count=6, **options):
    encoder = tiny()
    recipe.bind(encoder, None)
    return encoder, recipe.batch(scenes(count, **options), 0, step_generator(0, 0))


BOXES = torch.tensor([[[0.1, 0.2, 0.5, 0.6], [0.3, 0.0, 1.0, 0.4], [0.0, 0.0, 1.0, 1.0]]], dtype=torch.float64)


def test_the_layer_written_out():
    """One prompt at a time through an ordinary block over [q; F], of which the first output is taken."""
    model, tokens = prompter(heads=2), draw(1, 7, 16).double()
    found = model(tokens, BOXES)
    for m in range(3):
        low, high = BOXES[0, m, :2], BOXES[0, m, 2:]
        codes = []
        for number, corner in enumerate((low, high)):
            angles = [np.pi * 2.0**k * float(c) for c in corner for k in range(4)]
            x, y = angles[:4], angles[4:]
            code = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)])
            codes.append(torch.tensor(code) + model.corner[number])
        q = model.box(torch.cat(codes))[None, None]
        alone = model.layer(torch.cat([q, tokens], 1))[0][:, 0]
        expected = F.normalize(model.out(model.norm(alone)), dim=-1)
        assert torch.allclose(found[0, m], expected[0].float(), atol=1e-5)


def test_the_order_of_tokens_does_not_matter_and_the_box_does():
    model, tokens = prompter(), draw(1, 9, 16).double()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(tokens, BOXES), model(tokens[:, order], BOXES), atol=1e-6)
    boxes = BOXES.clone().requires_grad_()
    model(tokens, boxes)[..., 0].sum().backward()
    assert (boxes.grad.abs() > 0).all()
    assert torch.allclose(model(tokens, BOXES)[:, :1], model(tokens, BOXES[:, :1]), atol=1e-6), "prompts are apart"


def test_boxes_of_words_are_boxes():
    found = prompter().locate(draw(4, 9, 16).double() * 50 - 25, 40 * draw(4, 6, 8, seed=3).double() - 20)
    assert ((found >= 0) & (found <= 1)).all()
    assert (found[..., :2] <= found[..., 2:]).all()


def test_boxes_are_learned_from_words():
    """Two images, three words each: the grounding loss alone moves the boxes to where they are to be."""
    model = prompter()
    tokens, words = draw(2, 9, 16).double(), draw(2, 3, 8, seed=5).double() - 0.5
    low = 0.5 * draw(2, 3, 2, seed=6)
    true = torch.cat([low, low + 0.2 + 0.3 * draw(2, 3, 2, seed=7)], -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    values = []
    for _ in range(150):
        optimizer.zero_grad()
        value = box_distance(model.locate(tokens, words), true).mean()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[0] > 0.8
    assert values[-1] < 0.25


def test_losses_of_a_step():
    recipe = ClocRecipe(regions=3, contrast=0.7, grounding=0.3, threshold=None)
    encoder, batch = step(recipe, least=1)
    found = recipe.forward(encoder, batch)
    kept = batch["labels"] >= 0
    assert 0 < kept.sum() < kept.numel()
    tokens = image_tokens(encoder.visual, batch["pixels"])[1]
    words = encoder.encode_text(batch["words"][kept])
    all_words = torch.zeros(*kept.shape, encoder.dim)
    all_words[kept] = words
    expected = cloc(recipe.prompter(tokens, batch["boxes"])[kept], words, encoder.log_scale.exp(),
                    recipe.prompter.locate(tokens, all_words)[kept], batch["boxes"][kept],
                    labels=batch["labels"][kept], threshold=None, contrast=0.7, grounding=0.3)  # fmt: skip
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5)
    plain = ContrastiveRecipe()
    plain.bind(encoder, None)
    alone = plain.forward(encoder, {k: batch[k] for k in ("pixels", "tokens")})["infonce"]
    assert found["infonce"].item() == pytest.approx(alone.item(), rel=1e-5)


def test_regions_that_fill_up_change_nothing():
    values, grads = [], []
    for count in (4, 9):
        recipe = ClocRecipe(regions=count)
        encoder, batch = step(recipe)
        losses = recipe.forward(encoder, batch)
        torch.stack(list(losses.values())).sum().backward()
        values.append({n: v.item() for n, v in losses.items()})
        grads.append(torch.cat([p.grad.flatten() for p in recipe.prompter.parameters()]))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert torch.allclose(*grads, atol=1e-5)


def test_no_region_in_the_whole_batch():
    recipe = ClocRecipe()
    encoder, _ = step(recipe)
    items = scenes(4)
    for item in items:
        item.columns = {}
    found = recipe.forward(encoder, recipe.batch(items, 0, step_generator(0, 0)))
    torch.stack(list(found.values())).sum().backward()
    assert found["contrast"].item() == found["grounding"].item() == 0
    assert all((p.grad == 0).all() for p in recipe.prompter.parameters() if p.grad is not None)


def test_weights_of_zero_are_plain_clip(tmp_path):
    plain = trained(tmp_path / "a", ContrastiveRecipe(), scenes(16))
    assert same(plain.encoder, trained(tmp_path / "b", ClocRecipe(contrast=0, grounding=0), scenes(16)).encoder)


def test_the_ramp():
    recipe = ClocRecipe(ramp=10)
    encoder, batch = step(recipe)
    assert recipe.forward(encoder, batch)["contrast"].item() == 0
    half, whole = (recipe.batch(scenes(6), s, step_generator(0, 0)) for s in (5, 20))
    values = [recipe.forward(encoder, b)["contrast"].item() for b in (half, whole)]
    assert values[0] == pytest.approx(values[1] / 2, rel=1e-5)


def test_pooling_instead_of_the_prompter():
    recipe = ClocRecipe(reader="roi")
    encoder, batch = step(recipe)
    found = recipe.features(encoder, batch)
    patches = encoder.visual.project(encoder.visual.run(batch["pixels"]).patches).unflatten(1, (4, 4))
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
    filler = batch["labels"] < 0
    expected = F.normalize(patches.mean((1, 2)), dim=-1)[:, None].expand(-1, 4, -1)[filler]
    assert (batch["boxes"][filler] == whole).all()
    assert torch.allclose(found["region"][filler], expected, atol=1e-5)


def test_pieces_give_the_gradient_of_the_whole(tmp_path):
    whole = trained(tmp_path / "a", ClocRecipe(), scenes(16)).encoder
    pieces = trained(tmp_path / "b", ClocRecipe(), scenes(16), micro_batch=3).encoder
    gaps = [float((a - b).detach().abs().max()) for a, b in zip(whole.parameters(), pieces.parameters(), strict=True)]
    assert max(gaps) < 2e-4


def accuracy(encoder, reader, items):
    right = [int(k) == NAMES.index(region["text"])
             for item in items
             for region, k in zip(
                 item.columns["regions"],
                 classify_regions(item.image, [r["box"] for r in item.columns["regions"]], NAMES, encoder,
                                  reader=reader, templates="{}").argmax(1), strict=True)]  # fmt: skip
    return float(np.mean(right))


@pytest.mark.slow
def test_regions_are_learned_and_the_prompter_is_kept(tmp_path):
    """Boxes of images that training did not see; captions say nothing of colours, so the image level is chance."""
    data, test = scenes(320), scenes(24, seed=9)
    report = trained(tmp_path, "cloc(grounding=0.5)", data, steps=150, batch_size=32, lr=3e-3, augment="none")
    model = Prompter.load(tmp_path / "parts.safetensors")
    assert all(torch.equal(v, report.parts[f"prompter.{n}"]) for n, v in model.state_dict().items())
    assert accuracy(report.encoder, model, test) > 0.85
    assert accuracy(tiny(), model, test) < 0.6
    assert report.losses["contrast"] < 0.3
    boxes = model.find(report.encoder, test[0].image, NAMES)
    assert boxes.shape == (4, 4)
    assert load_file(model.save(tmp_path / "own.safetensors")).keys() == model.state_dict().keys()
    rows = region_rows(test[0].image, [[0, 0, 0.5, 0.5]], report.encoder,
                       reader=Prompter.load(tmp_path / "own.safetensors"))  # fmt: skip
    assert rows.shape == (1, 32)


def test_faults(tmp_path):
    for wrong in ({"contrast": -1.0}, {"grounding": -1.0}, {"ramp": -1}, {"reader": "prompt"}, {"regions": 0}):
        with pytest.raises(ClipworksError, match=next(iter(wrong))):
            ClocRecipe(**wrong)
    report = trained(tmp_path, "slip(hidden=16, out=8)", steps=1)
    assert report.parts
    with pytest.raises(BadWeights, match="holds no prompter"):
        Prompter.load(tmp_path / "parts.safetensors")


def _two(rank, count, path):
    """Unequal numbers of regions on the two processes must not weigh differently."""
    recipe, (encoder, batch) = _halves()
    mine = {k: v[3 * rank : 3 * rank + 3] if v.ndim else v for k, v in batch.items()}
    losses = recipe.losses(recipe.features(encoder, mine))
    torch.stack(list(losses.values())).sum().backward()
    grads = torch.cat([p.grad.flatten() for p in recipe.prompter.parameters()])
    torch.save({"losses": {k: v.detach() for k, v in losses.items()}, "grads": grads / count}, f"{path}/{rank}.pt")


def _halves():
    recipe = ClocRecipe()
    encoder, batch = step(recipe)
    batch["labels"][:3, 1:] = -1
    return recipe, (encoder, batch)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    spawn(_two, 2, str(tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    recipe, (encoder, batch) = _halves()
    losses = recipe.losses(recipe.features(encoder, batch))
    torch.stack(list(losses.values())).sum().backward()
    for name in ("contrast", "grounding"):
        assert all(torch.allclose(part["losses"][name], losses[name], atol=1e-5) for part in parts)
    grads = torch.cat([p.grad.flatten() for p in recipe.prompter.parameters()])
    assert torch.allclose(parts[0]["grads"] + parts[1]["grads"], grads, atol=1e-5)
