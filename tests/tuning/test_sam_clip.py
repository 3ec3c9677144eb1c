"""Merging: the new head, the distances, what each stage may change; the experiment: with rehearsal both are kept."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.segment.mask_losses import dice_loss, pixel_loss
from clipworks.training.loop import train
from clipworks.tuning.merging import MergeHead, Teacher, cosine_distance, match, prompt_points
from clipworks.tuning.sam_clip import SAMCLIP, MergeRecipe, grid_map
from clipworks.zeroshot.classifier import class_vectors

from .toys import NAMES, TEMPLATE, bert_shaped, changed, clip_shaped, coloured, pixels, quick


class Colours(nn.Module):
    """The brightest values of an image, or of every 4 x 4 pixels of it."""

    def __init__(self, dense=False):
        super().__init__()
        self.size = (4, 4) if dense else (1, 1)

    def forward(self, rgb):
        found = F.adaptive_max_pool2d(rgb, self.size) - 0.5
        return found if self.size == (4, 4) else found.flatten(1)


def merging(**settings):
    return quick(SAMCLIP, **{"probe_epochs": 1, "hidden": 16, "lr": 1e-3, "probe_rate": 1.0, **settings})


def test_the_distance_is_one_minus_the_cosine():
    """Card: in [0, 2], 0 where both agree, lengths do not matter."""
    one, two = pixels(4).flatten(1)[:, :8], pixels(4, seed=1).flatten(1)[:, :8]
    a, b = one.numpy(), two.numpy()
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine_distance(one, two).item() == pytest.approx(1 - cosines.mean(), rel=1e-5)
    torch.testing.assert_close(cosine_distance(3 * one, 0.2 * two), cosine_distance(one, two))
    assert cosine_distance(one, one).item() == pytest.approx(0, abs=1e-6)
    assert cosine_distance(one, -one).item() == pytest.approx(2, abs=1e-6)
    whole = two[:, :, None, None].expand(-1, -1, 2, 3)
    torch.testing.assert_close(match(one[:, None].expand(-1, 6, -1), (2, 3), whole), cosine_distance(one, two))


def test_focal_and_dice():
    """Card: Dice of identical masks is 0, of disjoint ones 1; focal with gamma 0, alpha 0.5 is half of BCE."""
    mask = (torch.arange(900) < 400).float()[None]
    sure = 200 * mask - 100
    assert dice_loss(sure, mask).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(-sure, mask).item() == pytest.approx(1, abs=2e-3)
    logits = torch.randn(1, 900, generator=torch.Generator().manual_seed(0))
    half = F.binary_cross_entropy_with_logits(logits, mask) / 2
    assert pixel_loss(logits, mask, 0.0, 0.5).item() == pytest.approx(half.item(), rel=1e-5)


def test_the_head_is_the_last_blocks_a_maximum_and_a_network():
    encoder = clip_shaped()
    head = MergeHead(encoder.visual, 1, 24, 5)
    for name, value in encoder.visual.blocks[-1].state_dict().items():
        assert torch.equal(head.blocks[0].state_dict()[name], value)
    assert head.blocks[0] is not encoder.visual.blocks[-1]
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    tokens = encoder.visual.blocks[-1](x)[0].detach()
    top = tokens.numpy().max(1)
    scaled = (top - top.mean(1, keepdims=True)) / np.sqrt(top.var(1, keepdims=True) + 1e-5)
    weights = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in head.mlp if isinstance(m, nn.Linear)]
    assert [w.shape for w, _ in weights] == [(24, 16), (24, 24), (5, 24)]
    for number, (w, b) in enumerate(weights):
        scaled = scaled @ w.T + b
        if number < 2:
            scaled = F.gelu(torch.from_numpy(scaled)).numpy()
    np.testing.assert_allclose(head(x).detach().numpy(), scaled, atol=1e-5)
    torch.testing.assert_close(head.tokens(x).amax(1), tokens.amax(1))
    torch.testing.assert_close(head.dense(x[:, :1])[:, 0], head(x[:, :1]))  # one patch: both are the same


def test_a_teacher_sees_what_the_student_sees_in_its_own_way():
    student = clip_shaped()
    rgb = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in (student.config.preprocess.mean,
                                                          student.config.preprocess.std))  # fmt: skip
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    answer = Teacher(Spy(), student.config.preprocess)((rgb - mean) / std)
    torch.testing.assert_close(seen[0], rgb, atol=1e-6, rtol=0)
    assert answer.shape == (2, 3, 16, 16)
    same = Teacher(student, student.config.preprocess)
    torch.testing.assert_close(same(pixels(3)), student.encode_image(pixels(3)).detach())
    larger = toy_encoder(3, dim=5, image_size=24, tokenizer=CLIPTokenizer())
    assert Teacher(larger, student.config.preprocess)(pixels(3)).shape == (3, 5)
    assert Teacher(larger, student.config.preprocess).width(16) == 5
    with pytest.raises(ClipworksError, match="teacher must answer with a map"):
        Teacher(nn.Flatten(0), student.config.preprocess)(pixels(2))


def test_the_first_and_the_last_stage_change_the_head_alone():
    """Card: stage I leaves every old weight, so the masks are bit-identical; so does stage III."""
    encoder, skill, (x, _) = bert_shaped(), nn.Conv2d(16, 2, 1), coloured()
    first = merging(encoder=encoder, teacher=Colours(), skill=skill, epochs=0).fit(x)
    start = first._shaped(encoder)
    assert {n.partition(".")[0] for n in changed(start, first.encoder_)} == {"merged"}
    masks = [e.skill(grid_map(e.visual.run(x))) for e in (start, first.encoder_)]
    assert torch.equal(*masks)
    second = merging(encoder=encoder, teacher=Colours(), skill=skill).fit(x)
    assert {n.partition(".")[0] for n in changed(start, second.encoder_)} == {"merged", "skill", "visual"}
    third = merging(encoder=encoder, teacher=Colours(), skill=skill, sizes=(8, 24), size_epochs=1).fit(x)
    assert {n.partition(".")[0] for n in changed(second.encoder_, third.encoder_)} == {"merged"}
    assert third.maps(x, size=24).shape == (12, 6, 6, 3)


def test_the_backbone_learns_at_a_tenth_of_the_rate():
    """Adam's first step is as long as the rate, whatever the gradient; the ratio holds in every step."""
    encoder, (x, _) = clip_shaped(), coloured()
    settings = {"encoder": encoder, "teacher": Colours(), "probe_epochs": 0, "batch_size": 12, "weight_decay": 0.0}
    slow, still = (merging(backbone_rate=r, **settings).fit(x) for r in (0.1, 0.0))
    start = slow._shaped(encoder).state_dict()
    far = {n: (v - start[n]).abs().max().item() for n, v in slow.encoder_.state_dict().items()}
    head = max(v for n, v in far.items() if n.startswith("merged."))
    tower = max(v for n, v in far.items() if n.startswith("visual."))
    assert tower == pytest.approx(head / 10, rel=0.02)
    assert {n.partition(".")[0] for n in changed(slow._shaped(encoder), still.encoder_)} == {"merged"}


def test_the_gradient_is_that_of_both_losses_together():
    """Card: accumulated over two batches it is the gradient of L + lambda L_keep (float64, 1e-8)."""
    encoder = merging(teacher=Colours(), skill=nn.Conv2d(16, 2, 1))._shaped(clip_shaped()).double()
    old = copy.deepcopy(encoder)
    with torch.no_grad():
        for p in encoder.visual.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    recipe = MergeRecipe(Teacher(Colours(), encoder.config.preprocess), old=old, weight=10.0)
    batch = {"pixels": pixels(4).double(), "kept": pixels(3, seed=5).double()}
    learns = [p for n, p in encoder.named_parameters() if not n.startswith("text.") and n != "log_scale"]
    together = torch.autograd.grad(sum(recipe.forward(encoder, batch).values()), learns, allow_unused=True)
    out = encoder.visual.run(batch["pixels"])
    goal = recipe.teacher(batch["pixels"])
    cosine = F.cosine_similarity(encoder.merged(out.patches), goal, dim=1)
    parts = [(1 - cosine).mean()]
    logits = encoder.skill(grid_map(encoder.visual.run(batch["kept"]))).flatten(2)
    truth = (old.skill(grid_map(old.visual.run(batch["kept"]))) > 0).double().flatten(2)
    p = logits.sigmoid()
    right, share = torch.where(truth > 0, p, 1 - p), torch.where(truth > 0, 0.25, 0.75)
    focal = -(share * (1 - right) ** 2 * right.log()).mean(2)
    dice = 1 - (2 * (p * truth).sum(2) + 1) / (p.sum(2) + truth.sum(2) + 1)
    parts.append(10 * (20 * focal + dice).mean())
    apart = [torch.autograd.grad(part, learns, allow_unused=True) for part in parts]
    for whole, one, two in zip(together, *apart, strict=True):
        expected = sum(g for g in (one, two) if g is not None)
        torch.testing.assert_close(whole if whole is not None else 0 * expected, expected, atol=1e-8, rtol=1e-8)


def test_without_weight_it_is_plain_distillation():
    encoder, (x, _) = clip_shaped(), coloured()
    settings = {"encoder": encoder, "teacher": Colours(), "probe_epochs": 0, "batch_size": 12}
    none = merging(keep_weight=0.0, **settings).fit(x, rehearsal=pixels(5))
    start = none._shaped(encoder)
    items = none._open(x, None).items
    plain = train(items, start, out=None, recipe=MergeRecipe(none._taught(start)), batch_size=12, epochs=1, lr=1e-3,
                  weight_decay=0.05, clip=1.0, freeze=none.frozen, rates={"visual.*": 0.1}, seed=0)  # fmt: skip
    assert not changed(plain.encoder, none.encoder_)
    assert changed(plain.encoder, merging(**settings).fit(x).encoder_)
    recipe = MergeRecipe(none._taught(start), old=start, weight=10.0)
    assert recipe.forward(start, {"pixels": x})["kept"].item() == pytest.approx(0, abs=1e-5)  # nothing is forgotten yet


def test_names_are_read_in_the_teachers_words_too(tmp_path):
    encoder, (x, y) = clip_shaped(), coloured()
    teacher = toy_encoder(3, dim=5, tokenizer=CLIPTokenizer())
    method = merging(encoder=encoder, teacher=teacher).fit(x, y)
    words = class_vectors(NAMES, teacher, templates=TEMPLATE)
    rows = method.teacher_vectors(x)
    assert rows.shape == (12, 5)
    expected = teacher.logit_scale * rows @ words.T
    np.testing.assert_allclose(method.teacher_logits(x, NAMES), expected.numpy(), atol=1e-5)
    labels = method.segment(x, NAMES)
    scores = (method.maps(x) @ words.T).permute(0, 3, 1, 2)
    smooth = F.interpolate(scores, (16, 16), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(labels, smooth.argmax(1).numpy())
    again = SAMCLIP.load(method.save(tmp_path / "a.safetensors"), encoder=encoder, teacher=teacher)
    torch.testing.assert_close(again.teacher_vectors(x), rows)
    assert "merged.mlp.0.weight" not in method.merge().state_dict()
    with pytest.raises(ClipworksError, match="teacher must be an encoder to read names"):
        merging(encoder=encoder, teacher=Colours()).fit(x).segment(x, NAMES)
    with pytest.raises(ClipworksError, match="probe_epochs or epochs must be at least 1"):
        merging(encoder=encoder, probe_epochs=0, epochs=0).fit(x)


def test_points_lie_inside_the_coarse_mask():
    """Card: inside only; an empty mask gives none."""
    mask = np.random.default_rng(0).random((9, 7)) < 0.2
    points = prompt_points(mask, 3)
    assert points.shape == (3, 2)
    assert mask[points[:, 0], points[:, 1]].all()
    assert len(np.unique(points, axis=0)) == 3
    one = np.zeros((4, 4), bool)
    one[2, 1] = True
    assert prompt_points(one, 3).tolist() == [[2, 1]]
    assert len(prompt_points(np.zeros((4, 4)), 3)) == 0


def shapes(count, seed):
    """A bright square of one colour somewhere on noise, and which of the 4 x 4 patches it covers."""
    rng = np.random.default_rng(seed)
    x, masks = 0.2 * pixels(count, seed=seed), torch.zeros(count, 4, 4)
    for i in range(count):
        row, column, side = *rng.integers(0, 3, 2), int(rng.integers(1, 3))
        x[i, i % 3, 4 * row : 4 * (row + side), 4 * column : 4 * (column + side)] += 1.5
        masks[i, row : row + side, column : column + side] = 1
    return x, masks


def overlap(encoder, x, masks):
    found = encoder.skill(grid_map(encoder.visual.run(x)))[:, 0] > 0
    return ((found & (masks > 0)).sum() / (found | (masks > 0)).sum()).item()


@pytest.fixture(scope="module")
def segmenting():
    """A tower with a skill that finds the squares."""
    torch.manual_seed(0)
    encoder, skill = clip_shaped(), nn.Conv2d(16, 1, 1)
    x, masks = shapes(96, 0)
    learns = [*encoder.visual.parameters(), *skill.parameters()]
    optimizer = torch.optim.Adam(learns, lr=3e-3)
    for _ in range(150):
        logits = skill(grid_map(encoder.visual.run(x)))[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval(), skill.requires_grad_(False)


def test_with_rehearsal_both_skills_are_there_and_without_the_first_is_lost(segmenting):
    """Card: the experiment to ship. The teacher embeds colours, the student finds shapes."""
    encoder, skill = segmenting
    x, _ = shapes(48, 1)
    held, masks = shapes(48, 2)
    settings = {"encoder": encoder, "skill": skill, "teacher": Colours(), "lr": 4e-3, "backbone_rate": 1.0,
                "epochs": 60, "batch_size": 48, "weight_decay": 0.0}  # fmt: skip
    first = merging(**{**settings, "epochs": 0, "probe_epochs": 30}).fit(x)
    kept, lost = (merging(**settings, keep_weight=w).fit(x) for w in (10.0, 0.0))
    goal = F.normalize(first._taught(encoder)(held), dim=-1)
    learned = {n: (m.teacher_vectors(held) * goal).sum(1).mean().item() for n, m in
               {"first": first, "kept": kept, "lost": lost}.items()}  # fmt: skip
    start = overlap(first.encoder_, held, masks)
    assert start > 0.8
    assert min(learned["kept"], learned["lost"]) > max(0.9, learned["first"] + 0.1)  # the second stage is needed
    assert overlap(kept.encoder_, held, masks) > start - 0.05
    assert overlap(lost.encoder_, held, masks) < start - 0.2


def test_a_teacher_of_maps_is_matched_at_every_patch():
    encoder, (x, _) = clip_shaped(), shapes(24, 1)
    settings = {"encoder": encoder, "teacher": Colours(dense=True), "probe_rate": 3.0, "batch_size": 24}
    before, after = (merging(probe_epochs=n, epochs=0, **settings).fit(x) for n in (1, 60))
    goal = F.normalize(before._taught(encoder)(x).permute(0, 2, 3, 1), dim=-1)
    near = [(m.maps(x) * goal).sum(-1).mean().item() for m in (before, after)]
    assert near[1] > max(0.8, near[0] + 0.1)
