"""Injectors of nothing, what they add, the ensemble and the mixing by hand, the semantic map in numpy."""

import numpy as np
import plain_dense as plain
import pytest
import torch

from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.metrics.segmentation import panoptic_counts, panoptic_quality
from clipworks.segment.common import enter
from clipworks.segment.frozenseg import (
    FeatureInjector,
    FrozenSeg,
    FrozenSegParts,
    QueryInjector,
    geometric_ensemble,
    is_seen,
    mixed,
)
from clipworks.segment.mask_decoder import MaskDecoder, WordHead, mask_pool, tower_maps
from clipworks.segment.pmp import mask_vectors
from clipworks.segment.segmenter import segment

NAMES = ["red", "green"]


@pytest.fixture(scope="module")
def encoder():
    return toy_encoder(tokenizer=CLIPTokenizer()).float()


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MAPS = [made(2, 12, 2, 3), made(2, 3, 4, 6, seed=1)]
SECOND = made(2, 5, 4, 6, seed=2)


def parts():
    torch.manual_seed(0)
    return FrozenSegParts(MaskDecoder((12, 3), width=16, queries=4, layers=2), WordHead(16, 8, 1.0), 12, 5, 16).eval()


def stirred(module):
    """With injectors that do something."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=draw))
    return module


@torch.no_grad()
def test_injectors_of_nothing_leave_the_base_as_it_is():
    own = parts()
    host, found = own.decoder(MAPS), own(MAPS, SECOND)
    for one, other in zip((*found.earlier, found), (*host.earlier, host), strict=True):
        assert torch.equal(one.masks, other.masks)
    stirred(own.into_map)
    assert (own(MAPS, SECOND).masks - host.masks).abs().max() > 1e-3
    other = parts()
    stirred(other.into_queries)
    assert (other(MAPS, SECOND).masks - host.masks).abs().max() > 1e-3
    words = torch.nn.functional.normalize(made(3, 8), dim=-1)
    cosine = own.head(host.queries, words)
    assert float(cosine.abs().max()) <= 1 + 1e-6
    np.testing.assert_allclose(own.logits(host.queries, words), cosine / 0.07, atol=1e-4)


@torch.no_grad()
def test_what_is_put_into_queries():
    torch.manual_seed(0)
    own, queries = stirred(QueryInjector(5, 16)), made(2, 4, 16, seed=4)
    masks = made(2, 4, 4, 6, seed=5)
    added = own(queries, SECOND, masks) - queries
    for b in range(2):
        for q in range(4):
            mean = SECOND[b][:, masks[b, q] > 0].mean(1).numpy()
            np.testing.assert_allclose(added[b, q], plain.linear(mean, own.linear), atol=1e-5)
    alike = own(queries, SECOND, masks[:, :1].expand(-1, 4, -1, -1)) - queries
    np.testing.assert_allclose(alike, alike[:, :1].expand(-1, 4, -1), atol=1e-5)
    nowhere = own(queries, SECOND, torch.full_like(masks, -1.0)) - queries
    np.testing.assert_allclose(nowhere, own.linear.bias.expand(2, 4, -1), atol=1e-6)


@torch.no_grad()
def test_what_is_put_into_the_map_in_numpy():
    own = stirred(FeatureInjector(12, 5))
    found = own(MAPS[0], SECOND)
    x = MAPS[0][1].flatten(1).T.numpy()
    cells = plain.linear(SECOND[1].flatten(1).T.numpy(), own.cells)
    given = ((plain.norm(x, own.norm), own.attention.q), (cells, own.attention.k), (cells, own.attention.v))
    q, k, v = (plain.linear(y, module).reshape(len(y), 4, 3).swapaxes(0, 1) for y, module in given)
    seen = (plain.softmax(q @ k.swapaxes(1, 2) / np.sqrt(3)) @ v).swapaxes(0, 1).reshape(6, 12)
    expected = x + plain.linear(seen, own.attention.out)
    np.testing.assert_allclose(found[1].flatten(1).T, expected, atol=1e-4)


def test_gradients_reach_injectors_and_decoder_alone(encoder):
    method = FrozenSeg(encoder, queries=4, width=8)
    method._begin(encoder, NAMES)
    own = method._built(encoder)
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[:, :, 16:] = 1
    sum(method._losses(own, encoder, plain.images(2, 32, 32).float(), labels).values()).backward()
    assert all(injector.linear.weight.grad.any() for injector in own.into_queries)
    assert own.into_map.attention.out.weight.grad.any()
    assert own.log_scale.grad != 0
    assert own.decoder.queries.grad.any()
    assert all(p.grad is None for p in encoder.parameters())


def test_the_ensemble():
    draw = np.random.default_rng(0)
    own, clip = (torch.tensor(draw.dirichlet(np.ones(6), 500)) for _ in range(2))
    seen = torch.tensor([True, True, False, False, True, False])
    assert torch.equal(geometric_ensemble(own, clip, seen, 0, 0), own)
    assert torch.equal(geometric_ensemble(own, clip, seen, 1, 1), clip)
    for a, b in ((0.4, 0.8), (0.1, 0.3)):
        np.testing.assert_allclose(geometric_ensemble(own, own, seen, a, b), own, atol=1e-12)
        expected = np.stack([own[:, k] ** (1 - p) * clip[:, k] ** p
                             for k, p in enumerate((a, a, b, b, a, b))], 1)  # fmt: skip
        np.testing.assert_allclose(geometric_ensemble(own, clip, seen, a, b), expected, atol=1e-12)
    assert geometric_ensemble(own, clip, seen, 0.6, 0.6).sum(1).max() <= 1 + 1e-12
    # with two weights it is no distribution: seen mass of one factor and unseen mass of the other do add up to more
    one, other = torch.tensor([0.9, 0.1]).double(), torch.tensor([0.6, 0.4]).double()
    assert geometric_ensemble(one, other, torch.tensor([True, False]), 0.0, 1.0).sum() > 1


def test_mixing_touches_unseen_classes_alone():
    semantic, masks = made(3, 4, 5).sigmoid(), (made(4, 4, 5, seed=1) > 0).float()
    likely = torch.tensor([[0.1, 0.8, 0.1], [0.9, 0.05, 0.05], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7]])
    seen = torch.tensor([True, False, False])
    assert torch.equal(mixed(semantic, masks, likely, seen, 0.0), semantic)
    found = mixed(semantic, masks, likely, seen, 0.2)
    assert torch.equal(found[0], semantic[0])
    for k in (1, 2):  # the first and the last mask are sure of an unseen class
        part = likely[0, k] * masks[0] + likely[3, k] * masks[3]
        np.testing.assert_allclose(found[k], 0.8 * semantic[k] + 0.2 * part, atol=1e-6)
    assert torch.equal(mixed(semantic, masks[1:3], likely[1:3], seen), semantic)


def test_panoptic_quality_is_its_two_parts():
    truth = np.array([[1, 1, 1, 1], [2, 2, 2, 2]])
    found = np.array([[1, 1, 1, 2], [2, 2, 2, 2]])
    figures = panoptic_quality(panoptic_counts(truth, {1: 0, 2: 0}, found, {1: 0, 2: 0}))
    assert figures["sq"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert figures["pq"] == pytest.approx(figures["sq"] * figures["rq"])
    assert panoptic_quality(panoptic_counts(truth, {1: 0, 2: 1}, truth, {1: 0, 2: 1}))["pq"] == 1


def ready(encoder, **options):
    method = FrozenSeg(encoder, queries=3, width=8, **options)
    method._begin(encoder, NAMES)
    method._take(encoder, stirred(method._built(encoder)), {})
    return method


@torch.no_grad()
def test_the_semantic_map_in_numpy(encoder):
    method = ready(encoder, seen=0.3, unseen=0.9)
    hidden = enter(encoder, plain.images(1).float())
    words = torch.cat([method.words_[1:], torch.nn.functional.normalize(made(2, 8), dim=-1)])
    assert is_seen(words, method.words_).tolist() == [True, False, False]
    found = method.parts_(tower_maps(hidden), hidden.inputs[-1][:, 1:].transpose(1, 2).unflatten(2, hidden.grid))
    pooled = torch.nn.functional.normalize(mask_vectors(hidden, found.masks), dim=-1)[0].numpy()
    total = 0
    for query, vector, maps in zip(found.queries[0], pooled, found.masks[0], strict=True):
        logits = method.parts_.logits(query[None, None], words)[0, 0].numpy()
        own, void = plain.softmax(logits[:-1]), plain.softmax(logits)[-1]
        clip = plain.softmax(encoder.logit_scale * words.numpy() @ vector)
        power = np.array([0.3, 0.9, 0.9])
        likely = own ** (1 - power) * clip**power * (1 - void)
        total = total + likely[:, None, None] / (1 + np.exp(-maps.numpy()))
    np.testing.assert_allclose(method.local(hidden, words)[0], total, atol=1e-4)


@torch.no_grad()
def test_masks_of_the_second_model_are_mixed_in(encoder, monkeypatch):
    method = ready(encoder, proposals="hf:some/sam", mix=0.5)
    image, words = plain.images(1)[0].float(), torch.nn.functional.normalize(made(2, 8), dim=-1)
    masks = np.zeros((1, 16, 24), bool)
    masks[0, :, :8] = True
    average = made(2, 4, 6, seed=7).sigmoid()
    monkeypatch.setattr(method, "_masks", lambda image: masks)
    monkeypatch.setattr(method, "_clip", lambda hidden, drawn, words: torch.tensor([[[0.1, 0.9]]]))
    found = method.whole(average, image, encoder, words)
    inside = torch.zeros(4, 6)
    inside[:, :2] = 1
    expected = torch.stack([0.5 * average[k] + 0.5 * p * inside for k, p in enumerate((0.1, 0.9))])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    monkeypatch.setattr(method, "_masks", lambda image: masks[:0])
    assert method.whole(average, image, encoder, words) is average
    method.mix = 0.0
    assert method.whole(average, image, encoder, words) is average


@torch.no_grad()
def test_the_second_models_masks_are_sorted_out(encoder):
    method = ready(encoder, proposals="hf:some/sam")

    def sam(image):
        assert float(image.max()) == 255

        def predict(box, point, scores):
            logits = torch.full((40, 40), -9.0)
            logits[:20] = 9.0
            logits = logits if point[1] < 20 else -logits
            return logits, 0.9 if point[0] > 20 else 0.5

        return predict

    method._sam = sam
    found = method._masks(torch.ones(3, 40, 40))
    assert found.shape == (2, 40, 40)
    assert found.sum((1, 2)).tolist() == [800, 800]


def test_it_learns_and_comes_back_from_its_file(encoder, tmp_path):
    method = FrozenSeg(encoder, seen=0.2, queries=4, width=16, steps=80, lr=1e-2, batch_size=4)
    method.fit(*plain.photos(), NAMES, progress=False)
    assert method.encoder_ is encoder
    assert method.parts_.into_map.attention.out.weight.any()
    images, maps = plain.photos(3, seed=1)
    assert np.mean([a == b for a, b in zip(method.predict(images), maps, strict=True)]) > 0.8
    path = method.save(tmp_path / "frozenseg.safetensors")
    names = ["green", "red", "a third thing"]
    scores = [segment(images[0], names, method=m, encoder=encoder).scores for m in (method, path)]
    assert np.array_equal(*scores)


def test_masks_pooled_at_their_own_size_are_means():
    masks = made(1, 2, 4, 6, seed=8)
    for q in range(2):
        expected = SECOND[0][:, masks[0, q] > 0].mean(1)
        np.testing.assert_allclose(mask_pool(SECOND[:1], masks)[0, q], expected, atol=1e-5)


def test_messages(encoder):
    with pytest.raises(ClipworksError, match="unseen must lie in"):
        FrozenSeg(encoder, unseen=1.5, steps=1).fit(*plain.photos(1), NAMES)
    with pytest.raises(ClipworksError, match="spatial must be 'own'"):
        FrozenSeg(encoder, spatial=len, steps=1).fit(*plain.photos(1), NAMES)
    with pytest.raises(ClipworksError, match="affinity must be 'own'"):
        FrozenSeg(encoder, spatial="sam", steps=1).fit(*plain.photos(1), NAMES)
