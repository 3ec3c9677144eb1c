"""A sentence with places for learned words."""

from __future__ import annotations

import torch

from ..encoders.encoder import Encoder
from ..errors import ClipworksError
from ..prompts.words import phrase


def slotted(encoder: Encoder, before: str, count: int = 0, after: str = "") -> tuple[torch.Tensor, int, int]:
    """Return the tokens (1, L) of a sentence, where its `count` places begin, and the place behind its last word.

    Parameters
    ----------
    encoder : whose tokenizer reads it
    before, after : words around the places
    count : places for learned words

    Raises
    ------
    ClipworksError
        If the words do not stand apart from the places, or are too many for the context.
    """
    text = " ".join([before, *["*"] * count, after]).strip()
    row, inner = encoder.tokenize(text)[0], phrase(encoder, text)
    first, last = phrase(encoder, before), phrase(encoder, after)
    if inner[: len(first)] != first or len(inner) != len(first) + count + len(last):
        raise ClipworksError(f"the sentence must leave room for {count} words of their own in {encoder.context_length} "
                             f"tokens. Got {text!r}.")  # fmt: skip
    ids = row.tolist()
    start = next(i for i in range(len(ids)) if ids[i : i + len(inner)] == inner)
    return row[None], start + len(first), start + len(inner)
