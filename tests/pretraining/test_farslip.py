"""FarSLIP: the dense map, both stages against the formulas, whose gradient flows, and limits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipworks.encoders.layers import attention_weights
from clipworks.errors import ClipworksError
from clipworks.losses.farslip import category_contrast
from clipworks.pretraining.farslip import FarslipRecipe, dense_run
from clipworks.segment.clearclip import ClearCLIP
from clipworks.segment.common import enter
from clipworks.segment.regions import region_rows, roi_align
from clipworks.training.augment import Augment
from clipworks.training.feed import step_generator
from clipworks.training.recipe import ContrastiveRecipe
from training.toy import tiny

from .scenes import NAMES, scenes
from .small import same, trained

WHOLE = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))
BOTH = {"distillation": 0.2, "categories": 0.7, "smallest": 0.0, "crops": 2, "template": "a photo of a {}"}


def step(recipe, count=5, **options):
    encoder = tiny()
    recipe.bind(encoder, None)
    return encoder, recipe.batch(scenes(count, **options), 0, step_generator(0, 0))


def test_the_map_is_what_segmentation_reads_and_the_image_level_is_untouched():
    encoder = tiny()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = (images - 0.5) / 0.25
    output, maps = dense_run(encoder.visual, pixels)
    assert maps.shape == (2, 4, 4, 32)
    assert torch.equal(output.pooled, encoder.visual.run(pixels).pooled)
    assert torch.allclose(maps, ClearCLIP("qq+kk+vv").features(enter(encoder, images)), atol=1e-5)


def test_three_attentions_whose_rows_sum_to_one():
    q, k = (torch.rand(1, 2, 9, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    v = torch.tensor([1.0, -2.0, 0.5, 3.0]).expand(1, 2, 9, 4)
    parts = [attention_weights(rule, q, k, v) for rule in ("qq", "kk", "vv")]
    assert all(torch.allclose(p.sum(-1), torch.ones(1, 2, 9)) for p in parts)
    assert torch.allclose(attention_weights("qq+kk+vv", q, k, v) @ v, 3 * v, atol=1e-5)


def test_both_losses_of_a_step():
    recipe = FarslipRecipe(**BOTH)
    encoder, batch = step(recipe, least=1)
    assert batch["crops"].shape == (5, 2, 3, 32, 32)
    found = recipe.forward(encoder, batch)
    maps = dense_run(encoder.visual, batch["pixels"])[1]
    cosines = []
    for n in range(5):
        for c in range(2):
            full = roi_align(maps[n : n + 1], batch["places"][n : n + 1, c : c + 1])[0, 0, 0, 0]
            crop = dense_run(encoder.visual, batch["crops"][n, c][None])[1][0].mean((0, 1))
            cosines.append(F.cosine_similarity(full, crop, dim=0).item())
    assert found["distillation"].item() == pytest.approx(0.2 * (1 - np.mean(cosines)), rel=1e-4)
    kept = batch["labels"] >= 0
    rows = encoder.encode_image(batch["objects"][kept])
    words = encoder.encode_text(batch["words"][kept])
    value = category_contrast(rows, words, encoder.log_scale.exp(), batch["labels"][kept])
    assert found["categories"].item() == pytest.approx(0.7 * value.item(), rel=1e-4)
    plain = ContrastiveRecipe()
    plain.bind(encoder, None)
    alone = plain.forward(encoder, {k: batch[k] for k in ("pixels", "tokens")})["infonce"]
    assert found["infonce"].item() == pytest.approx(alone.item(), rel=1e-5)


def test_crops_are_where_their_places_say():
    _, batch = step(FarslipRecipe(crop=Augment(scale=(0.3, 0.7))))
    area = (batch["places"][..., 2:] - batch["places"][..., :2]).prod(-1)
    assert ((area > 0.25) & (area < 0.75)).all()
    for pixels, place, crop in zip(batch["pixels"], batch["places"][:, 0], batch["crops"][:, 0], strict=True):
        left, top, right, bottom = (place * 32).round().int().tolist()
        part = F.interpolate(pixels[None, :, top:bottom, left:right], (32, 32), mode="bicubic", align_corners=False)[0]
        assert torch.corrcoef(torch.stack([part.flatten(), crop.flatten()]))[0, 1] > 0.97


def test_a_crop_of_everything_has_nothing_to_learn():
    recipe = FarslipRecipe(crop=WHOLE, crops=1)
    encoder, batch = step(recipe)
    assert torch.equal(batch["crops"][:, 0], batch["pixels"])
    assert recipe.forward(encoder, batch)["distillation"].item() == pytest.approx(0.0, abs=1e-5)


def test_whose_gradient_flows():
    gradients = {}
    for teacher in ("active", "frozen", "ema"):
        recipe = FarslipRecipe(teacher=teacher, distillation=1.0)
        encoder, batch = step(recipe)
        recipe.forward(encoder, batch)["distillation"].backward()
        gradients[teacher] = encoder.visual.blocks[0].attention.v.weight.grad.clone()
        if teacher == "active":
            assert recipe.slow is None
        else:
            assert all(p.grad is None for p in recipe.slow.parameters())
    assert torch.allclose(gradients["frozen"], gradients["ema"], atol=1e-6), "they begin alike"
    assert not torch.allclose(gradients["frozen"], gradients["active"], atol=1e-4)


def test_the_slow_copy_moves_with_ema_alone():
    for teacher, moved in (("ema", True), ("frozen", False)):
        recipe = FarslipRecipe(teacher=teacher, momentum=0.5)
        encoder, batch = step(recipe)
        before = recipe.slow.positions.clone()
        with torch.no_grad():
            encoder.visual.positions.add_(1.0)
        recipe.forward(encoder, batch)
        assert torch.allclose(recipe.slow.positions, before + 0.5 * moved, atol=1e-6)
        assert recipe.split is (teacher == "frozen")


def test_weights_of_zero_are_plain_clip(tmp_path):
    plain = trained(tmp_path / "a", ContrastiveRecipe(), scenes(8), steps=2)
    assert same(plain.encoder, trained(tmp_path / "b", FarslipRecipe(distillation=0), scenes(8), steps=2).encoder)


def test_no_object_in_the_whole_batch():
    recipe = FarslipRecipe(distillation=0, categories=1, smallest=1.0)
    encoder, batch = step(recipe)
    assert (batch["labels"] == -1).all()
    found = recipe.forward(encoder, batch)
    assert found["categories"].item() == 0
    torch.stack(list(found.values())).sum().backward()
    assert torch.isfinite(encoder.visual.positions.grad).all()


@pytest.mark.slow
def test_objects_are_learned(tmp_path):
    """Second stage: crops of images that training did not see; captions say nothing of colours."""
    data, test = scenes(96), scenes(16, seed=9)
    recipe = "farslip(distillation=0, categories=1, smallest=0.0, template='a photo of a {}')"
    report = trained(tmp_path, recipe, data, steps=40, batch_size=24, lr=3e-3, augment="none")

    def accuracy(encoder):
        words = encoder.texts([f"a photo of a {name}" for name in NAMES])
        right = []
        for item in test:
            regions = item.columns["regions"]
            best = (region_rows(item.image, [r["box"] for r in regions], encoder) @ words.T).argmax(1)
            right += [NAMES[int(k)] == r["text"] for k, r in zip(best, regions, strict=True)]
        return np.mean(right)

    assert accuracy(report.encoder) > 0.9
    assert accuracy(tiny()) < 0.6


def test_faults():
    for wrong in ({"distillation": -1.0}, {"categories": -1.0}, {"teacher": "passive"}, {"momentum": 2.0},
                  {"crops": 0}):  # fmt: skip
        with pytest.raises(ClipworksError, match=next(iter(wrong))):
            FarslipRecipe(**wrong)
    with pytest.raises(ClipworksError, match="micro_batch"):
        trained("/nowhere", FarslipRecipe(teacher="ema"), micro_batch=2)
