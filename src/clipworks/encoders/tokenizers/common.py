"""What both tokenizers share: turning token lists into one padded matrix, the rule for long texts, and
cleaning.

A text becomes `prefix + body + suffix` (start token, words, end token). When that is longer than the context
the body is cut so that the suffix always stays: this is what CLIP, transformers and open_clip all do.
"""

from __future__ import annotations

import html
import string
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ...errors import ClipworksError, check_choice

if TYPE_CHECKING:
    import torch

ON_LONG = ("truncate", "error")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def as_list(texts: str | Sequence[str]) -> list[str]:
    """Return a list of strings, or raise naming the first entry that is not one."""
    listed = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(listed):
        if not isinstance(text, str):
            raise ClipworksError(f"texts must be strings. Got {type(text).__name__} at position {i}.")
    return listed


def room(context_length: int, fixed: int) -> int:
    """Tokens left for the body beside `fixed` special ones."""
    if not isinstance(context_length, int) or context_length <= fixed:
        raise ClipworksError(
            f"context_length must be an integer above {fixed} (the special tokens). Got {context_length!r}."
        )
    return context_length - fixed


def fit(
    body: list[int], context_length: int, fixed: int, on_long: str, text: str, position: int
) -> tuple[list[int], bool]:
    """Cut `body` to the context; the flag says whether anything was cut. `on_long="error"` raises instead."""
    space = room(context_length, fixed)
    if len(body) <= space:
        return body, False
    if on_long == "error":
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise ClipworksError(
            f"text {position} is longer than the {context_length} tokens this encoder reads: {shown!r}. "
            "Shorten it, or pass on_long='truncate' or on_long='chunk-mean'."
        )
    return body[:space], True


def pad(rows: Sequence[Sequence[int]], pad_id: int, length: int | None = None) -> torch.Tensor:
    """Stack rows into one int64 matrix, padded on the right to `length` (default: the longest row)."""
    import torch  # here, since token lists alone do not need it

    width = length if length is not None else max((len(r) for r in rows), default=0)
    table = torch.full((len(rows), width), pad_id, dtype=torch.long)
    for i, row in enumerate(rows):
        table[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return table


def pieces(words: Iterable[Sequence[int]], space: int) -> list[list[int]]:
    """Pack whole words into pieces of at most `space` tokens; only a word longer than a piece is split.

    >>> pieces([[1, 2], [3], [4, 5, 6, 7]], 3)
    [[1, 2, 3], [4, 5, 6], [7]]
    """
    packed: list[list[int]] = [[]]
    for word in words:
        if len(packed[-1]) + len(word) > space and packed[-1]:
            packed.append([])
        packed[-1].extend(word)
        while len(packed[-1]) > space:
            packed.append(packed[-1][space:])
            packed[-2] = packed[-2][:space]
    return packed


def check_on_long(on_long: str) -> str:
    """`encode` gives one row per text, so it cannot chunk; `chunks` does."""
    if on_long == "chunk-mean":
        raise ClipworksError(
            "on_long='chunk-mean' needs several rows per text: call chunks() instead of encode()."
        )
    return check_choice("on_long", on_long, ON_LONG)


def basic_clean(text: str) -> str:
    """Repair mojibake and control characters (ftfy), resolve HTML entities twice, strip: CLIP's first
    step."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def whitespace(text: str) -> str:
    """Every run of white space becomes one space."""
    return " ".join(text.split())


def _canonicalize(text: str) -> str:
    return whitespace(basic_clean(text).replace("_", " ").translate(_NO_PUNCTUATION).lower())


def _siglip(text: str) -> str:
    return whitespace(text.lower().translate(_NO_PUNCTUATION))


# the cleaning named in an open_clip configuration ("clean") or implied by a Hugging Face tokenizer class
# ("siglip")
CLEANERS = {
    "none": lambda text: text,
    "whitespace": lambda text: whitespace(basic_clean(text)),
    "lower": lambda text: whitespace(basic_clean(text)).lower(),
    "lowercase": lambda text: text.lower(),
    "canonicalize": _canonicalize,
    "siglip": _siglip,
}
