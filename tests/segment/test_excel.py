"""The two paths against numpy, enriched words, what classes share, activation maps, attribute centres."""

import numpy as np
import plain_dense as plain
import pytest
import torch
from sklearn.cluster import KMeans

from clipworks.errors import ClipworksError
from clipworks.segment.excel import ExCEL, activation_maps, attribute_centres, without_shared
from clipworks.segment.patch_tokens import PatchTokens


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@torch.no_grad()
@pytest.mark.parametrize("heads", ["sum", "mean"])
@pytest.mark.parametrize("calibrated", [1, 2, 5])
def test_the_patches_path_against_numpy(calibrated, heads):
    found = plain.hidden(blocks=2)
    layers = [-1] if calibrated == 1 else [0, 1]
    x = found.inputs[layers[0]].numpy()
    for layer in layers:
        q, k, v = plain.projections(found, layer)
        weights = (plain.like(q) + plain.like(k) + plain.like(v)) / 3
        together = weights.sum(1, keepdims=True) if heads == "sum" else weights.mean(1, keepdims=True)
        x = x + plain.attended(found, np.broadcast_to(together, weights.shape), layer)
    got = ExCEL(calibrated, heads=heads).features(found)
    np.testing.assert_allclose(got, plain.projected(found, x), atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(("layers", "expected"), [(2, 1), (3, 1), (5, 2), (12, 5), (24, 5)])
def test_short_towers_calibrate_the_same_share_of_their_blocks(layers, expected):
    found = plain.hidden(plain.toy(layers=layers), blocks=layers)
    assert torch.equal(ExCEL().features(found), ExCEL(expected).features(found))
    assert not torch.equal(ExCEL().features(found), ExCEL(expected + 1).features(found))


@torch.no_grad()
def test_without_calibrated_blocks_the_patches_are_clips_own():
    found = plain.hidden()
    assert torch.equal(ExCEL(0).features(found), PatchTokens().features(found))


@torch.no_grad()
@pytest.mark.parametrize("memory", [0, 3])
def test_the_images_vector_is_clips_own(memory):
    encoder = plain.toy(memory=memory)
    config = encoder.config.preprocess
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    expected = unit(encoder.visual((plain.images() - mean) / std).numpy())
    np.testing.assert_allclose(ExCEL().image(plain.hidden(encoder, blocks=2)), expected, atol=1e-6)


def words(n=3, seed=0, dim=8):
    return torch.tensor(unit(np.random.default_rng(seed).normal(size=(n, dim))), dtype=torch.float32)


def test_one_attribute_is_added_to_every_word():
    rows, attribute = words(), words(1, 1)
    expected = unit((rows + attribute).numpy())
    np.testing.assert_allclose(ExCEL(attributes=attribute).words(rows), expected, atol=1e-6)


def test_attributes_along_a_word_leave_its_direction():
    row = words(1)
    np.testing.assert_allclose(ExCEL(attributes=row.repeat(7, 1)).words(row), row, atol=1e-6)


@pytest.mark.parametrize(("dropped", "count"), [(0.1, 2), (0.5, 12), (0.0, 0), (1.0, 23)])
def test_the_least_like_attributes_are_dropped(dropped, count):
    rows, attributes = words(), words(24, 1)
    near = (rows @ attributes.T).numpy()
    for row, scores in zip(near.copy(), near, strict=True):
        scores[np.argsort(row)[:count]] = -np.inf
    weights = plain.softmax(near)
    assert ((weights == 0).sum(1) == count).all()
    expected = unit(rows.numpy() + weights @ attributes.numpy())
    np.testing.assert_allclose(ExCEL(attributes=attributes, dropped=dropped).words(rows), expected, atol=1e-6)


@torch.no_grad()
def test_what_classes_share_is_removed_channel_by_channel():
    found, rows = plain.hidden(blocks=2), words()
    method = ExCEL()
    features, image = unit(method.features(found).numpy().reshape(2, 24, 8)), method.image(found).numpy()
    expected = np.zeros((2, 3, 24))
    for b in range(2):
        share = plain.softmax(2 * image[b] @ rows.numpy().T)
        products = features[b][:, None] * rows.numpy()[None] * (share / share.mean())[None, :, None]
        expected[b] = (products - products.mean(1, keepdims=True)).sum(-1).T
    got = method.local(found, rows)
    np.testing.assert_allclose(got.flatten(2), expected, atol=1e-5)
    np.testing.assert_allclose(got.sum(1), 0, atol=1e-5)
    assert torch.equal(ExCEL(shared=False).local(found, rows[:1]), ExCEL().local(found, rows[:1]))


def test_equal_words_leave_nothing():
    scores, image = torch.rand(1, 1, 4, 4).expand(1, 3, 4, 4), words(1, 2)
    np.testing.assert_allclose(without_shared(scores, image, words(1).expand(3, -1)), 0, atol=1e-6)


def test_activation_maps_go_from_zero_to_one_for_classes_that_are_there():
    scores = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(0))
    maps = activation_maps(scores, [2, 0])
    for got, raw in zip(maps, (scores[2], scores[0]), strict=True):
        np.testing.assert_allclose(got, (raw - raw.min()) / (raw.max() - raw.min()), atol=1e-6)
    assert (activation_maps(torch.zeros(2, 3, 3), [1]) == 0).all()
    with pytest.raises(ClipworksError, match="present must name classes from 0 to 3"):
        activation_maps(scores, [4])


def test_attribute_centres_are_scikit_learns():
    rows = words(30, 3)

    class Encoder:
        def texts(self, sentences):
            return rows[[int(s) for s in sentences]]

    sentences = [str(i) for i in range(30)]
    got = attribute_centres(sentences, Encoder(), centres=4)
    inertia = KMeans(4, random_state=0, n_init=10).fit(rows.numpy()).inertia_
    nearest = ((rows[:, None] - got[None]) ** 2).sum(-1).min(1).values.sum()
    assert float(nearest) == pytest.approx(inertia, abs=1e-4)
    assert attribute_centres(sentences[:3], Encoder()).shape == (3, 8)


def test_messages():
    with pytest.raises(ClipworksError, match=r"attributes must have the shape \(B, 8\)"):
        ExCEL(attributes=torch.zeros(2, 5)).words(words())
    with pytest.raises(ClipworksError, match="heads must be one of"):
        ExCEL(heads="max")
    found = plain.hidden(blocks=2)
    found.prefix = 0
    with pytest.raises(ClipworksError, match="class token"):
        ExCEL().local(found, words())
