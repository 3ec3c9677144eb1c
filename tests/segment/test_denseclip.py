"""DenseCLIP: words behind a learned context, the image's part in them, score map and its loss, the attention pool."""

import numpy as np
import plain_dense as plain
import pytest
import torch

from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.segment.common import enter
from clipworks.segment.denseclip import DenseCLIP, pixel_entropy, projected, score_map
from clipworks.segment.mask_decoder import last_tokens
from clipworks.segment.segmenter import segment

NAMES = ["cat", "wild boar", "sea"]


@pytest.fixture(scope="module")
def encoder():
    return plain.toy().float()


def begun(encoder, names=NAMES, **options):
    """A method whose parts are as they start, and those."""
    method = DenseCLIP(encoder, **{"width": 8, **options})
    method._begin(encoder, names)
    return method, method._built(encoder).eval()


def scored(encoder, method, parts, images=None):
    hidden = enter(encoder, plain.images().float() if images is None else images)
    return method._scores(parts, encoder, hidden, method._texts(parts, encoder))


@torch.no_grad()
def test_a_context_of_words_is_a_sentence_of_words(encoder):
    method, parts = begun(encoder, context=4)
    words = encoder.tokenize("a photo of a")[0, 1:5]
    parts.context.copy_(encoder.text.tokens(words))
    expected = encoder.texts([f"a photo of a {name}" for name in NAMES])
    np.testing.assert_allclose(method._texts(parts, encoder)[0], expected, atol=1e-5)


@torch.no_grad()
def test_the_end_moves_with_the_context(encoder):
    """The vector is read 8 places further; read where the end stood, it is another one."""
    method, parts = begun(encoder)
    ids = encoder.tokenize(NAMES)
    eot = encoder.text.end(ids)
    words = encoder.text.tokens(ids)
    sentence = torch.cat([words[:, :1], parts.context.expand(3, -1, -1), words[:, 1:]], dim=1)

    def read(places):
        found = encoder.text.run(embeddings=sentence, eot=places).pooled
        return torch.nn.functional.normalize(found, dim=-1)

    got = method._texts(parts, encoder)[0]
    np.testing.assert_allclose(got, read(eot + 8), atol=1e-5)
    assert (got - read(eot)).abs().amax(1).min() > 1e-2


@torch.no_grad()
def test_without_gamma_the_image_has_no_say(encoder):
    method, parts = begun(encoder)
    parts.gamma.zero_()
    before = scored(encoder, method, parts)[1]
    for p in parts.decoder.parameters():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(scored(encoder, method, parts)[1], before)
    parts.gamma.fill_(1.0)
    assert (scored(encoder, method, parts)[1] - before).abs().max() > 1e-2


@torch.no_grad()
def test_at_the_start_words_hardly_move(encoder):
    method, parts = begun(encoder)
    texts = method._texts(parts, encoder)
    for seed in range(3):
        moves = torch.randn(texts.shape, generator=torch.Generator().manual_seed(seed))
        near = torch.nn.functional.cosine_similarity(texts + parts.gamma * moves, texts, dim=-1)
        assert near.min() > 0.999


@torch.no_grad()
def test_the_score_map_against_numpy(encoder):
    method, parts = begun(encoder)
    found = enter(encoder, plain.images().float())
    q, k, _ = plain.projections(found)
    tokens = plain.finished(found, plain.attended(found, plain.softmax(q @ k.swapaxes(-2, -1) / np.sqrt(q.shape[-1]))))
    local = plain.projected(found, tokens)
    whole = plain.linear(plain.norm(tokens[:, :1], found.visual.norm_post), found.visual.projection)
    memory = np.concatenate([whole, local.reshape(2, 24, -1)], axis=1)
    texts = method._texts(parts, encoder).numpy().repeat(2, 0)
    moved = texts + parts.gamma.numpy() * parts.decoder(torch.tensor(texts), torch.tensor(memory).float()).numpy()
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (local, moved))
    scores = scored(encoder, method, parts)[1]
    np.testing.assert_allclose(scores, np.einsum("bhwd,bkd->bkhw", a, b), atol=1e-5)
    assert scores.abs().max() <= 1 + 1e-6
    np.testing.assert_allclose(score_map(torch.tensor(7 * local), torch.tensor(moved)), scores, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("memory", [0, 5])
def test_the_global_token_is_the_images_vector(memory):
    encoder = toy_encoder(tokenizer=CLIPTokenizer(), memory=memory)
    images = plain.images(2, 16, 16).float()
    hidden = enter(encoder, images)
    config = encoder.config.preprocess
    pixels = (images - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]
    whole, _ = projected(hidden, last_tokens(hidden))
    np.testing.assert_allclose(whole, encoder.encode_image(pixels, normalize=False), atol=1e-5)


@torch.no_grad()
def test_the_attention_pool_of_a_resnet():
    encoder = toy_encoder(kind="resnet", layers=(1, 1, 1, 1), width=4, image_size=64, patch_size=32, heads=2)
    images = plain.images(2, 64, 64).float()
    hidden = enter(encoder, images)
    whole, local = projected(hidden, last_tokens(hidden))
    config = encoder.config.preprocess
    pixels = (images - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]
    np.testing.assert_allclose(whole, encoder.encode_image(pixels, normalize=False), atol=1e-5)
    assert local.shape == (2, *hidden.grid, encoder.dim)
    pool = encoder.visual.pool  # one patch's output by hand
    x = torch.cat([hidden.inputs[-1].mean(1, keepdim=True), hidden.inputs[-1]], 1) + pool.positions
    q, k, v = (plain.linear(x[0].numpy(), m).reshape(len(x[0]), 2, -1) for m in (pool.q, pool.k, pool.v))
    weights = plain.softmax(np.einsum("hc,nhc->hn", q[2], k) / np.sqrt(q.shape[-1]))
    expected = plain.linear(np.einsum("hn,nhc->hc", weights, v).reshape(1, -1), pool.out)[0]
    np.testing.assert_allclose(local[0].flatten(0, 1)[1], expected, atol=1e-5)


@pytest.mark.parametrize(("names", "tau"), [(2, 0.07), (5, 0.07), (4, 0.5)])
def test_the_loss_of_a_perfect_score_map(names, tau):
    labels = torch.arange(16).reshape(1, 4, 4) % names
    scores = torch.nn.functional.one_hot(labels, names).permute(0, 3, 1, 2).double()
    expected = np.log(1 + (names - 1) * np.exp(-1 / tau))
    assert float(pixel_entropy(scores / tau, labels)) == pytest.approx(expected, rel=1e-9)
    labels[0, 0, 0] = 255
    assert float(pixel_entropy(scores / tau, labels)) == pytest.approx(expected, rel=1e-9)
    assert float(pixel_entropy(scores, torch.full_like(labels, 255))) == 0


@pytest.mark.parametrize("prompting", ["post", "pre"])
def test_the_context_learns_through_a_frozen_text_tower(encoder, prompting):
    method, parts = begun(encoder, prompting=prompting)
    encoder.requires_grad_(False)
    labels = torch.zeros(2, 16, 24, dtype=torch.long)
    losses = method._losses(parts, encoder, plain.images().float(), labels)
    assert set(losses) == {"task", "auxiliary"}
    (gradient,) = torch.autograd.grad(losses["auxiliary"], [parts.context], retain_graph=True)
    assert gradient.abs().max() > 0
    sum(losses.values()).backward()
    assert all(p.grad is None for p in encoder.parameters())
    encoder.requires_grad_(True)


def textures(count=6, side=32, seed=0):
    """Stripes one way and the other, in halves."""
    draw = np.random.default_rng(seed)
    images, maps = [], []
    for _ in range(count):
        rows, columns = np.mgrid[:side, :side]
        edge = int(draw.integers(side // 4, 3 * side // 4))
        labels = (columns >= edge).astype(np.uint8)
        stripes = np.where(labels == 0, rows // 2 % 2, columns // 2 % 2)
        images.append(
            np.repeat((200 * stripes + draw.integers(0, 55, (side, side)))[..., None], 3, -1).astype(np.uint8)
        )
        maps.append(labels)
    return images, maps


@pytest.mark.parametrize("prompting", ["post", pytest.param("pre", marks=pytest.mark.slow)])
def test_it_learns_textures_and_comes_back_from_its_file(encoder, tmp_path, prompting):
    images, maps = textures()
    method = DenseCLIP(encoder, prompting, width=16, steps=40, lr=1e-2, batch_size=4, side=32)
    method.fit(images, maps, ["rows", "columns"], progress=False)
    test, truth = textures(seed=1)
    assert np.mean([a == b for a, b in zip(method.predict(test), truth, strict=True)]) > 0.85
    path = method.save(tmp_path / "denseclip.safetensors")
    scores = [segment(test[0], ["columns", "rows"], method=m, encoder=encoder).scores for m in (method, str(path))]
    assert np.array_equal(*scores)
    only = segment(test[0], ["rows"], method=method)
    assert only.shares == {"rows": 1.0}


def steps_to_reach(encoder, auxiliary, goal=0.9, steps=40):
    """Steps until a part of the training pixels is right in the head's answer."""
    images, maps = textures(side=64)
    method, parts = begun(encoder, ["rows", "columns"], auxiliary=auxiliary)
    pixels = torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 255
    labels = torch.tensor(np.stack(maps)).long()
    optimizer = torch.optim.AdamW([*parts.parameters(), *encoder.visual.parameters()], 3e-3)
    for step in range(steps):
        logits, _ = scored(encoder, method, parts, pixels)
        if float((torch.nn.functional.interpolate(logits, 64).argmax(1) == labels).float().mean()) >= goal:
            return step
        loss = sum(method._losses(parts, encoder, pixels, labels).values())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    return steps


def test_the_score_maps_loss_does_not_slow_learning():
    with_loss, without = (steps_to_reach(plain.toy().float(), auxiliary) for auxiliary in (0.4, 0.0))
    assert with_loss <= without < 40


def test_messages(encoder):
    images, maps = textures(1)
    with pytest.raises(ClipworksError, match="prompting must be one of 'post', 'pre'"):
        DenseCLIP(encoder, "before", steps=1).fit(images, maps, ["rows", "columns"])
    method = DenseCLIP(encoder, steps=1, width=8).fit(images, maps, ["rows", "columns"])
    with pytest.raises(ClipworksError, match="Did you mean 'rows'"):
        segment(images[0], ["row"], method=method)
