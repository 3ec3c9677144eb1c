"""The frozen head is CLIP's own, what learns and what does not, the losses by hand, and classes never trained."""

import numpy as np
import plain_dense as plain
import pytest
import torch
import torch.nn.functional as F
from plain_dense import made

from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.metrics.segmentation import confusion, harmonic_iou, mean_iou
from clipworks.segment.chimera_seg import (
    Alignment,
    ChimeraParts,
    ChimeraSeg,
    image_loss,
    kept_blocks,
    kept_share,
    pixel_loss,
    selective_distillation,
)
from clipworks.segment.common import enter
from clipworks.segment.segmenter import segment

NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def encoder():
    return toy_encoder(tokenizer=CLIPTokenizer()).float()


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 2])
def test_on_clips_own_tokens_the_head_is_clip(blocks):
    encoder = plain.toy()
    hidden = enter(encoder, plain.images(), blocks=blocks)
    whole = enter(encoder, plain.images()).visual.run(
        embeddings=hidden.embedded.transpose(1, 2).unflatten(2, hidden.grid)
    )
    found = kept_blocks(encoder.visual, hidden.inputs[0], blocks, "qk")
    np.testing.assert_allclose(found, whole.tokens, atol=1e-8)
    np.testing.assert_allclose(encoder.visual.project(found[:, 0]), whole.pooled, atol=1e-8)


@torch.no_grad()
def test_light_layers_that_do_nothing_give_clips_dense_features():
    """The body hands over the very tokens; the last norm of the way in is undone by tokens that are norms already."""
    encoder = plain.toy()
    hidden = enter(encoder, plain.images())
    parts = ChimeraParts([16], 16, 16, 8).double()
    tokens = F.layer_norm(hidden.inputs[-1][:, 1:], (16,))
    maps = tokens.transpose(1, 2).unflatten(2, hidden.grid)
    torch.nn.init.zeros_(parts.light_in.bias), torch.nn.init.zeros_(parts.body.lateral[0].bias)
    parts.light_in.weight.copy_(torch.eye(16))
    parts.body.lateral[0].weight.copy_(torch.eye(16)[:, :, None, None])
    found = parts(encoder.visual, [maps], 1, "identity")
    hidden.inputs = [tokens]
    v = plain.projections(hidden)[2]
    dense = plain.finished(hidden, plain.attended(hidden, np.eye(24)[None, None]))
    expected = plain.projected(hidden, dense, prefix=0)
    assert v.shape[2] == 24
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=-1, keepdims=True), atol=1e-5)


def begun(encoder, **options):
    method = ChimeraSeg(encoder, width=8, **options)
    method._begin(encoder, NAMES)
    method._step = 0
    return method, method._built(encoder)


def halves(size=32):
    labels = torch.zeros(2, size, size, dtype=torch.long)
    labels[:, :, size // 2 :] = 1
    labels[:, : size // 4] = 2
    return labels


def test_gradients_go_through_the_frozen_head(encoder):
    encoder.requires_grad_(False)
    method, parts = begun(encoder)
    losses = method._losses(parts, encoder, plain.images(2, 32, 32).float(), halves())
    assert set(losses) == {"pixels", "distillation", "alignment"}
    for name, loss in losses.items():
        (reached,) = torch.autograd.grad(loss, parts.body.lateral[0].weight, retain_graph=True)
        assert reached.abs().sum() > 0, name
    sum(losses.values()).backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert parts.light_out.weight.grad.any()
    assert parts.align.out.weight.grad.any()
    encoder.requires_grad_(True)


def test_unseen_pixels_and_words_do_not_count(encoder):
    """Labels of classes that may not be learned from, changed at will, give the same losses."""
    method, parts = begun(encoder, seen=["green", "red"])
    images, labels = plain.images(2, 32, 32).float(), halves()
    other = labels.clone()
    other[labels == 2] = 255
    three = {n: float(v.detach()) for n, v in method._losses(parts, encoder, images, labels).items()}
    method._step = 0
    two = {n: float(v.detach()) for n, v in method._losses(parts, encoder, images, other).items()}
    assert three == two
    assert torch.equal(method._seen_words, method.words_[[1, 0]])
    assert method._table[[0, 1, 2, 255]].tolist() == [1, 0, 255, 255]
    method._step, method.words_[2] = 0, 0.0
    assert {n: float(v.detach()) for n, v in method._losses(parts, encoder, images, labels).items()} == two
    nothing = method._losses(parts, encoder, images, torch.full_like(labels, 2))
    assert float(nothing["pixels"].detach()) == 0
    assert all(torch.isfinite(v) for v in nothing.values())


def test_the_pixels_loss_and_the_images_against_numpy():
    logits, labels = made(2, 3, 4, 6), torch.randint(0, 3, (2, 4, 6), generator=torch.Generator().manual_seed(1))
    labels[0, 1], labels[1, labels[1] == 2] = 255, 0
    x = logits.numpy()
    log = np.log(plain.softmax(np.moveaxis(x, 1, -1)))
    picked = [log[b, i, j, labels[b, i, j]] for b, i, j in np.argwhere(labels.numpy() != 255)]
    assert float(pixel_loss(logits, labels)) == pytest.approx(-np.mean(picked), rel=1e-5)
    best = x.max((2, 3))
    there = np.array([[(labels[b] == k).any() for k in range(3)] for b in range(2)], float)
    expected = np.mean(np.log1p(np.exp(best)) - best * there)
    assert float(image_loss(logits, labels)) == pytest.approx(expected, rel=1e-5)


def test_which_tokens_the_class_token_teaches():
    features, teacher = F.normalize(made(2, 10, 4), dim=-1), F.normalize(made(2, 4, seed=1), dim=-1)
    near = np.einsum("bnd,bd->bn", features.numpy(), teacher.numpy())
    losses = []
    for k in range(1, 11):
        expected = 1 - np.sort(near, 1)[:, ::-1][:, :k].mean()
        losses.append(float(selective_distillation(features, teacher, k / 10)))
        assert losses[-1] == pytest.approx(expected, abs=1e-6)
    assert losses == sorted(losses)
    before = set()
    for k in range(1, 11):  # the kept tokens are nested
        x = features.clone().requires_grad_()
        selective_distillation(x, teacher, k / 10).backward()
        kept = {tuple(i) for i in x.grad.abs().sum(-1).nonzero().tolist()}
        assert before <= kept
        assert len(kept) == 2 * k
        before = kept
    shares = [kept_share(s, 50) for s in range(50)]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (1.0, pytest.approx(0.1))
    assert kept_share(0, 1) == 1.0


@torch.no_grad()
def test_the_alignment_starts_from_nothing_and_is_attention():
    torch.manual_seed(0)
    own, g, words = Alignment(8), made(2, 3, 4, 8), made(5, 8, seed=1)
    assert torch.equal(own(g, words), g)
    torch.nn.init.normal_(own.out.weight)
    q, k, v = (plain.linear(x.numpy(), m) for x, m in ((g, own.q), (words, own.k), (words, own.v)))
    expected = g.numpy() + plain.linear(plain.softmax(q @ k.T / np.sqrt(8)) @ v, own.out)
    np.testing.assert_allclose(own(g, words), expected, atol=1e-4)


@torch.no_grad()
def test_gamma_is_taken_off_seen_classes(encoder):
    method, parts = begun(encoder, seen=["red", "green"])
    method._take(encoder, parts.eval(), {})
    hidden = enter(encoder, plain.images(1).float())
    plainly = method.local(hidden, method.words_)
    g = method.features(hidden)
    np.testing.assert_allclose(g.norm(dim=-1), 1, atol=1e-5)
    np.testing.assert_allclose(plainly, torch.einsum("bhwd,kd->bkhw", g, method.words_), atol=1e-5)
    method.gamma = 0.3
    np.testing.assert_allclose(
        plainly - method.local(hidden, method.words_), torch.tensor([0.3, 0.3, 0])[:, None, None] + 0 * plainly,
        atol=1e-6,
    )  # fmt: skip


def test_harmonic_mean():
    assert harmonic_iou(0.4, 0.4) == pytest.approx(0.4)
    assert harmonic_iou(0.4, 0.0) == harmonic_iou(0.0, 0.7) == 0
    draw = np.random.default_rng(0)
    assert all(harmonic_iou(a, b) <= 2 * min(a, b) for a, b in draw.random((50, 2)))


THINGS = [(c, s) for c in range(3) for s in range(2)]
SEEN, UNSEEN = [0, 1, 2, 5], [3, 4]  # every colour and every shape is seen


def pictures(of, count, seed):
    """Maps (count, 5, 4, 4) of cells that say their colour and shape, and which thing each cell is."""
    draw = np.random.default_rng(seed)
    labels = torch.from_numpy(np.asarray(of)[draw.integers(len(of), size=(count, 4, 4))])
    maps = torch.zeros(count, 5, 4, 4)
    for k, (c, s) in enumerate(THINGS):
        where = labels == k
        maps[:, c][where], maps[:, 3 + s][where] = 1, 1
    return maps + 0.05 * torch.from_numpy(draw.normal(size=maps.shape)).float(), labels


def unseen_iou(own, head):
    """IoU of things never trained, where words are what one tower's head makes of colour and shape together."""
    colours, forms = made(3, 16, seed=1), made(2, 16, seed=2)
    meant = F.layer_norm(torch.stack([colours[c] + forms[s] for c, s in THINGS]), (16,))
    with torch.no_grad():
        joint = own.project(kept_blocks(own, meant[None], 1, "identity"))[0]
    centre = joint.mean(0)  # the part that all words share says nothing
    words = F.normalize(joint - centre, dim=-1)
    torch.manual_seed(1)
    parts = ChimeraParts([5], 16, 16, 8)
    table = torch.full((6,), 255)
    table[SEEN] = torch.arange(4)

    def logits(maps):
        fine = parts.body([maps])[1].flatten(2).transpose(1, 2)
        x = kept_blocks(head, parts.norm(parts.light_in(fine)), 1, "identity")
        g = F.normalize(head.project(x + parts.light_out(x)) - centre, dim=-1)
        return (g @ words.T / 0.3).transpose(1, 2).unflatten(2, (4, 4))

    optimizer = torch.optim.Adam([*parts.body.parameters(), *parts.light_in.parameters()], 1e-2)
    for step in range(100):
        maps, labels = pictures(SEEN, 8, step)
        loss = pixel_loss(logits(maps)[:, SEEN], table[labels])
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    maps, labels = pictures(SEEN + UNSEEN, 40, 999)
    with torch.no_grad():
        return mean_iou(confusion(labels.numpy(), logits(maps).argmax(1).numpy(), 6), UNSEEN)


def test_classes_that_were_never_trained():
    """Six things, four of them seen; under the head that made the words the others are found, less so under others."""
    towers = [plain.toy(seed=s).float().requires_grad_(False).visual for s in (0, 1, 2, 3, 11, 12)]
    own = np.mean([unseen_iou(tower, tower) for tower in towers[:4]])
    other = np.mean([unseen_iou(tower, head) for tower in towers[:4] for head in towers[4:]])
    assert own > 0.6  # chance is 1 / 11
    assert other < own - 0.1


def test_it_learns_and_comes_back_from_its_file(encoder, tmp_path):
    method = ChimeraSeg(encoder, seen=["red", "green"], distillation=0.1, width=16, steps=80, lr=1e-2, batch_size=4)
    method.fit(*plain.photos(), NAMES, progress=False)
    assert method.encoder_ is encoder
    images, maps = plain.photos(3, seed=1)
    assert np.mean([a == b for a, b in zip(method.predict(images), maps, strict=True)]) > 0.8
    path = method.save(tmp_path / "chimera.safetensors")
    names = ["green", "red", "a third thing"]
    scores = [segment(images[0], names, method=m, encoder=encoder).scores for m in (method, path)]
    assert np.array_equal(*scores)


def test_messages(encoder):
    with pytest.raises(ClipworksError, match="Did you mean 'green'"):
        ChimeraSeg(encoder, seen=["gren"], steps=1).fit(*plain.photos(1), NAMES)
    with pytest.raises(ClipworksError, match="rule must be one of"):
        ChimeraSeg(encoder, rule="kv", steps=1).fit(*plain.photos(1), NAMES)
    with pytest.raises(ClipworksError, match="blocks must lie in"):
        ChimeraSeg(encoder, blocks=3, steps=1).fit(*plain.photos(1), NAMES)
