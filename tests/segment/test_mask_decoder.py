"""The mask decoder's parts against numpy, what a mask hides, and that it learns to draw."""

import numpy as np
import plain_dense as plain
import pytest
import torch
from plain_dense import made

from clipworks.errors import ClipworksError
from clipworks.segment.mask_decoder import (
    MaskDecoder,
    WordHead,
    map_channels,
    mask_pool,
    semantic_map,
    share,
    sine_positions,
    tower_maps,
)
from clipworks.segment.mask_losses import MaskCriterion, proposal_losses


def decoder(channels=(6, 3), **options):
    torch.manual_seed(0)
    return MaskDecoder(channels, width=16, queries=5, layers=2, **options).eval()


@torch.no_grad()
def test_every_layer_proposes_on_the_finest_grid():
    found = decoder()([made(2, 6, 2, 3), made(2, 3, 4, 6)])
    assert found.masks.shape == (2, 5, 4, 6)
    assert found.queries.shape == (2, 5, 16)
    assert [p.masks.shape for p in found.earlier] == [(2, 5, 4, 6)] * 2
    assert not any(p.earlier for p in found.earlier)


@torch.no_grad()
def test_images_of_a_batch_do_not_meet():
    own, maps = decoder(), [made(3, 6, 2, 3), made(3, 3, 4, 6)]
    whole, one = own(maps), own([m[1:2] for m in maps])
    np.testing.assert_allclose(whole.masks[1], one.masks[0], atol=1e-5)


@torch.no_grad()
def test_a_mask_is_a_product_of_query_and_pixels_and_attention_looks_where_it_is():
    """One map, one layer of queries: the first proposal, and what the layer is allowed to see, in numpy."""
    own = decoder((6,))
    maps = [made(1, 6, 4, 4)]
    seen = []
    layer = own.layers[0].forward
    own.layers[0].forward = lambda x, places, memory, mask: seen.append(mask) or layer(x, places, memory, mask)
    first = own(maps).earlier[0]
    pixels = plain.linear(maps[0][0].flatten(1).T.numpy(), Flat(own.pixels.lateral[0]))
    queries = plain.norm(own.queries.numpy(), own.norm)
    hidden = np.maximum(plain.linear(queries, own.draw[0]), 0)
    masks = plain.linear(hidden, own.draw[2]) @ pixels.T
    np.testing.assert_allclose(first.masks[0].flatten(1), masks, atol=1e-5)
    allowed = masks > 0
    allowed[~allowed.any(1)] = True
    assert np.array_equal(seen[0][0], allowed)


class Flat:
    """A 1x1 convolution as a linear map."""

    def __init__(self, convolution):
        self.weight, self.bias = convolution.weight[:, :, 0, 0], convolution.bias


@torch.no_grad()
def test_word_head_against_numpy():
    torch.manual_seed(0)
    head, queries = WordHead(16, 8, scale=50.0), made(2, 5, 16)
    words = torch.nn.functional.normalize(made(3, 8), dim=-1)
    x = plain.linear(np.maximum(plain.linear(queries.numpy(), head.embed[0]), 0), head.embed[2])
    rows = np.vstack([words.numpy(), head.none.numpy() / np.linalg.norm(head.none.numpy())])
    expected = 50 * x / np.linalg.norm(x, axis=-1, keepdims=True) @ rows.T
    np.testing.assert_allclose(head(queries, words), expected, atol=1e-4)


def test_pooling_is_the_mean_under_the_mask():
    features, masks = made(2, 4, 3, 5), made(2, 3, 3, 5, seed=1)
    masks[1, 2] = -1
    got = mask_pool(features, masks)
    for b in range(2):
        for q in range(3):
            under = features[b][:, masks[b, q] > 0]
            expected = under.mean(1) if under.shape[1] else torch.zeros(4)
            np.testing.assert_allclose(got[b, q], expected, atol=1e-5)


def test_masks_that_partition_an_image_come_back_as_they_are():
    labels = torch.randint(0, 3, (1, 5, 6), generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 1])  # the class of each proposal
    masks = torch.where(labels == order[:, None, None], 1e4, -1e4)[None]
    scores = semantic_map(torch.eye(3)[order][None], masks)
    assert torch.equal(scores[0], torch.nn.functional.one_hot(labels[0], 3).permute(2, 0, 1).float())
    np.testing.assert_allclose(share(3 * scores[0]), scores[0], atol=1e-6)


def test_positions_tell_all_places_apart_and_rows_from_columns():
    table = sine_positions(4, 4, 16)
    distance = torch.cdist(table, table) + torch.eye(16) * 9
    assert distance.min() > 0.1
    grid = table.reshape(4, 4, 16)
    assert torch.equal(grid[1, 0, :8], grid[1, 3, :8])
    assert torch.equal(grid[0, 2, 8:], grid[3, 2, 8:])


@torch.no_grad()
def test_maps_of_a_tower():
    encoder = plain.toy()
    found = plain.hidden(encoder)
    maps = tower_maps(found)
    assert [m.shape[1] for m in maps] == map_channels(encoder.float(), (16, 8)) == [16]
    q, k, _ = plain.projections(found)
    tokens = plain.finished(found, plain.attended(found, plain.softmax(q @ k.swapaxes(-2, -1) / np.sqrt(q.shape[-1]))))
    np.testing.assert_allclose(maps[0].flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-5)


def test_it_learns_to_draw():
    """Two textures as features; after some steps every pixel has its class."""
    torch.manual_seed(0)
    labels = torch.zeros(4, 8, 8, dtype=torch.long)
    for i in range(4):
        labels[i, :, 2 + i :] = 1
    maps = [torch.nn.functional.one_hot(labels, 2).permute(0, 3, 1, 2).float() + 0.1 * made(4, 2, 8, 8)]
    own, head, words = MaskDecoder((2,), width=16, queries=4, layers=1), WordHead(16, 4), torch.eye(4)[:2]
    optimizer = torch.optim.Adam([*own.parameters(), *head.parameters()], 0.01)

    def accuracy():
        with torch.no_grad():
            found = own(maps)
            scores = semantic_map(head(found.queries, words).softmax(-1)[..., :-1], found.masks)
        return float((scores.argmax(1) == labels).float().mean())

    for _ in range(60):
        loss = sum(proposal_losses(own(maps), lambda q: head(q, words), labels, MaskCriterion()).values())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert accuracy() > 0.95


def test_messages():
    with pytest.raises(ClipworksError, match="width must be a multiple"):
        MaskDecoder((4,), width=18)
    with pytest.raises(ClipworksError, match="queries must lie in"):
        MaskDecoder((4,), queries=0)
