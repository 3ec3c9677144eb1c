"""A-CLIP: scores, cutting, choice of patches, slow tower, losses."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipworks.data.item import Item
from clipworks.errors import ClipworksError
from clipworks.pretraining.a_clip import AttentiveRecipe, attentive_patches, cut_scores, far, rising
from clipworks.training.augment import Augment
from clipworks.training.recipe import ContrastiveRecipe
from training.toy import tiny

from .small import items, step_of, trained

SMALL = {"hidden": 16, "out": 8}
WHOLE = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_counts_and_whole_blocks():
    keep = attentive_patches(draw(6, 14, 14), 0.5)
    assert keep.shape == (6, 100)
    for row in keep.tolist():
        cells = {(p // 14 // 2, p % 14 // 2) for p in row}
        assert len(cells) == 25
        assert len(set(row)) == 100
    assert attentive_patches(torch.ones(2, 14, 14), 0.5).shape == (2, 100)
    assert attentive_patches(draw(1, 14, 14), 1.0).tolist() == [list(range(196))]


def test_the_best_blocks_stay():
    scores = draw(5, 8, 8)
    for row, kept in zip(scores.numpy(), attentive_patches(scores, 0.5).tolist(), strict=True):
        blocks = {(i, j): row[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for i in range(4) for j in range(4)}
        best = sorted(blocks, key=lambda cell: -blocks[cell])[: int(16 * 0.5) + 1]
        assert set(kept) == {8 * (2 * i + a) + 2 * j + b for i, j in best for a in (0, 1) for b in (0, 1)}


def test_bilinear_halving_is_block_averaging():
    scores = draw(3, 1, 14, 14)
    halved = F.interpolate(scores, (7, 7), mode="bilinear", align_corners=False)
    assert torch.allclose(halved, F.avg_pool2d(scores, 2), atol=1e-6)


def test_cutting_follows_the_maps_of_pixels():
    """Blow the map up to the enclosing crop's pixels, cut the box out, resize: sample by sample."""
    rng = np.random.default_rng(0)
    scores = draw(20, 6, 6)
    whole, boxes, expected = [], [], []
    for number in range(20):
        x, y = rng.integers(0, 10, 2)
        w, h = rng.integers(20, 90, 2)
        left, top = (int(rng.integers(0, s // 3 + 1)) for s in (w, h))
        wide, tall = int(rng.integers(5, w - left + 1)), int(rng.integers(5, h - top + 1))
        whole.append([x, y, w, h])
        boxes.append([x + left, y + top, wide, tall])
        big = F.interpolate(scores[number][None, None], (int(h), int(w)), mode="bilinear", align_corners=False)
        cut = big[:, :, top : top + tall, left : left + wide]
        expected.append(F.interpolate(cut, (6, 6), mode="bilinear", align_corners=False)[0, 0])
    found = cut_scores(scores, torch.tensor(boxes).float(), torch.tensor(whole).float(), (6, 6))
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)


def test_the_whole_box_gives_the_map_back():
    scores, box = draw(2, 14, 14), torch.tensor([[3.0, 5.0, 140.0, 70.0]] * 2)
    assert torch.allclose(cut_scores(scores, box, box, (14, 14)), scores, atol=0.06)
    smooth = torch.linspace(0, 1, 14).expand(2, 14, 14)
    assert torch.allclose(cut_scores(smooth, box, box, (14, 14)), smooth, atol=0.01)
    assert torch.allclose(cut_scores(torch.ones(2, 7, 7), box, box, (14, 14)), torch.ones(2, 14, 14), atol=1e-6)


def test_scores_are_what_is_left_of_the_class_tokens_attention():
    recipe = AttentiveRecipe(**SMALL)
    encoder, batch = step_of(recipe)
    scores, _ = recipe.look(batch["whole"])
    output = encoder.visual.run(batch["whole"], output_attention=[0, 1])
    maps = torch.stack([output.attentions[i] for i in (0, 1)])  # (layers, B, heads, N, N)
    assert torch.allclose(scores.flatten(1), maps.mean((0, 2))[:, 0, 1:], atol=1e-6)
    own = maps.mean((0, 2))[:, 0, 0]
    assert torch.allclose(scores.sum((1, 2)) + own, torch.ones(8), atol=1e-5)


def test_boxes_and_views():
    recipe = AttentiveRecipe(colour=None, **SMALL)
    encoder, batch = step_of(recipe)
    one, two, both = batch["boxes"].unbind(1)
    for box in (one, two):
        assert (box[:, :2] >= both[:, :2]).all()
        assert (box[:, :2] + box[:, 2:] <= both[:, :2] + both[:, 2:]).all()
    assert torch.equal(both[:, 0], torch.minimum(one[:, 0], two[:, 0]))  # the left edge of the two, not a height
    image = items(8)[3].image
    x, y, w, h = (int(v) for v in one[3])
    cut = image.resize((32, 32), 3, box=(x, y, x + w, y + h))
    assert torch.allclose(batch["first"][3], encoder.preprocess.normalize(np.asarray(cut)))


def test_kept_whole_equal_views_without_extras_is_plain_clip():
    recipe = AttentiveRecipe(keep=1.0, simclr=0.0, byol=0.0, crop=WHOLE, colour=None)
    encoder, batch = step_of(recipe)
    assert torch.equal(batch["first"], batch["second"])
    plain = ContrastiveRecipe()
    plain.bind(encoder, None)
    expected = plain.forward(encoder, {"pixels": batch["first"], "tokens": batch["tokens"]})["infonce"]
    found = recipe.forward(encoder, batch)
    assert list(found) == ["clip"]
    assert found["clip"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_losses_written_out():
    recipe = AttentiveRecipe(simclr=0.5, byol=3.0, **SMALL)
    encoder, batch = step_of(recipe)
    found = recipe.forward(encoder, batch)
    scores, target = recipe.look(batch["whole"])
    views, clips = [], []
    text = encoder.encode_text(batch["tokens"])
    for n, name in enumerate(("first", "second")):
        kept = attentive_patches(cut_scores(scores, batch["boxes"][:, n], batch["boxes"][:, 2], (4, 4)))
        assert kept.shape == (8, 12)  # int(4 / 2) + 1 of 4 blocks
        output = encoder.visual.run(batch[name], keep=kept)
        views.append(encoder.visual.norm_post(output.tokens[:, 0]))
        logits = encoder.logit_scale * F.normalize(output.pooled, dim=1) @ text.T
        own = torch.arange(8)
        clips.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
    assert found["clip"].item() == pytest.approx(sum(clips).item() / 2, abs=1e-5)
    a, b = (F.normalize(recipe.simclr_head(v), dim=1) for v in views)
    rows = torch.cat([a, b])
    logits = (rows @ rows.T / 0.1).masked_fill(torch.eye(16, dtype=torch.bool), -torch.inf)
    partner = torch.arange(16).roll(8)
    assert found["simclr"].item() == pytest.approx(0.5 * F.cross_entropy(logits, partner).item(), rel=1e-4)
    guesses = [recipe.predictor(recipe.projector(v)) for v in views]
    byol = np.mean([(2 - 2 * F.cosine_similarity(g, target)).mean().item() for g in guesses])
    assert found["byol"].item() == pytest.approx(3 * byol, rel=1e-4)


def test_the_released_pairing_is_an_option():
    recipe = AttentiveRecipe(first_view_twice=True, **SMALL)
    encoder, batch = step_of(recipe)
    twice = recipe.forward(encoder, batch)["simclr"]
    recipe.first_view_twice = False
    assert twice < recipe.forward(encoder, batch)["simclr"]


def test_distance_is_between_zero_and_four():
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert far(rows, 3 * rows).item() == pytest.approx(0, abs=1e-6)
    assert far(rows, -rows).item() == pytest.approx(4, abs=1e-6)
    target = rows.flip(0).requires_grad_()
    assert 0 < far(rows.requires_grad_(), target).item() < 4
    far(rows, target).backward()
    assert target.grad is None


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_the_slow_tower_follows(momentum):
    recipe = AttentiveRecipe(momentum=momentum, **SMALL)
    encoder, _ = step_of(recipe)
    before = [p.clone() for p in recipe.slow.parameters()]
    with torch.no_grad():
        for p in encoder.visual.parameters():
            p.add_(1.0)
    recipe.follow(encoder, 5)
    for old, slow, fast in zip(before, recipe.slow.parameters(), encoder.visual.parameters(), strict=True):
        assert torch.allclose(slow, momentum * old + (1 - momentum) * fast, atol=1e-6)


def test_momentum_rises_to_one():
    assert rising(0.996, 0, 100) == pytest.approx(0.996)
    assert rising(0.996, 50, 100) == pytest.approx(0.998)
    assert rising(0.996, 100, 100) == rising(0.996, 200, 100) == 1
    assert rising(0.9, 70, None) == 0.9
    values = [rising(0.9, i, 40) for i in range(41)]
    assert values == sorted(values)
    assert values[10] == pytest.approx(1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2)


def test_no_gradient_reaches_the_slow_side(tmp_path):
    recipe = AttentiveRecipe(**SMALL)
    encoder, batch = step_of(recipe)
    torch.stack(list(recipe.forward(encoder, batch).values())).sum().backward()
    slow = [*recipe.slow.parameters(), *recipe.slow_projector.parameters()]
    assert slow
    assert all(p.grad is None and not p.requires_grad for p in slow)
    learning = [*recipe.simclr_head.parameters(), *recipe.projector.parameters(), *recipe.predictor.parameters()]
    assert all(p.grad is not None for p in learning)


def test_a_run_that_goes_on_is_the_run_in_one_piece(tmp_path):
    """The slow tower is part of the checkpoint."""
    made = lambda: AttentiveRecipe(momentum=0.5, **SMALL)  # noqa: E731
    whole = trained(tmp_path / "whole", made(), steps=4, save_every=1, keep=9)
    again = trained(tmp_path / "again", made(), steps=4, save_every=1, keep=9)
    for file in sorted((tmp_path / "again" / "checkpoints").glob("*"))[4:]:
        file.unlink()
    resumed = trained(tmp_path / "again", made(), steps=4, save_every=1, keep=9)
    assert resumed.resumed_from == 2
    assert again.steps == 4
    for name, value in whole.encoder.state_dict().items():
        assert torch.equal(value, resumed.encoder.state_dict()[name]), name
    for name, value in whole.parts.items():
        assert torch.equal(value, resumed.parts[name]), name


def test_half_the_resolution_for_the_slow_tower(tmp_path):
    recipe = AttentiveRecipe(slow_size=16, **SMALL)
    encoder, batch = step_of(recipe)
    assert batch["whole"].shape[-2:] == (16, 16)
    scores, _ = recipe.look(batch["whole"])
    assert scores.shape == (8, 2, 2)
    assert set(recipe.forward(encoder, batch)) == {"clip", "simclr", "byol"}


def test_what_stays_is_what_the_caption_speaks_of(tmp_path):
    """A coloured square on noise, named by the caption: the contrast alone makes its patches stay."""
    rng = np.random.default_rng(0)
    colours = {"red": (230, 20, 20), "green": (20, 210, 40), "blue": (30, 50, 240), "yellow": (240, 230, 30)}
    data, places = [], []
    for i in range(192):
        name = list(colours)[i % 4]
        image = rng.integers(90, 130, (32, 32, 3)).astype(np.uint8)
        row, column = (int(v) for v in rng.integers(0, 2, 2))
        image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = colours[name]
        data.append(Item(f"k{i}", image, caption=name))
        places.append((row, column))
    recipe = AttentiveRecipe(momentum=0.9, simclr=0, byol=0, cell=1, crop=WHOLE, colour=None)
    trained(tmp_path, recipe, data, steps=80, batch_size=32, lr=3e-3)
    scores, _ = recipe.look(torch.stack([tiny().preprocess(item.image) for item in data]))
    inside = torch.zeros(192, 4, 4)
    for number, (row, column) in enumerate(places):
        inside[number, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1
    # a quarter of the image; at the start it gets 0.28 of the attention
    assert ((scores * inside).sum((1, 2)) / scores.sum((1, 2))).mean() > 0.5
    kept = attentive_patches(scores, 0.5, cell=1)  # 9 of 16
    assert inside.flatten(1).gather(1, kept).sum(1).mean() / 4 > 0.8


def test_faults():
    for wrong in ({"keep": 1.5}, {"momentum": -0.1}, {"byol": -1.0}):
        with pytest.raises(ClipworksError, match=next(iter(wrong))):
            AttentiveRecipe(**wrong)
    with pytest.raises(ClipworksError, match=r"cell must divide the grid of patches, 4 x 4. Got 3"):
        step_of(AttentiveRecipe(cell=3))
    with pytest.raises(ClipworksError, match="micro_batch"):
        trained("/nowhere", AttentiveRecipe(), micro_batch=2)
