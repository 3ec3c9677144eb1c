"""MAFT+: the words' transfer, the loss of mask quality, the compensation, what learns from what, the naming."""

import numpy as np
import plain_dense as plain
import pytest
import torch
from plain_dense import made

from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.segment.common import enter
from clipworks.segment.maft_plus import (
    MAFTPlus,
    Transfer,
    compensation_loss,
    quality_loss,
    strip_sums,
    unit_range,
    value_map,
)
from clipworks.segment.mask_decoder import mask_pool, sine_positions, tower_maps
from clipworks.segment.segmenter import segment

NAMES = ["red", "green"]


@pytest.fixture(scope="module")
def encoder():
    return plain.toy().float()


def transfer(form="semantic", dim=16):
    torch.manual_seed(0)
    return Transfer(dim, form).eval()


@torch.no_grad()
@pytest.mark.parametrize("form", ["panoptic", "gain"])
def test_words_do_not_move_at_first(form):
    words = made(5, 16)
    got = transfer(form)(words, made(3, 12, 16, seed=1), sine_positions(3, 4, 16))
    assert torch.equal(got, words.expand(3, -1, -1))


@torch.no_grad()
@pytest.mark.parametrize("form", ["semantic", "panoptic", "gain"])
def test_the_transfer_against_numpy(form):
    own, words, cells, places = transfer(form), made(3, 16), made(1, 12, 16, seed=1), sine_positions(3, 4, 16)
    (
        torch.nn.init.normal_(own.linear.weight),
        torch.nn.init.normal_(own.norm.weight),
        torch.nn.init.normal_(own.norm.bias),
    )
    weight, bias = own.attention.in_proj_weight.numpy(), own.attention.in_proj_bias.numpy()
    given = words.numpy(), (cells[0] + places).numpy(), cells[0].numpy()
    q, k, v = (x @ w.T + b for x, w, b in zip(given, np.split(weight, 3), np.split(bias, 3), strict=True))
    q, k, v = (x.reshape(len(x), 8, 2).swapaxes(0, 1) for x in (q, k, v))
    seen = plain.softmax(q @ k.swapaxes(1, 2) / np.sqrt(2)) @ v
    seen = plain.linear(plain.linear(seen.swapaxes(0, 1).reshape(3, 16), own.attention.out_proj), own.linear)
    expected = (
        plain.norm(words.numpy() + seen, own.norm) if form == "semantic" else words.numpy() + plain.norm(seen, own.norm)
    )
    np.testing.assert_allclose(own(words, cells, places)[0], expected, atol=1e-4)


@torch.no_grad()
def test_cells_have_no_order_but_their_places_and_images_do_not_meet():
    own, words, cells, places = transfer(), made(3, 16), made(2, 12, 16, seed=1), sine_positions(3, 4, 16)
    before = own(words, cells, places)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(own(words, cells[:, order], places[order]), before, atol=1e-5)
    assert (own(words, cells[:, order], places) - before).abs().max() > 1e-3
    other = torch.stack([cells[0], made(12, 16, seed=5)])
    after = own(words, other, places)
    np.testing.assert_allclose(after[0], before[0], atol=1e-6)
    assert (after[1] - before[1]).abs().max() > 1e-3


def test_strips_of_a_constant_and_against_loops():
    flat = strip_sums(torch.full((1, 2, 8, 8), 1.5))
    assert flat[0].tolist() == [1.5] * 4 + [3.0] * 8 + [6.0] * 16
    maps = made(1, 1, 9, 9).double()
    got, at = strip_sums(maps)[0], 0
    for s in (1, 2, 4):
        k = 9 // s
        n = 9 // k
        means = np.array(
            [[maps[0, 0, k * i : k * i + k, k * j : k * j + k].mean() for j in range(n)] for i in range(n)]
        )
        np.testing.assert_allclose(got[at : at + 2 * n], np.concatenate([means.sum(0), means.sum(1)]), atol=1e-12)
        at += 2 * n
    assert at == len(got)
    assert strip_sums(torch.ones(1, 1, 4, 8)).shape == (1, 2 * (1 + 2 + 4))
    with pytest.raises(ClipworksError, match="at least 4 cells"):
        strip_sums(torch.ones(1, 1, 3, 3))


def test_the_compensation_is_still_at_the_start():
    maps = made(2, 3, 8, 8).requires_grad_()
    loss = compensation_loss(maps, maps.detach().clone())
    loss.backward()
    assert not loss.any()
    assert not maps.grad.any()
    assert float(compensation_loss(maps + 1, maps).detach()) > 0
    negative = maps.detach().clone()
    negative[negative < 0] *= 7  # what a relu does not see
    assert float(compensation_loss(negative, maps.detach())) == 0


def blocks():
    """Four masks that meet a segment of 10 columns with an IoU of 1, 0.6, 0.3 and 0; a label map (1, 8, 32)."""
    labels = torch.zeros(1, 8, 32, dtype=torch.long)
    labels[:, :, :10] = 1
    masks = torch.full((1, 4, 8, 32), -60.0)
    masks[0, 0, :, :10] = 60
    masks[0, 1, :, :6] = 60
    masks[0, 2, :, :3] = 60
    masks[0, 3, :, 16:] = 60
    return masks, labels


def test_the_loss_of_quality_against_numpy():
    masks, labels = blocks()
    likely = made(1, 4, 3).softmax(-1).requires_grad_()
    total = []
    for label in (0, 1):
        truth = (labels[0] == label).numpy()
        iou = np.array([((m > 0) & truth).sum() / ((m > 0) | truth).sum() for m in masks[0].numpy()])
        if label == 1:
            np.testing.assert_allclose(iou, [1, 0.6, 0.3, 0], atol=1e-9)
        aim = (iou - iou.min()) / (iou.max() - iou.min())
        off = np.abs(likely[0, :, label].detach().numpy() - aim)
        total.append(np.where(off < 1, off**2 / 2, off - 0.5))
    masks.requires_grad_()
    loss = quality_loss(likely, masks, labels)
    assert float(loss.detach()) == pytest.approx(np.mean(total), rel=1e-5)
    loss.backward()
    assert masks.grad is None
    assert likely.grad.any()
    assert float(quality_loss(likely, masks, torch.full_like(labels, 255)).detach()) == 0


def test_quality_costs_nothing_where_probabilities_are_it():
    masks, labels = blocks()
    labels[labels == 0] = 255  # one segment: the masks' share of it, their pixels outside do not count
    aim = torch.tensor([1.0, 0.6, 0.3, 0.0])
    assert float(quality_loss(torch.stack([1 - aim, aim], 1)[None], masks, labels)) < 1e-12


def test_targets_reach_from_0_to_1_and_equal_ones_are_0():
    values = made(6, 3).sigmoid()
    found = unit_range(values)
    assert found.amin(0).tolist() == [0] * 3
    assert found.amax(0).tolist() == [1] * 3
    assert not unit_range(torch.full((1, 3), 0.4)).any()
    assert not unit_range(torch.full((4, 2), 0.7)).any()


def test_scores_take_the_order_of_quality():
    """200 steps on features under the masks."""
    masks, labels = blocks()
    labels[labels == 0] = 255
    words = torch.nn.functional.normalize(made(3, 8), dim=-1)
    features = made(1, 8, 8, 32, seed=2).requires_grad_()
    optimizer = torch.optim.Adam([features], 0.05)

    def likely():
        vectors = torch.nn.functional.normalize(mask_pool(features, masks), dim=-1)
        return (10 * vectors @ words.T).softmax(-1)

    for _ in range(200):
        loss = quality_loss(likely(), masks, labels)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert likely()[0, :, 1].argsort(descending=True).tolist() == [0, 1, 2, 3]


def begun(encoder, **options):
    method = MAFTPlus(encoder, queries=4, width=8, **options)
    method._begin(encoder, NAMES)
    return method, method._built(encoder)


def test_what_learns_from_what(encoder):
    method, parts = begun(encoder)
    method._teacher = toy_encoder(1, tokenizer=CLIPTokenizer())  # another tower, so that there is something to make up
    patterns = method._learns(encoder)
    assert patterns == ["!visual.*", "visual.projection.*", "visual.norm_post.*"]
    from clipworks.training.optim import freeze

    freeze(encoder, ("*", *patterns))
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[:, :, 16:] = 1
    losses = method._losses(parts, encoder, plain.images(2, 32, 32).float(), labels)
    assert set(losses) == {"class", "mask", "dice", "quality", "compensation"}
    trunk = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("text", "visual.projection", "visual.norm_post", "log_scale")) for name in trunk)
    stem = trunk["visual.stem.projection.weight"]
    for name in ("class", "mask", "dice"):
        assert not losses[name].requires_grad or all(
            g is None
            for g in torch.autograd.grad(losses[name], list(trunk.values()), retain_graph=True, allow_unused=True)
        )
    for name in ("quality", "compensation"):
        assert torch.autograd.grad(losses[name], stem, retain_graph=True)[0].any(), name
    assert all(g is None for g in torch.autograd.grad(
        losses["quality"], list(parts.decoder.parameters()), retain_graph=True, allow_unused=True))  # fmt: skip
    sum(losses.values()).backward()
    assert all(p.grad is None for name, p in encoder.named_parameters() if name not in trunk)
    assert parts.transfer.norm.weight.grad.any()  # the gain; behind it all waits for it to leave 0
    encoder.zero_grad()
    encoder.requires_grad_(True)


@torch.no_grad()
@pytest.mark.parametrize("memory", [0, 5])
def test_without_transfer_it_is_a_frozen_clip_that_names_masks(memory):
    """Masks pooled one by one, void gated by the decoder's own head, in numpy."""
    encoder = toy_encoder(tokenizer=CLIPTokenizer(), memory=memory)
    method, parts = begun(encoder, transfer="none", quality=0.0, compensation=0.0)
    assert method._learns(encoder) == ()
    method._take(encoder, parts, {})
    hidden = enter(encoder, plain.images(1).float())
    words = torch.nn.functional.normalize(made(3, 8), dim=-1)
    found = parts.decoder(tower_maps(hidden))
    trunk = value_map(hidden)[0].flatten(1).T
    stem = hidden.embedded[0]
    total = np.zeros((3, *found.masks.shape[-2:]))
    for query, maps in zip(found.queries[0], found.masks[0], strict=True):
        under = (maps > 0).flatten()
        mean = trunk[under].mean(0) if under.any() else torch.zeros(16)
        vector = plain.linear(plain.norm(mean[None].numpy(), encoder.visual.norm_post), encoder.visual.projection)[0]
        if memory:
            recalled = stem[under].mean(0) if under.any() else torch.zeros(16)
            vector = vector + encoder.visual.memory(recalled).numpy()
        likely = plain.softmax(encoder.logit_scale * words.numpy() @ (vector / np.linalg.norm(vector)))
        void = plain.softmax(parts.head(query[None, None], method.words_)[0, 0].numpy())[-1]
        total += (likely * (1 - void))[:, None, None] / (1 + np.exp(-maps.numpy()))
    np.testing.assert_allclose(method.local(hidden, words)[0], total, atol=1e-4)


@torch.no_grad()
def test_the_trunks_map_is_the_value_path(encoder):
    found = plain.hidden(plain.toy())
    v = plain.projections(found)[2]
    tokens = plain.finished(found, plain.attended(found, np.eye(v.shape[2])[None, None]))
    np.testing.assert_allclose(value_map(found).flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-8)
    resnet = toy_encoder(kind="resnet", layers=(1, 1, 1, 1), width=4, image_size=64, patch_size=32, heads=2)
    hidden = enter(resnet, plain.images(1, 64, 64).float())
    assert torch.equal(value_map(hidden).flatten(2).transpose(1, 2), hidden.inputs[-1])


@pytest.mark.parametrize("form", ["panoptic", *(pytest.param(f, marks=pytest.mark.slow) for f in ("semantic", "gain"))])
def test_it_learns_and_comes_back_from_its_file(encoder, tmp_path, form):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    method = MAFTPlus(encoder, form, queries=4, width=16, steps=80, lr=1e-2, batch_size=4)
    method.fit(*plain.photos(), NAMES, progress=False)
    images, maps = plain.photos(3, seed=1)
    assert np.mean([a == b for a, b in zip(method.predict(images), maps, strict=True)]) > 0.8
    now = method.encoder_.state_dict()
    changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert "visual.stem.projection.weight" in changed
    assert not any(name.startswith(("text", "visual.projection", "visual.norm_post", "log_scale")) for name in changed)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    path = method.save(tmp_path / "maft.safetensors")
    names = ["green", "red", "a third thing"]
    scores = [segment(images[0], names, method=m, encoder=encoder).scores for m in (method, path)]
    assert np.array_equal(*scores)
    np.testing.assert_allclose(scores[0].sum(0), 1, atol=1e-4)


def test_messages(encoder):
    with pytest.raises(ClipworksError, match="Did you mean 'panoptic'"):
        MAFTPlus(encoder, "panotic", steps=1).fit(*plain.photos(1), NAMES)
