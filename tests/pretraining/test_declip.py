"""DeCLIP: what a step compares, which weights each term reaches, boxes of a grid, averaging with the start."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipworks.encoders.layers import attention_weights
from clipworks.errors import ClipworksError
from clipworks.pretraining.declip import DeclipRecipe, grid_boxes
from clipworks.segment.clearclip import ClearCLIP
from clipworks.segment.common import enter, similarities
from clipworks.segment.regions import roi_align
from clipworks.training.feed import step_generator
from clipworks.training.wise_ft import interpolate
from training.toy import tiny

from .scenes import scenes
from .small import trained


def colours(images):
    """A vision model that knows mean colours on a grid of 8 x 8."""
    return F.adaptive_avg_pool2d(images, (8, 8)) + 0.05


def step(recipe, count=3, number=0):
    encoder = tiny()
    recipe.bind(encoder, None)
    return encoder, recipe.batch(scenes(count), number, step_generator(0, number))


@pytest.mark.parametrize("form", ["distance", "divergence"])
def test_a_step_written_out(form):
    recipe = DeclipRecipe(relations=colours, form=form, tokens=2, weight=0.3, temperature=0.5)
    encoder, batch = step(recipe)
    with torch.no_grad():  # so that the student is no longer its teacher
        encoder.visual.blocks[1].attention.q.weight.mul_(1.5)
    found = recipe.forward(encoder, batch)
    assert batch["images"].shape == (3, 3, 64, 64)
    hidden = enter(encoder, batch["images"])
    maps = ClearCLIP("qq").features(hidden)
    tokens = roi_align(maps, batch["boxes"], 2).flatten(2, 3).flatten(0, 1)
    goal = tiny().encode_image(batch["crops"].flatten(0, 1))
    shares = F.cosine_similarity(tokens, goal[:, None], dim=-1).softmax(1) if form == "divergence" else 0.25
    pooled = (tokens * (shares[..., None] if form == "divergence" else 0.25)).sum(1)
    content = 1 - F.cosine_similarity(pooled, goal, dim=-1).mean()
    x = hidden.heads("q")[:, :, 1:].transpose(1, 2).flatten(2)
    wanted = similarities(F.adaptive_avg_pool2d(batch["images"], (8, 8)).permute(0, 2, 3, 1) + 0.05)
    if form == "distance":
        context = (wanted - similarities(x)).square().sum(-1).sqrt().mean()
    else:
        context = F.kl_div((similarities(x) / 0.5).log_softmax(-1), (wanted / 0.5).softmax(-1), reduction="sum") / 192
        seen = (F.adaptive_avg_pool2d(batch["images"], (8, 8)) + 0.05).permute(0, 2, 3, 1)
        inside = similarities(roi_align(seen, batch["boxes"], 2).flatten(2, 3).flatten(0, 1))
        logs = (similarities(tokens) / 0.5).log_softmax(-1)
        content = content + F.kl_div(logs, (inside / 0.5).softmax(-1), reduction="sum") / (4 * len(tokens))
    assert found["content"].item() == pytest.approx(content.item(), rel=1e-4)
    assert found["context"].item() == pytest.approx(0.3 * context.item(), rel=1e-3)


def test_which_weights_each_term_reaches():
    recipe = DeclipRecipe(relations=colours)
    encoder, batch = step(recipe)
    last, projection = encoder.visual.blocks[-1], encoder.visual.projection.weight
    names = {"q": last.attention.q.weight, "v": last.attention.v.weight, "out": last.attention.out.weight,
             "projection": projection, "earlier": encoder.visual.blocks[0].attention.v.weight,
             "k": last.attention.k.weight, "up": last.mlp.up.weight}  # fmt: skip
    reached = {}
    for term in ("content", "context"):
        value = recipe.forward(encoder, batch)[term]
        found = torch.autograd.grad(value, list(names.values()), allow_unused=True)
        reached[term] = {n for n, g in zip(names, found, strict=True) if g is not None and g.abs().sum() > 0}
    assert reached["context"] == {"q", "earlier"}
    assert reached["content"] == {"q", "v", "out", "projection", "earlier"}, "the queries through the attention"


def test_teachers_stay():
    recipe = DeclipRecipe()
    encoder, batch = step(recipe)
    torch.stack(list(recipe.forward(encoder, batch).values())).sum().backward()
    assert all(p.grad is None for p in recipe.teacher.parameters())
    with torch.no_grad():
        encoder.visual.positions.add_(1.0)
    assert torch.equal(recipe.teacher.visual.positions, tiny().visual.positions)


def test_the_scale_of_the_attention():
    q = torch.rand(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    paper, code = DeclipRecipe().rule, DeclipRecipe(scale=1.0).rule
    assert torch.allclose(DeclipRecipe(scale=0.5).rule(q, q, q, None), attention_weights(paper, q, q, q))
    logits = q @ q.transpose(-2, -1)
    assert torch.equal(logits, logits.transpose(-2, -1))
    weights = attention_weights(code, q, q, q)
    assert torch.allclose(weights, logits.softmax(-1))
    assert torch.allclose(weights.sum(-1), torch.ones(1, 2, 5))


def test_grids_of_boxes():
    counts = set()
    for seed in range(60):
        boxes = grid_boxes(np.random.default_rng(seed), 6, 20)
        counts.add(len(boxes))
        assert len(boxes) <= 20
        assert (boxes[:, 2:] - boxes[:, :2] > 1 / 6 - 1e-6).all()
        assert (boxes[:, 2:] - boxes[:, :2]).prod(-1).sum().item() == pytest.approx(1.0, abs=1e-5)
    assert len(counts) > 8
    recipe = DeclipRecipe(side=16, splits=6)  # two tokens a side: no box is smaller than one
    for number in range(8):
        _, batch = step(recipe, number=number)
        assert (batch["boxes"][..., 2:] - batch["boxes"][..., :2]).min() >= 0.5


def test_crops_show_their_boxes():
    recipe = DeclipRecipe(side=96)
    _, batch = step(recipe)
    for number, box in enumerate(batch["boxes"][1]):
        left, top, right, bottom = (96 * box).round().int().tolist()
        part = F.interpolate(batch["images"][1:2, :, top:bottom, left:right], (32, 32), mode="bilinear")[0]
        pair = torch.stack([part.flatten(), batch["crops"][1, number].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.9


def test_relations_completed_by_maps():
    even = lambda images: [torch.full((len(images), 64, 64), 1 / 64)]  # noqa: E731
    recipe = DeclipRecipe(relations=colours, maps=even)
    encoder, batch = step(recipe)
    found = recipe.features(encoder, batch)["relations"]
    assert torch.allclose(found, found[:, :1].expand_as(found), atol=1e-5)


def test_images_alone_teach_and_the_average_keeps_the_ends(tmp_path):
    data = scenes(16)
    for item in data:
        item.caption, item.columns = None, {}
    recipe = DeclipRecipe(relations=colours, weight=0.5)
    encoder, batch = step(DeclipRecipe(relations=colours, weight=0.5))
    report = trained(tmp_path, recipe, data, steps=12, lr=2e-3)
    judge = DeclipRecipe(relations=colours, weight=0.5)
    judge.bind(encoder, None)
    before, after = judge.forward(encoder, batch), judge.forward(report.encoder, batch)
    assert 0 < after["content"] < before["content"]
    assert after["context"] < before["context"]
    start, tuned = tiny().state_dict(), report.encoder.state_dict()
    for share, end in ((0.0, start), (1.0, tuned)):
        assert all(torch.equal(v, end[n]) for n, v in interpolate(start, tuned, share).items())
    assert torch.equal(tuned["text.positions"], start["text.positions"])


def test_faults():
    for wrong in ({"form": "kl"}, {"weight": -1.0}, {"temperature": 0.0}, {"tokens": 0}, {"splits": 0}, {"most": 0}):
        with pytest.raises(ClipworksError, match=next(iter(wrong))):
            DeclipRecipe(**wrong)
    with pytest.raises(ClipworksError, match="affinity must be"):
        DeclipRecipe(relations="dino")
