"""OVSeg: mask prompts at every depth, crops, the contrast, mined pairs, the ensemble."""

import copy

import numpy as np
import plain_dense as plain
import pytest
import torch

from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.segment.common import enter
from clipworks.segment.mask_decoder import tower_maps
from clipworks.segment.ovseg import (
    MaskPrompts,
    OVSeg,
    ensemble,
    masked_crop,
    nearest,
    patch_mask,
    word_contrast,
)
from clipworks.segment.segmenter import segment


@pytest.fixture(scope="module")
def encoder():
    return toy_encoder(tokenizer=CLIPTokenizer(), layers=4)


def prompts(encoder, depth=3, seed=0):
    torch.manual_seed(seed)
    made = MaskPrompts(depth, 16, 16)
    torch.nn.init.normal_(made.tokens)
    return made


def pixels(n=3, seed=0):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def half():
    """The left half of the patches is kept."""
    return torch.tensor([1.0, 1, 0, 0]).repeat(4)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("memory", [0, 5])
def test_a_full_mask_is_the_plain_tower_bit_for_bit(depth, memory):
    encoder = toy_encoder(layers=4, memory=memory)
    x = pixels()
    got = prompts(encoder, depth)(encoder.visual, x, torch.ones(3, 16))
    assert torch.equal(got, encoder.visual.run(x).pooled)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 3])
def test_an_empty_mask_sees_no_pixel(encoder, depth):
    own = prompts(encoder, depth)
    a, b = (own(encoder.visual, pixels(seed=s), torch.zeros(3, 16)) for s in (0, 1))
    assert torch.equal(a, b)
    assert (a - encoder.visual.run(pixels()).pooled).abs().max() > 1e-3


@torch.no_grad()
def test_tokens_of_every_depth_against_loops(encoder):
    """Token by token and block by block, with the tower's own blocks."""
    own, x, keep = prompts(encoder), pixels(1), half()
    visual = encoder.visual
    stem = visual.stem(x)[0].flatten(1).T
    tokens = torch.stack([stem[j] if keep[j] else own.tokens[0, j] for j in range(16)]) + visual.positions[1:]
    tokens = visual.norm_pre(torch.cat([(visual.class_token + visual.positions[0])[None], tokens]))
    for number, block in enumerate(visual.blocks):
        tokens = block(tokens[None])[0][0]
        if number + 1 < 3:
            for j in range(16):
                if not keep[j]:
                    tokens[1 + j] = own.tokens[number + 1, j]
    expected = plain.linear(plain.norm(tokens[:1].numpy(), visual.norm_post), visual.projection)
    np.testing.assert_allclose(own(visual, x, keep[None]), expected, atol=1e-5)


@torch.no_grad()
def test_shallow_tokens_are_those_of_depth_one(encoder):
    deep = prompts(encoder, 3)
    shallow = MaskPrompts(1, 16, 16)
    shallow.tokens.copy_(deep.tokens[:1])
    x, keep = pixels(), half().expand(3, -1)
    prompted = {len(p.tokens): p(encoder.visual, x, keep) for p in (deep, shallow)}
    assert (prompted[1] - prompted[3]).abs().max() > 1e-3
    embedded = torch.where(half().bool()[:, None], encoder.visual.stem(x).flatten(2).transpose(1, 2), deep.tokens[0])
    maps = embedded.transpose(1, 2).unflatten(2, (4, 4))
    np.testing.assert_allclose(prompted[1], encoder.visual.run(embeddings=maps).pooled, atol=1e-6)


def test_only_tokens_of_blank_patches_learn(encoder):
    own = prompts(encoder)
    encoder.requires_grad_(False)
    keep = torch.stack([half(), half(), torch.ones(16)])
    own(encoder.visual, pixels(), keep).square().sum().backward()
    encoder.requires_grad_(True)
    blank = half() == 0
    assert not own.tokens.grad[:, ~blank].any()
    assert (own.tokens.grad[:, blank].abs().amax(-1) > 0).all()
    assert all(p.grad is None for p in encoder.parameters())


def test_a_patch_is_kept_if_the_mask_touches_it():
    mask = torch.zeros(8, 8)
    mask[3, 3] = mask[7, 0] = 1
    expected = [float(mask[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].any()) for i in range(2) for j in range(2)]
    assert patch_mask(mask, 4).tolist() == expected == [1, 0, 1, 0]


def test_a_crop_is_the_box_and_blank_is_zero(encoder):
    image = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0))
    config = encoder.config.preprocess
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))

    def resized(part):
        made = torch.nn.functional.interpolate(part[None], (16, 16), mode="bicubic", antialias=True)[0]
        return (made.clamp(0, 1) - mean) / std

    whole, keep = masked_crop(image, torch.ones(40, 48, dtype=torch.bool), encoder)
    assert torch.equal(whole, resized(image))
    assert keep.all()
    mask = torch.zeros(40, 48, dtype=torch.bool)
    mask[4:36, 8:24] = mask[4:12, 8:40] = True  # an L on its head: the lower right of the box is outside
    crop, keep = masked_crop(image, mask, encoder)
    assert not crop[:, 4:, 8:].any()
    np.testing.assert_allclose(crop[:, :, :8], resized(image[:, 4:36, 8:40])[:, :, :8], atol=1e-6)
    assert keep.reshape(4, 4).tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


def test_the_contrast_against_numpy():
    draw = np.random.default_rng(0)
    images, words = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in draw.normal(size=(2, 5, 4)))
    logits = 10 * images @ words.T
    log = [logits - np.log(np.exp(logits).sum(axis, keepdims=True)) for axis in (1, 0)]
    expected = -(np.diag(log[0]).mean() + np.diag(log[1]).mean()) / 2
    got = word_contrast(*map(torch.tensor, (images, words)), torch.arange(5), 10.0)
    assert float(got) == pytest.approx(expected, rel=1e-9)
    logits = 10 * images @ words[[1, 3]].T  # words that repeat: columns 1 and 3 alone
    rows, columns = [logits - np.log(np.exp(logits).sum(axis, keepdims=True)) for axis in (1, 0)]
    right = [0, 1, 1, 0, 1]
    forth = -np.mean([rows[i, r] for i, r in enumerate(right)])
    back = -np.mean([np.mean([columns[i, c] for i in range(5) if right[i] == c]) for c in (0, 1)])
    got = word_contrast(*map(torch.tensor, (images, words)), torch.tensor([1, 3, 3, 1, 3]), 10.0)
    assert float(got) == pytest.approx((forth + back) / 2, rel=1e-9)


def test_a_noun_takes_the_nearest_proposal():
    angles = torch.tensor([0.1, 1.0, 2.0])
    proposals = torch.stack([angles.cos(), angles.sin()], 1)
    nouns = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert nearest(proposals, nouns).tolist() == [2 if abs(2.0 - np.pi / 2) < abs(1.0 - np.pi / 2) else 1, 0]


def test_the_ensemble():
    draw = torch.Generator().manual_seed(0)
    own, clip = (torch.rand(4, 5, generator=draw).softmax(-1) for _ in range(2))
    assert torch.equal(ensemble(own, clip, 0), own)
    assert torch.equal(ensemble(own, clip, 1), clip)
    np.testing.assert_allclose(ensemble(own, clip, 0.3), (0.7 * own.log() + 0.3 * clip.log()).exp(), rtol=1e-5)
    factor = torch.rand(4, 1, generator=draw) + 0.1
    assert torch.equal(ensemble(own, factor * clip, 0.6).argmax(-1), ensemble(own, clip, 0.6).argmax(-1))


def test_tokens_learn_on_blanked_images_and_full_ones_stay(encoder):
    """Red or green on the left half, the right half blank: 100 steps of the contrast."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    own = MaskPrompts(3, 16, 16)
    classes = torch.arange(24) % 2
    images = 0.4 * torch.randn(24, 3, 16, 16, generator=draw)
    images[torch.arange(24), classes] += 0.4
    words = torch.nn.functional.normalize(torch.randn(2, 8, generator=draw), dim=-1)
    blanked = images.clone()
    blanked[:, :, :, 8:] = 0
    keep = half().expand(24, -1)

    def vectors(x, mask):
        return torch.nn.functional.normalize(own(encoder.visual, x, mask), dim=-1)

    @torch.no_grad()
    def accuracy(x, mask):
        return float(((vectors(x, mask) @ words.T).argmax(1) == classes).float().mean())

    full = torch.ones(24, 16)
    with torch.no_grad():
        before, plain_vectors = accuracy(blanked, keep), vectors(images, full)
    optimizer = torch.optim.AdamW(own.parameters(), 0.05, weight_decay=0)
    for _ in range(100):
        loss = word_contrast(vectors(blanked, keep), words, classes, 20.0)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    encoder.zero_grad()
    assert accuracy(blanked, keep) > before + 0.15
    with torch.no_grad():
        assert torch.equal(vectors(images, full), plain_vectors)


NAMES = ["red", "green"]


@pytest.fixture(scope="module")
def fitted(encoder):
    method = OVSeg(encoder, 0.3, width=16, queries=4, steps=60, lr=1e-2, batch_size=6, prompt_steps=5)
    return method.fit(*plain.photos(), NAMES, progress=False)


def test_it_segments_and_comes_back_from_its_file(encoder, fitted, tmp_path):
    images, maps = plain.photos(3, seed=1)
    assert fitted.encoder_ is encoder
    assert set(fitted.losses_) == {"loss", "class", "mask", "dice", "contrast"}
    own = copy.copy(fitted).set_params(balance=0.0)  # the random tower's view of crops is worth nothing
    assert np.mean([a == b for a, b in zip(own.predict(images), maps, strict=True)]) > 0.8
    path = fitted.save(tmp_path / "ovseg.safetensors")
    names = ["red", "green", "a third thing"]
    scores = [segment(images[0], names, method=m, encoder=encoder).scores for m in (fitted, path)]
    assert np.array_equal(*scores)
    assert scores[0].shape[0] == 3
    np.testing.assert_allclose(scores[0].sum(0), 1, atol=1e-4)


@torch.no_grad()
def test_the_semantic_map_against_loops(encoder, fitted):
    image = plain.images(1).float()
    hidden = enter(encoder, image)
    words = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    parts = fitted.parts_
    found = parts.decoder(tower_maps(hidden))
    total = np.zeros((3, *found.masks.shape[-2:]))
    for query, maps in zip(found.queries[0], found.masks[0], strict=True):
        logits = parts.head(query[None, None], words)[0, 0].numpy()
        likely = plain.softmax(logits)[:3]
        mask = torch.nn.functional.interpolate(maps[None, None], (16, 24), mode="bilinear")[0, 0].sigmoid() > 0.4
        named = np.ones(3)
        if mask.any():
            crop, keep = masked_crop(image[0], mask, encoder)
            vector = parts.prompts(encoder.visual, crop[None], keep[None])[0].numpy()
            named = plain.softmax(encoder.logit_scale * words.numpy() @ (vector / np.linalg.norm(vector)))
        total += (likely**0.7 * named**0.3)[:, None, None] / (1 + np.exp(-maps.numpy()))
    np.testing.assert_allclose(fitted.local(hidden, words)[0], total, atol=1e-4)


def test_nouns_of_captions_are_further_pairs(encoder, monkeypatch):
    seen = []

    def contrast(self, prompts, encoder, images, labels, words):
        seen.append((len(words), int(labels[labels != 255].max())))
        return {"contrast": prompts.tokens.square().mean()}

    monkeypatch.setattr(OVSeg, "_contrast", contrast)
    nouns = [["sky", "sun"], [], ["sea"], ["sun"], [], ["sky"]]
    how = dict(width=8, queries=3, steps=2, prompt_steps=4)
    OVSeg(encoder, batch_size=10, **how).fit(*plain.photos(), NAMES, nouns=nouns)
    assert {words for words, _ in seen} == {5}
    assert max(label for _, label in seen) in (2, 3, 4)
    seen.clear()
    OVSeg(encoder, **how).fit(*plain.photos(), NAMES)
    assert set(seen) == {(2, 1)}


def test_messages(encoder):
    images, maps = plain.photos(2)
    with pytest.raises(ClipworksError, match="nouns must be a list of words for every image"):
        OVSeg(encoder, steps=1, width=8, queries=2).fit(images, maps, NAMES, nouns=[["a"]])
    with pytest.raises(ClipworksError, match="depth must lie in"):
        OVSeg(encoder, depth=9, steps=1).fit(images, maps, NAMES)
    with pytest.raises(ClipworksError, match="needs an image tower with a class token"):
        OVSeg(toy_encoder(class_token=False, pool="mean"), steps=1).fit(images, maps, NAMES)
