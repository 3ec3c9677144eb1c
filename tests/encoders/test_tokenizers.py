"""Token ids against transformers' CLIP tokenizer, the documented differences, and the rules for long
texts."""

from __future__ import annotations

import random
import re
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipworks.encoders.tokenizers import bpe, common
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.tokenizers.pretrained import NoTokenizer, PretrainedTokenizer
from clipworks.errors import BadWeights, ClipworksError

CLEAN = common.CLEANERS["lower"]

# Unicode blocks: Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Devanagari, Bengali, Tamil, Thai, Tibetan,
# Georgian, Hangul jamo and syllables, Ethiopic, Cherokee, Khmer, kana, Han, emoji, punctuation, arrows,
# maths, full width ...
BLOCKS = [
    (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x400), (0x400, 0x530), (0x531, 0x590), (0x591, 0x600),
    (0x600, 0x700), (0x900, 0x980), (0x980, 0xA00), (0xB80, 0xC00), (0xE00, 0xE80), (0xF00, 0x1000),
    (0x10A0, 0x1200), (0x1200, 0x1380), (0x13A0, 0x1400), (0x1780, 0x1800), (0x1E00, 0x2000),
    (0x2000, 0x2070), (0x2070, 0x2190), (0x2190, 0x2600), (0x2600, 0x27C0), (0x3040, 0x3100),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xFB00, 0xFE00), (0xFE00, 0xFFF0), (0x10000, 0x10200),
    (0x1D400, 0x1D800), (0x1F300, 0x1FA00), (0x20000, 0x2A000), (0xE0000, 0xE0080), (0x0, 0x20),
    (0x7F, 0xA0),
]  # fmt: skip
JOINERS = [
    "",
    " ",
    "\n",
    "\t",
    "\u200d",
    "\u200b",
    "\ufe0f",
    "\u200f",
    "\u202e",
    "\u0301",
    "\u00a0",
    "'s",
    "&amp;",
    "_",
]


def known(character: str) -> bool:
    """Letters of tomorrow's Unicode are letters to one library and symbols to another: assigned code points
    only.

    U+0345 (a combining mark that folds to the letter iota) is the one assigned code point where the
    case-insensitive pattern of the release and the case-sensitive one of transformers part.
    """
    return unicodedata.category(character) not in ("Cn", "Cs") and character != "\u0345"


def wild_strings(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    made = []
    for _ in range(count):
        text = ""
        for _ in range(generator.randint(1, 6)):
            low, high = generator.choice(BLOCKS)
            run = (chr(generator.randrange(low, high)) for _ in range(generator.randint(1, 6)))
            text += "".join(c for c in run if known(c)) + generator.choice(JOINERS)
        made.append(text)
    return made


@pytest.fixture(scope="module")
def ours() -> CLIPTokenizer:
    return CLIPTokenizer()


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    ids, ranks, _ = bpe._tables()
    return transformers.CLIPTokenizer(vocab=ids, merges=list(ranks))


def flat(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    return [i for word in tokenizer.words(text) for i in word]


def reference_ids(reference, texts: list[str]) -> list[list[int]]:
    return reference(texts, add_special_tokens=False)["input_ids"]


def test_known_ids(ours):
    ids, cut = ours.encode(["a photo of a cat", "", "hello world!"])
    assert ids.tolist() == [
        [49406, 320, 1125, 539, 320, 2368, 49407],
        [49406, 49407, 0, 0, 0, 0, 0],
        [49406, 3306, 1002, 256, 49407, 0, 0],
    ]
    assert (cut, ours.vocab_size, ours.eot_id) == (0, 49408, 49407)


def test_every_id_is_unique_and_decodes(ours):
    ids, ranks, symbols = bpe._tables()
    assert len(ids) == 49408
    assert sorted(ids.values()) == list(range(49408))
    assert len(ranks) == 48894
    assert len(set(symbols.values())) == 256
    assert ours.decode(ours.encode(["naïve 東京 🐈"])[0][0].tolist()) == "naïve 東京 🐈"


def test_ids_equal_transformers_on_12000_wild_strings(ours, reference):
    """Every script, emoji, control, zero-width and right-to-left characters, after the cleaning of the
    release."""
    texts = wild_strings(12_000, seed=0)
    expected = reference_ids(reference, [CLEAN(t) for t in texts])
    different = [t for t, e in zip(texts, expected, strict=True) if flat(ours, t) != e]
    assert different == []
    assert len(set(texts)) > 11_900


def test_raw_ids_equal_transformers_wherever_the_two_cleanings_agree(ours, reference):
    normalize = reference.backend_tokenizer.normalizer.normalize_str
    texts = [
        t
        for t in wild_strings(24_000, seed=1)
        if CLEAN(t) == normalize(t).strip(" ") and "\u0345" not in CLEAN(t)
    ]
    assert len(texts) >= 10_000
    different = [t for t, e in zip(texts, reference_ids(reference, texts), strict=True) if flat(ours, t) != e]
    assert different == []


# text, what the release makes of it; transformers keeps the text as it is, apart from case and white space
DIFFERENCES = {
    "curly quotes": ("the dog’s “toy”", 'the dog\'s "toy"'),
    "full width": ("ＣＡＴ！", "cat!"),
    "ligatures": ("ﬁsh and ﬂy", "fish and fly"),
    "control characters": ("c\x00a\x07t", "cat"),
    "terminal escapes": ("\x1b[31mred\x1b[0m", "red"),
    "byte order mark": ("\ufeffcat", "cat"),
    "HTML entities": ("salt &amp; pepper &amp;lt;3", "salt & pepper <3"),
    "mojibake": ("cafÃ© del mar", "café del mar"),
    "final sigma": ("ΟΔΟΣ", "οδος"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_where_transformers_cleans_differently_we_follow_the_release(ours, reference, name):
    text, cleaned = DIFFERENCES[name]
    assert CLEAN(text) == cleaned
    assert flat(ours, text) == reference_ids(reference, [cleaned])[0]
    assert flat(ours, text) != reference_ids(reference, [text])[0]


def test_case_folding_of_the_pattern_follows_the_release(ours, reference):
    """`IGNORECASE` makes the long s an s after an apostrophe, and drops the combining iota."""
    assert flat(ours, "'ſ") == ours._word("'ſ") != reference_ids(reference, ["'ſ"])[0]
    assert flat(ours, "a\u0345b") == [320, 321] != reference_ids(reference, ["a\u0345b"])[0]


def test_special_tokens_in_a_text_become_special_ids_as_in_the_release(ours, reference):
    text = "cat<|endoftext|>dog <|STARTOFTEXT|>"
    assert flat(ours, text) == [2368, 49407, 1929, 49406] == reference_ids(reference, [text.lower()])[0]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=4), st.integers(3, 80))
def test_rows_start_end_and_fit(texts, context):
    tokenizer = CLIPTokenizer()
    ids, cut = tokenizer.encode(texts, context)
    full = [flat(tokenizer, t) for t in texts]
    assert ids.shape[0] == len(texts)
    assert ids.dtype == torch.long
    assert cut == sum(len(f) > context - 2 for f in full)
    for row, body in zip(ids.tolist(), full, strict=True):
        kept = body[: context - 2]
        assert row == [49406, *kept, 49407] + [0] * (ids.shape[1] - len(kept) - 2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=80), min_size=1, max_size=3), st.integers(3, 12))
def test_chunks_hold_every_token_once_in_order(texts, context):
    tokenizer = CLIPTokenizer()
    ids, owner = tokenizer.chunks(texts, context)
    assert ids.shape[1] <= context
    assert owner.tolist() == sorted(owner.tolist())
    for i, text in enumerate(texts):
        rows = ids[owner == i].tolist()
        bodies = [row[1 : max(j for j, t in enumerate(row) if t == 49407)] for row in rows]
        assert [t for b in bodies for t in b] == flat(tokenizer, text)
        assert len(bodies) >= 1


def test_chunks_do_not_split_words(ours):
    text = "photographically speaking, an extraordinarily beautiful hippopotamus"
    words = list(ours.words(text))
    ids, _ = ours.chunks([text], 6)
    starts = {0}
    for word in words:
        starts.add(max(starts) + len(word))
    position = 0
    for row in ids.tolist():
        position += row.index(49407) - 1
        assert position in starts


def test_long_text_errors_name_the_text(ours):
    with pytest.raises(ClipworksError, match=r"text 1 is longer than the 8 tokens.*'word word.*chunk-mean"):
        ours.encode(["short", "word " * 50], 8, "error")
    assert ours.encode(["short", "word " * 50], 8)[1] == 1
    with pytest.raises(
        ClipworksError, match=r"on_long must be one of 'truncate', 'error'.*Did you mean 'truncate'"
    ):
        ours.encode(["a"], 8, "trunkate")
    with pytest.raises(ClipworksError, match="chunks"):
        ours.encode(["a"], 8, "chunk-mean")
    with pytest.raises(ClipworksError, match="context_length"):
        ours.encode(["a"], 2)
    with pytest.raises(ClipworksError, match="int at position 1"):
        ours.encode(["a", 3])


def test_hostile_texts_do_not_stop_the_tokenizer(ours):
    for text in ("\ud800", "a" * 20_000, "<|endoftext|>" * 1000, "\u0301" * 3000, "&amp;" * 5000):
        assert ours.encode([text], 77)[0].shape[1] <= 77


def word_piece(normalizer=None) -> str:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "cat", "##s", "dog", "of"]
    model = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    model.enable_truncation(5)  # what the file says of length must not limit us
    return model.to_str()


def sentence_piece() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁photo", "▁cat", "s", "▁dog", "c", "a", "t"]
    model = Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=2))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.add_special_tokens(["<pad>", "</s>"])
    model.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    return model.to_str()


def test_word_piece_tokenizer():
    tokenizer = PretrainedTokenizer(word_piece().encode())
    ids, cut = tokenizer.encode(["A photo of cats", "dog", ""], 16)
    assert ids.tolist() == [[2, 4, 5, 9, 6, 7, 3], [2, 8, 3, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0, 0]]
    assert (cut, tokenizer.pad_id, tokenizer.eot_id, tokenizer.vocab_size) == (0, 0, 3, 10)
    assert tokenizer.encode(["a photo of cats"], 5)[0].tolist() == [[2, 4, 5, 9, 3]]
    rows, owner = tokenizer.chunks(["a photo of cats", "dog"], 5)
    assert rows.tolist() == [[2, 4, 5, 9, 3], [2, 6, 7, 3, 0], [2, 8, 3, 0, 0]]
    assert owner.tolist() == [0, 0, 1]


def test_sentence_piece_tokenizer_of_siglip(tmp_path):
    (tmp_path / "tokenizer.json").write_text(sentence_piece(), encoding="utf-8")
    tokenizer = PretrainedTokenizer(
        tmp_path / "tokenizer.json", pad_id=1, clean="canonicalize", fixed_length=True
    )
    ids, cut = tokenizer.encode(["A CAT!", "a photo, cats_dog " * 5], 6)
    assert ids.tolist() == [[4, 6, 1, 1, 1, 1], [4, 5, 6, 7, 8, 1]]
    assert cut == 1
    assert tokenizer.fingerprint != PretrainedTokenizer(tmp_path / "tokenizer.json", pad_id=1).fingerprint
    again = PretrainedTokenizer(tokenizer.data, **tokenizer.options())
    assert again.fingerprint == tokenizer.fingerprint


def test_cleaners_of_siglip():
    assert common.CLEANERS["canonicalize"]("A big_Dog,  &amp; cat!") == "a big dog cat"
    assert common.CLEANERS["siglip"]("A big_Dog,  & cat!") == "a bigdog cat"


def test_pretrained_equals_the_library_on_wild_strings():
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(word_piece())
    plain.no_truncation()
    tokenizer = PretrainedTokenizer(word_piece().encode())
    texts = wild_strings(300, seed=2)
    ids, _ = tokenizer.encode(texts, 512)
    for row, text in zip(ids.tolist(), texts, strict=True):
        expected = plain.encode(text).ids
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {0}


def test_bad_tokenizer_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadWeights, match=r"tokenizer\.json cannot be read"):
        PretrainedTokenizer(tmp_path / "tokenizer.json")
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str().encode()
    with pytest.raises(BadWeights, match="pad_id"):
        PretrainedTokenizer(bare)
    with pytest.raises(ClipworksError, match=r"clean must be one of.*Did you mean 'canonicalize'"):
        PretrainedTokenizer(bare, clean="canonicalise")
    unknown = re.sub(r'("SpecialToken": ?{"id": ?)"\[CLS\]"', r'\1"[NO]"', word_piece(), count=1)
    assert "[NO]" in unknown
    with pytest.raises(BadWeights, match="cannot be read"):  # the library panics
        PretrainedTokenizer(unknown.encode())
    lacking = Tokenizer(models.Unigram([("a", -1.0)])).to_str().encode()
    with pytest.raises(BadWeights, match="no way to write these texts"):
        PretrainedTokenizer(lacking, pad_id=0, eot_id=0).encode(["b"], 8)


def test_missing_tokenizer_says_which_file():
    with pytest.raises(ClipworksError, match=r"cannot read texts\. Expected tokenizer\.json in x"):
        NoTokenizer("Expected tokenizer.json in x.", vocab_size=9, eot_id=1, pad_id=0).encode(["a"], 5)


def test_copies_and_pickles_of_clips_tokenizer_are_small_and_alike():
    import copy
    import pickle

    made = CLIPTokenizer(pad_id=7)
    text = pickle.dumps(made)
    assert len(text) < 1000
    for again in (copy.deepcopy(made), pickle.loads(text)):
        assert again.fingerprint == made.fingerprint
        assert torch.equal(again.encode(["a cat", "two dogs"])[0], made.encode(["a cat", "two dogs"])[0])
