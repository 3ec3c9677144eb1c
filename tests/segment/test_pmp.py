"""Gates of nothing, the words' order and number, lists in parts, and a prompt that decides what is drawn."""

import numpy as np
import plain_dense as plain
import pytest
import torch
from plain_dense import made

from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.segment.common import enter
from clipworks.segment.mask_decoder import MaskDecoder, WordHead, mask_pool, tower_maps
from clipworks.segment.mask_losses import dice_loss, pixel_loss
from clipworks.segment.pmp import PMP, PMPParts, Reader, mask_vectors, merged, shown_names
from clipworks.segment.segmenter import segment

NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def encoder():
    return toy_encoder(tokenizer=CLIPTokenizer()).float()


def parts(gate=0.0, queries=5, channels=(6, 3)):
    torch.manual_seed(0)
    own = PMPParts(MaskDecoder(channels, width=16, queries=queries, layers=2), WordHead(16, 8), 8, 16).eval()
    for reader in own.readers:
        torch.nn.init.constant_(reader.gate, gate)
    return own


MAPS = [made(2, 6, 2, 3), made(2, 3, 4, 6, seed=1)]


@torch.no_grad()
def test_gates_of_nothing_leave_the_host_as_it_is():
    own = parts()
    host = own.decoder(MAPS)
    for words in (made(3, 8, seed=2), 9 * made(1, 8, seed=3)):
        found = own(MAPS, words)
        for one, other in zip((*found.earlier, found), (*host.earlier, host), strict=True):
            assert torch.equal(one.masks, other.masks)
            assert torch.equal(one.queries, other.queries)


@torch.no_grad()
def test_words_have_no_order_and_no_number():
    own, words = parts(0.7), made(4, 8, seed=2)
    found = own(MAPS, words).masks
    np.testing.assert_allclose(own(MAPS, words[[2, 0, 3, 1]]).masks, found, atol=1e-5)
    np.testing.assert_allclose(own(MAPS, torch.cat([words, words])).masks, found, atol=1e-5)
    assert (own(MAPS, words[:3]).masks - found).abs().max() > 1e-3
    order = torch.tensor([3, 1, 4, 0, 2])
    own.decoder.queries.copy_(own.decoder.queries[order])
    own.decoder.places.copy_(own.decoder.places[order])
    np.testing.assert_allclose(own(MAPS, words).masks, found[:, order], atol=1e-5)


@torch.no_grad()
def test_a_reader_against_numpy_and_one_word_is_read_alike_by_all():
    torch.manual_seed(0)
    reader, queries, text = Reader(16, 2), made(1, 5, 16), made(1, 3, 16, seed=1)
    torch.nn.init.constant_(reader.gate, 0.3)
    x = plain.norm(queries[0].numpy(), reader.norm)
    own, told = reader.attention, text[0].numpy()
    q, k, v = (plain.linear(y, module).reshape(-1, 2, 8).swapaxes(0, 1)
               for y, module in ((x, own.q), (told, own.k), (told, own.v)))  # fmt: skip
    seen = plain.softmax(q @ k.swapaxes(1, 2) / np.sqrt(8)) @ v
    expected = queries[0].numpy() + 0.3 * plain.linear(seen.swapaxes(0, 1).reshape(5, 16), own.out)
    np.testing.assert_allclose(reader(queries, text)[0], expected, atol=1e-5)
    added = (reader(queries, text[:, :1]) - queries)[0]
    np.testing.assert_allclose(added, added[:1].expand(5, -1), atol=1e-6)


def test_gradients_reach_words_way_and_decoder_alone(encoder):
    method = PMP(encoder, queries=4, width=8)
    method._begin(encoder, NAMES)
    own = method._built(encoder)
    for reader in own.readers:
        torch.nn.init.constant_(reader.gate, 0.1)
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[:, :, 16:] = 2
    sum(method._losses(own, encoder, plain.images(2, 32, 32).float(), labels).values()).backward()
    assert own.text[1].weight.grad.abs().sum() > 0
    assert own.decoder.queries.grad.abs().sum() > 0
    assert all(reader.gate.grad != 0 for reader in own.readers)
    assert all(p.grad is None for p in encoder.parameters())


def test_names_that_are_shown():
    labels = torch.tensor([[[5, 2, 255], [2, 5, 5]]])
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        chosen, found = shown_names(labels, 9, 3)
        assert len(chosen) == 5
        assert {2, 5} <= set(chosen.tolist())
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        for y in range(2):
            for x in range(3):
                label = int(labels[0, y, x])
                assert int(found[0, y, x]) == (255 if label == 255 else chosen.tolist().index(label))
        seen |= set(chosen.tolist())
    assert seen == set(range(9))
    assert shown_names(labels, 9, None)[0].tolist() == list(range(9))
    assert shown_names(labels, 9, 0)[0].tolist() == [2, 5]
    assert len(shown_names(torch.full((1, 2, 2), 255), 9, 0)[0]) == 1


@torch.no_grad()
def test_what_the_tower_says_of_a_mask(encoder):
    hidden = enter(encoder, plain.images(1).float())
    masks = made(1, 3, *hidden.grid, seed=4)
    found = mask_vectors(hidden, masks)
    v = plain.projections(hidden)[2]
    tokens = plain.finished(hidden, plain.attended(hidden, np.eye(v.shape[2])[None, None]))[:, 1:]
    for query, maps in zip(found[0], masks[0], strict=True):
        mean = tokens[0][(maps > 0).flatten().numpy()].mean(0)
        visual = encoder.visual
        np.testing.assert_allclose(
            query, plain.linear(plain.norm(mean[None], visual.norm_post), visual.projection)[0], atol=1e-4
        )
    memory = toy_encoder(memory=5)
    hidden = enter(memory, plain.images(1).float())
    stem = hidden.embedded.transpose(1, 2).unflatten(2, hidden.grid)
    plainly = mask_vectors(enter(memory, plain.images(1).float(), memory=False), masks)
    np.testing.assert_allclose(
        mask_vectors(hidden, masks) - plainly, memory.visual.memory(mask_pool(stem, masks)), atol=1e-5
    )


def test_doubles_of_two_parts_of_a_list_are_merged():
    masks = torch.full((1, 4, 2, 4), -9.0)
    masks[0, 0, :, :2], masks[0, 1, :, :2], masks[0, 2, :, 2:], masks[0, 3, :, :3] = 9, 9, 9, 9
    likely = torch.tensor([[[0.2, 0.1], [0.1, 0.6], [0.3, 0.3], [0.9, 0.0]]])
    assert merged(masks, likely).tolist() == [[0, 1, 1, 1]]  # the third covers 2 / 3 of the last
    assert merged(masks, likely, 0.5).tolist() == [[0, 0, 1, 1]]


@torch.no_grad()
def test_a_list_in_parts(encoder):
    """Decoders that do not read propose the same for every part; all but one of the doubles are dropped."""
    method = PMP(encoder, queries=1, width=8, balance=0.3)
    method._begin(encoder, NAMES)
    method._take(encoder, method._built(encoder), {})
    hidden = enter(encoder, plain.images(2).float())
    whole = method.local(hidden, method.words_)
    found = method.parts_(tower_maps(hidden), method.words_)
    own = plain.softmax(method.parts_.head(found.queries, method.words_).numpy())[..., :-1]
    unit = torch.nn.functional.normalize(mask_vectors(hidden, found.masks), dim=-1).numpy()
    clip = plain.softmax(encoder.logit_scale * unit @ method.words_.numpy().T)
    expected = np.einsum("bqk,bqhw->bkhw", own**0.7 * clip**0.3, 1 / (1 + np.exp(-found.masks.numpy())))
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    method.chunk = 1
    if bool((found.masks > 0).flatten(2).any(-1).all()):
        np.testing.assert_allclose(method.local(hidden, method.words_), whole, atol=1e-5)


def shapes(count, seed):
    """A red and a blue square that overlap, in any order: pictures, and the masks of what is seen of each."""
    draw = np.random.default_rng(seed)
    pictures, masks = np.zeros((count, 3, 16, 16), np.float32), np.zeros((count, 2, 16, 16), np.float32)
    for n in range(count):
        y, x = draw.integers(1, 5, 2)
        corners = [(y, x), (y + draw.integers(3, 6), x + draw.integers(3, 6))]
        for kind in draw.permutation(2):
            top, left = corners[kind]
            rows, columns = slice(top, top + 6), slice(left, left + 6)
            masks[n, :, rows, columns], masks[n, kind, rows, columns] = 0, 1
            pictures[n, :, rows, columns], pictures[n, 2 * kind, rows, columns] = 0, 1
    return torch.from_numpy(pictures), torch.from_numpy(masks)


def test_the_prompt_decides_what_one_query_draws():
    """Red or blue: with words nearly all, without them half."""
    words = torch.eye(8)[:2]
    pictures, masks = shapes(64, 0)
    test, truth = shapes(40, 1)

    def drawn(own, images, told):
        return own([images], words[told][:, None]).masks[:, 0].flatten(1)

    def trained(reads):
        torch.manual_seed(0)
        own = PMPParts(MaskDecoder([3], width=16, queries=1, layers=2, heads=2), WordHead(16, 8), 8, 16)
        for reader in own.readers:
            reader.gate.requires_grad_(reads)
        optimizer, generator = torch.optim.Adam(own.parameters(), 5e-3), torch.Generator().manual_seed(0)
        for _ in range(300):
            rows = torch.randint(64, (16,), generator=generator)
            told = torch.randint(2, (16,), generator=generator)
            logits, aim = drawn(own, pictures[rows], told), masks[rows, told].flatten(1)
            loss = (pixel_loss(logits, aim) + dice_loss(logits, aim)).mean()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        return own.eval()

    @torch.no_grad()
    def overlaps(own):
        """IoU with the truths of what is drawn for each prompt: (images, prompts, truths)."""
        found = torch.stack([drawn(own, test, torch.full((40,), k)) > 0 for k in (0, 1)], 1)[:, :, None]
        real = truth.flatten(2)[:, None] > 0
        return ((found & real).sum(-1) / (found | real).sum(-1).clamp(min=1)).numpy()

    seen, blind = overlaps(trained(True)), overlaps(trained(False))

    def right(iou):
        own, other = iou[:, [0, 1], [0, 1]], iou[:, [0, 1], [1, 0]]
        return ((own > 0.5) & (own > other)).mean()

    assert right(seen) > 0.95
    assert right(blind) <= 0.5
    recall = [(seen[:, [0, 1], order] > 0.5).mean() for order in ([0, 1], [1, 0])]
    assert recall[0] >= recall[1]


def test_it_learns_and_comes_back_from_its_file(encoder, tmp_path):
    method = PMP(encoder, balance=0.2, queries=4, width=16, steps=80, lr=1e-2, batch_size=4)
    method.fit(*plain.photos(), NAMES, progress=False)
    assert method.encoder_ is encoder
    assert any(reader.gate != 0 for reader in method.parts_.readers)
    images, maps = plain.photos(3, seed=1)
    assert np.mean([a == b for a, b in zip(method.predict(images), maps, strict=True)]) > 0.8
    path = method.save(tmp_path / "pmp.safetensors")
    names = ["green", "red", "a third thing"]
    scores = [segment(images[0], names, method=m, encoder=encoder).scores for m in (method, path)]
    assert np.array_equal(*scores)


def test_messages(encoder):
    for options, message in (({"balance": 2.0}, "balance"), ({"chunk": 0}, "chunk"), ({"shown": -1}, "shown")):
        with pytest.raises(ClipworksError, match=f"{message} must lie in"):
            PMP(encoder, steps=1, **options).fit(*plain.photos(1), NAMES)
