"""CLIP's tokenizer: lower-cased byte-pair encoding with 49,408 tokens, ids as in OpenAI's release.

Text is repaired (ftfy), HTML entities are resolved, white space is squeezed, everything is lower-cased; a
regular expression cuts it into words; each word's UTF-8 bytes become symbols that are joined pair by pair in
the learned order. Learning Transferable Visual Models From Natural Language Supervision (Radford et al.
2021), section 2.4; byte-pair encoding: Sennrich et al. 2016.

Where `transformers.CLIPTokenizer` cleans differently (it normalises to NFC and lower-cases letter by letter,
but repairs nothing), this follows the OpenAI release; docs/weights.md lists the differences.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import regex

from . import common

if TYPE_CHECKING:
    import torch

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
MERGES = 49152 - 256 - 2  # merges of the file that CLIP uses; the file holds more
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# the two special tokens, English contractions, runs of letters, single digits, runs of anything else but
# white space
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


def byte_symbols() -> dict[int, str]:
    """One printable character per byte, in the order of the token ids 0 to 255.

    Printable Latin-1 bytes stand for themselves and come first; the 68 others take the characters from U+0100
    on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.lru_cache(maxsize=1)
def _tables() -> tuple[dict[str, int], dict[tuple[str, str], int], dict[int, str]]:
    """(token -> id, pair -> rank, byte -> symbol), read once from the shipped vocabulary."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode("utf-8").split("\n")
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : MERGES + 1])]
    symbols = byte_symbols()
    alphabet = list(symbols.values())
    tokens = alphabet + [s + WORD_END for s in alphabet] + [a + b for a, b in merges] + [START, END]
    return {t: i for i, t in enumerate(tokens)}, {pair: rank for rank, pair in enumerate(merges)}, symbols


def _join(word: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Join symbols: again and again, all occurrences (left to right) of the pair that was learned first."""
    while len(word) > 1:
        best = min(itertools.pairwise(word), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, i = [], 0
        while i < len(word):
            if i + 1 < len(word) and (word[i], word[i + 1]) == best:
                joined.append(word[i] + word[i + 1])
                i += 2
            else:
                joined.append(word[i])
                i += 1
        word = joined
    return word


class CLIPTokenizer:
    """The tokenizer of OpenAI, LAION, MetaCLIP (English) and DFN models.

    Parameters
    ----------
    pad_id : id that fills the row after the end token. 0 as in OpenAI's release and open_clip; it never
        reaches the features, since attention is causal and the end token is what is read.

    Attributes
    ----------
    vocab_size : 49408
    start_id, eot_id : 49406 and 49407
    fingerprint : hash of vocabulary and rules, part of an encoder's fingerprint

    Examples
    --------
    >>> ids, cut = CLIPTokenizer().encode(["a photo of a cat", "Hi!"], 77)
    >>> ids.tolist(), cut
    ([[49406, 320, 1125, 539, 320, 2368, 49407], [49406, 1883, 256, 49407, 0, 0, 0]], 0)
    """

    fixed_length = False  # rows may be as short as the longest text of the batch

    def __init__(self, pad_id: int = 0):
        self._ids, self._ranks, self._symbols = _tables()
        self._cache: dict[str, list[int]] = {}
        self.vocab_size = len(self._ids)
        self.start_id, self.eot_id = self._ids[START], self._ids[END]
        self.pad_id = pad_id
        digest = hashlib.sha256(VOCABULARY.read_bytes() + WORDS.pattern.encode()).hexdigest()
        self.fingerprint = f"clip-bpe:{digest[:16]}:pad{pad_id}"

    def __reduce__(self) -> tuple[type, tuple[int]]:
        """Copies and pickles are made anew: the tables are the package's, and copying them takes half a second."""
        return type(self), (self.pad_id,)

    def words(self, text: str) -> Iterator[list[int]]:
        """Token ids word by word (lazily: a text of a megabyte costs no more than what is read of it)."""
        for match in WORDS.finditer(common.CLEANERS["lower"](text)):
            yield self._word(match.group())

    def _word(self, word: str) -> list[int]:
        known = self._cache.get(word)
        if known is not None:
            return known
        if word in (START, END):
            ids = [self._ids[word]]
        else:
            symbols = [self._symbols[b] for b in word.encode("utf-8", errors="replace")]
            symbols[-1] += WORD_END
            ids = [self._ids[s] for s in _join(symbols, self._ranks)]
        if len(self._cache) < 50_000 and len(word) < 64:  # bounded: untrusted texts must not fill the memory
            self._cache[word] = ids
        return ids

    def encode(
        self, texts: str | Sequence[str], context_length: int = 77, on_long: str = "truncate"
    ) -> tuple[torch.Tensor, int]:
        """Turn texts into token ids.

        Parameters
        ----------
        texts : one string or a list of N
        context_length : most tokens per text, start and end included
        on_long : "truncate" cuts the words and keeps the end token; "error" raises

        Returns
        -------
        (ids, truncated) : int64 tensor (N, L), L the longest row, and how many texts were cut

        Raises
        ------
        ClipworksError
            For entries that are not strings, and for a long text with `on_long="error"`.
        """
        rows, cut = self.rows(texts, context_length, on_long)
        return common.pad(rows, self.pad_id), cut

    def rows(
        self, texts: str | Sequence[str], context_length: int = 77, on_long: str = "truncate"
    ) -> tuple[list[list[int]], int]:
        """As `encode`, each text as a list that is not padded."""
        common.check_on_long(on_long)
        rows, cut = [], 0
        for i, text in enumerate(common.as_list(texts)):
            body: list[int] = []
            for word in self.words(text):
                body.extend(word)
                if len(body) > context_length:
                    break  # enough to know that it is too long
            body, was_cut = common.fit(body, context_length, 2, on_long, text, i)
            rows.append([self.start_id, *body, self.eot_id])
            cut += was_cut
        return rows, cut

    def chunks(
        self, texts: str | Sequence[str], context_length: int = 77
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Split long texts between words into rows of at most `context_length` tokens.

        Returns
        -------
        (ids, owner) : int64 tensors (M, L) and (M,); `owner[j]` is the text that row j belongs to, in order
        """
        import torch

        space = common.room(context_length, 2)
        rows, owner = [], []
        for i, text in enumerate(common.as_list(texts)):
            for piece in common.pieces(self.words(text), space):
                rows.append([self.start_id, *piece, self.eot_id])
                owner.append(i)
        return common.pad(rows, self.pad_id), torch.tensor(owner, dtype=torch.long)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out and unknown bytes become the replacement
        character."""
        names = {i: t for t, i in self._ids.items()}
        byte = {s: b for b, s in self._symbols.items()}
        joined = "".join(names[int(i)] for i in ids if int(i) not in (self.start_id, self.eot_id))
        parts = joined.split(WORD_END)
        return " ".join(
            bytes(byte[c] for c in part).decode("utf-8", errors="replace") for part in parts
        ).strip()
