"""Guided pooling, its limits, the heads and their training, the background rule."""

import numpy as np
import plain_dense as plain
import pytest
import torch
from PIL import Image

from clipworks.encoders.toy import toy_encoder
from clipworks.errors import BadWeights, ClipworksError
from clipworks.segment.background import found_background, long_objects
from clipworks.segment.clip_dinoiser import CLIPDINOiser
from clipworks.segment.common import enter, pool
from clipworks.segment.dinoiser_heads import SPEED, Heads, early, head_losses, learn
from clipworks.segment.maskclip import MaskCLIP


def heads(width=16, channels=6):
    made = Heads(width, channels).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return made


def cosines(x):
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x @ x.swapaxes(-2, -1)


@torch.no_grad()
def test_pooling_by_the_heads_against_numpy():
    found, own = plain.hidden(blocks=3), heads()
    block = found.visual.blocks[0]
    x = found.inputs[0].numpy()
    q, k, _ = plain.projections(found, 0)
    x = x + plain.attended(found, plain.softmax(q @ k.swapaxes(-2, -1) / np.sqrt(q.shape[-1])), 0)
    m = plain.norm(x, block.norm2)[:, 1:].reshape(2, 4, 6, 16)
    np.testing.assert_allclose(early(found).permute(0, 2, 3, 1), m, atol=1e-10)
    wide = np.pad(m, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    weight, bias = own.affinity.weight.numpy(), own.affinity.bias.numpy()
    c = np.zeros((2, 4, 6, 6)) + bias
    for y in range(4):
        for z in range(6):
            c[:, y, z] += np.einsum("byxc,ocyx->bo", wide[:, y : y + 3, z : z + 3], weight)
    near = cosines(c.reshape(2, 24, 6))
    near[near < 0.2] = 0
    plainly = MaskCLIP().features(found).numpy().reshape(2, 24, 8)
    expected = near @ plainly / (near.sum(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(CLIPDINOiser(own).features(found).flatten(1, 2), expected, atol=1e-5)
    logits = (m / np.linalg.norm(m, axis=-1, keepdims=True)) @ own.objectness.weight.numpy()[0, :, 0, 0]
    expected = 1 / (1 + np.exp(-SPEED * (logits + own.objectness.bias.numpy())))
    np.testing.assert_allclose(CLIPDINOiser(own).objects(found)[:, 0], expected, atol=1e-8)


@torch.no_grad()
def test_limits_of_the_threshold():
    found = plain.hidden(blocks=2)
    plainly = MaskCLIP().features(found)
    assert (CLIPDINOiser(threshold=1.1).features(found) == 0).all()
    alone = CLIPDINOiser(threshold=0.999999).features(found)
    np.testing.assert_allclose(alone, plainly, rtol=1e-5)
    constant = CLIPDINOiser(affinity=lambda images: torch.ones(len(images), 2, 4, 6)).features(found)
    mean = plainly.flatten(1, 2).mean(1)[:, None, None].expand_as(constant)
    np.testing.assert_allclose(constant, mean, atol=1e-5)


@torch.no_grad()
def test_the_threshold_follows_whose_features_they_are():
    assert CLIPDINOiser().threshold == 0.5
    assert CLIPDINOiser(affinity=lambda images: images).threshold == 0.2
    assert CLIPDINOiser(Heads(8)).threshold == 0.2
    assert CLIPDINOiser(threshold=0.3).threshold == 0.3


def test_pooling_follows_a_permutation_and_forgets_a_factor():
    draw = torch.Generator().manual_seed(0)
    a, f = torch.rand(1, 9, 9, generator=draw), torch.randn(1, 9, 4, generator=draw)
    order = torch.randperm(9, generator=draw)
    got = pool(a, f)
    np.testing.assert_allclose(pool(a[:, order][:, :, order], f[:, order]), got[:, order], atol=1e-6)
    np.testing.assert_allclose(pool(7 * a, f), got, atol=1e-5)


def test_block_affinity_repairs_noise():
    """Two regions, three patches of ten with the wrong label."""
    draw = np.random.default_rng(0)
    truth = np.repeat([0, 1], 50)
    noisy = np.eye(2)[truth]
    wrong = np.concatenate([draw.choice(50, 15, replace=False), 50 + draw.choice(50, 15, replace=False)])
    noisy[wrong] = noisy[wrong, ::-1]
    affinity = torch.tensor(truth[:, None] == truth[None]).double()[None]
    assert np.array_equal(pool(affinity, torch.tensor(noisy)[None])[0].argmax(1), truth)


@torch.no_grad()
def test_the_affinity_may_be_finer():
    found = plain.hidden(blocks=2)
    got = CLIPDINOiser(affinity=lambda images: torch.nn.functional.avg_pool2d(images, 2)).features(found)
    assert got.shape == (2, 8, 12, 8)


@torch.no_grad()
def test_objects_without_heads_are_founds():
    found = plain.hidden(blocks=2)
    q, k, _ = plain.projections(found)
    looks = plain.softmax(q[:, :, :1] @ k.swapaxes(-2, -1) / np.sqrt(q.shape[-1]))[:, :, 0, 1:]
    for i, got in enumerate(CLIPDINOiser().objects(found)):
        expected = ~found_background(torch.tensor(looks[i]), torch.tensor(k[i, :, 1:]))
        assert torch.equal(got.flatten() > 0.5, expected)


@torch.no_grad()
def test_long_objects_are_longer_than_the_mean_of_their_image():
    found = plain.hidden(blocks=1)
    length = np.sqrt((found.embedded.numpy() ** 2).sum(-1))
    expected = np.array([[v > sum(image) / len(image) for v in image] for image in length]).reshape(2, 4, 6)
    assert np.array_equal(long_objects(found), expected)
    assert expected.any()
    assert not expected.all()
    found.embedded = None
    with pytest.raises(ClipworksError, match="what the stem gave"):
        long_objects(found)


@torch.no_grad()
def test_the_losses_against_numpy():
    own = heads()
    draw = np.random.default_rng(1)
    maps, objects = torch.tensor(draw.normal(size=(2, 16, 3, 4))), torch.tensor(draw.random((2, 12)))
    target = torch.tensor(cosines(draw.normal(size=(2, 12, 5))))

    def entropy(logits, y):
        return np.mean(np.log1p(np.exp(-np.abs(logits))) + np.maximum(logits, 0) - logits * y)

    near = np.maximum(cosines(own.patches(maps).flatten(1, 2).numpy()), 0)
    got = head_losses(own, maps, target, objects)
    assert float(got["affinity"]) == pytest.approx(entropy(near, target.numpy() > 0.2), abs=1e-6)
    logits = own.objects(maps).flatten(1).numpy()
    assert float(got["objects"]) == pytest.approx(entropy(logits, objects.numpy() > 0.5), abs=1e-6)


def test_heads_have_the_papers_size():
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in Heads(768).named_children()}
    assert count == {"affinity": 768 * 256 * 9 + 256, "objectness": 768 + 1}


def test_heads_there_and_back(tmp_path):
    made = heads().float()
    again = Heads.load(made.save(tmp_path / "heads.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), again.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in again.parameters())
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(BadWeights, match="no heads of CLIP-DINOiser"):
        Heads.load(tmp_path / "other.safetensors")


@pytest.fixture
def halves(tmp_path):
    """A folder of eight photos of a dark and a light half."""
    draw = np.random.default_rng(0)
    for i in range(8):
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[:, :8], pixels[:, 8:] = draw.integers(0, 90, 3), draw.integers(160, 255, 3)
        Image.fromarray(np.rot90(pixels, i % 4).copy()).save(tmp_path / f"{i}.png")
    return tmp_path


def entered(folder, encoder):
    image = torch.stack([torch.tensor(np.asarray(Image.open(folder / f"{i}.png"))) for i in range(8)])
    return enter(encoder, image.permute(0, 3, 1, 2) / 255, blocks=3)


def test_the_heads_learn_their_teacher_and_the_encoder_stays(halves):
    """The teacher says colour."""
    encoder = toy_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    def teacher(images):
        return torch.nn.functional.avg_pool2d(images, 4) - 0.5

    def disagreement(own):
        hidden = entered(halves, encoder)
        target = torch.tensor(cosines(teacher(hidden.images).flatten(2).transpose(1, 2).numpy()))
        with torch.no_grad():
            return float(head_losses(own, early(hidden), target, torch.ones(8, 16))["affinity"])

    how = dict(teacher=teacher, batch_size=8, side=16, lr=3e-3, progress=False)
    first, trained, again = (learn(halves, encoder, steps=n, **how) for n in (1, 25, 25))
    assert disagreement(trained) < disagreement(first) - 0.02
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert not any(p.requires_grad for p in trained.parameters())


def test_the_heads_learn_whose_objects_they_are_told(halves):
    """Objects are what is light."""
    encoder = toy_encoder()

    def light(hidden):
        return torch.nn.functional.avg_pool2d(hidden.images, 4).mean(1) > 0.5

    own = learn(halves, encoder, objects=light, steps=100, batch_size=8, side=16, lr=1e-3, progress=False)
    with torch.no_grad():
        hidden = entered(halves, encoder)
        told, found = light(hidden), CLIPDINOiser(own).objects(hidden)[:, 0] > 0.5
    assert 0.4 < told.float().mean() < 0.6
    assert (told == found).float().mean() > 0.9
