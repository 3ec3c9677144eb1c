"""Class sentences against sentences laid out by hand, one at a time, over the whole context length."""

import prompt_toys as toys
import pytest
import torch

from clipworks.encoders.config import EncoderConfig
from clipworks.encoders.encoder import Encoder
from clipworks.errors import ClipworksError
from clipworks.prompts import words
from clipworks.prompts.words import class_sentences, phrase, word_vectors

NAMES = [*toys.NAMES, "a", "barn owl", "jack-o'-lantern", "ox"]


def contexts(many, slots, seed=0, width=20):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(many, slots, width, generator=draw, dtype=torch.float64, requires_grad=False)


@pytest.fixture(params=list(toys.SHAPES))
def model(request):
    import copy

    return copy.deepcopy(toys.encoder(request.param)).double()


@pytest.mark.parametrize("position", words.POSITIONS)
def test_every_sentence_is_the_one_laid_out_by_hand(model, position, monkeypatch):
    monkeypatch.setattr(words, "ROW", 9)  # names of several rows, one of them longer than a row
    v = contexts(2, 3)
    found = class_sentences(model, NAMES, 3, position).encode(v)
    want = torch.stack([torch.stack([toys.sentence(model, n, c, position) for n in NAMES]) for c in v])
    torch.testing.assert_close(found, want, atol=1e-10, rtol=0)


def test_gradients_too(model, monkeypatch):
    monkeypatch.setattr(words, "ROW", 9)
    weights = torch.randn(len(NAMES), 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, two = (contexts(1, 3).requires_grad_() for _ in range(2))
    (class_sentences(model, NAMES, 3).encode(one)[0] * weights).sum().backward()
    (torch.stack([toys.sentence(model, n, two[0]) for n in NAMES]) * weights).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, atol=1e-9, rtol=1e-9)


def test_some_classes_alone_and_each_with_its_own_context(model):
    v, rows = contexts(3, 2), torch.tensor([5, 0, 2])
    sentences = class_sentences(model, NAMES, 2)
    torch.testing.assert_close(sentences.encode(v, rows), sentences.encode(v)[:, rows], atol=1e-10, rtol=0)
    own = torch.stack([toys.sentence(model, NAMES[r], c) for r, c in zip(rows, v, strict=True)])
    torch.testing.assert_close(sentences.encode_own(v, rows), own, atol=1e-10, rtol=0)


def test_fixed_words_and_no_learned_ones(model):
    ids = phrase(model, "a photo of a")
    found = class_sentences(model, NAMES, 0, words=ids).encode(contexts(1, 0))[0]
    rows = [f"a photo of a {n.replace('_', ' ')}." for n in NAMES]
    torch.testing.assert_close(found, model.encode_text(model.tokenize(rows)), atol=1e-10, rtol=0)
    learned = class_sentences(model, NAMES, len(ids)).encode(word_vectors(model, ids)[None])[0]
    torch.testing.assert_close(learned, found, atol=1e-10, rtol=0)


@pytest.mark.parametrize("row", [9, 192])
def test_deep_prompts_replace_what_the_context_has_become(model, row, monkeypatch):
    monkeypatch.setattr(words, "ROW", row)
    v, deep = contexts(1, 2), {1: contexts(1, 2, 5)[0], 2: contexts(1, 2, 6)[0]}
    ids = phrase(model, "of a")
    sentences = class_sentences(model, NAMES, 2, words=ids)
    tokens = model.tokenize([f"of a {n.replace('_', ' ')}." for n in NAMES])
    tokens = tokens[:, : model.context_length - 2]  # the prompts need the room
    want = model.encode_text(tokens, prompts={0: v[0], **deep})
    torch.testing.assert_close(sentences.encode(v, None, deep)[0], want, atol=1e-10, rtol=0)


def test_layout():
    model = toys.encoder()
    parts = {p: class_sentences(model, ["cat", "barn owl"], 4, p) for p in words.POSITIONS}
    for found in parts.values():
        assert found.lengths.tolist() == [8, 9]  # start, 4 vectors, name, full stop, end
        assert found.ids.gather(1, found.lengths[:, None] - 1).tolist() == [[49407], [49407]]
    assert parts["end"].slots[0].tolist() == [-1, 0, 1, 2, 3, -1, -1, -1, -1]
    assert parts["middle"].slots[0].tolist() == [-1, 0, 1, -1, 2, 3, -1, -1, -1]
    assert parts["front"].slots[1].tolist() == [-1, -1, -1, 0, 1, 2, 3, -1, -1]
    assert parts["end"].tokens_per_class() == 4  # barn, owl, full stop, end
    assert parts["front"].tokens_per_class() == 9


def test_what_cannot_be_laid_out_is_named():
    model = toys.encoder()
    with pytest.raises(ClipworksError, match=r"'cat' takes 44 tokens, and the encoder reads 40"):
        class_sentences(model, ["cat"], 40)
    with pytest.raises(ClipworksError, match="Did you mean 'middle'"):
        class_sentences(model, ["cat"], 4, "midle")
    with torch.device("meta"), pytest.raises(ClipworksError, match="tokenizer"):
        class_sentences(Encoder(EncoderConfig(), seed=None), ["cat"], 4)
