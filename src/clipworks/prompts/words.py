"""Class sentences in which some tokens are learned vectors: how they are laid out, encoded, and cut short.

    [start] v_1 ... v_M [name] . [end]         position "end"; "front" and "middle" move the name

A sentence is cut at its end token. Where a text tower looks backwards only (CLIP), all sentences that begin with the
same vectors share that beginning: it is computed once, and the names behind it are packed into rows of about 200
tokens, each name seeing the beginning and itself. A class then costs the four or five tokens of its name in the place
of 77, with the same vector to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..encoders.layers import wide
from ..errors import ClipworksError, check_choice

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

POSITIONS = ("end", "middle", "front")
ROW = 192  # tokens of names packed behind one beginning


@dataclass
class Sentences:
    """One sentence per class, as token ids with slots for learned vectors.

    Attributes
    ----------
    encoder : whose text tower reads them
    ids : int64 (C, L), padded on the right; anything where a learned vector stands
    slots : int64 (C, L), number of the learned vector, -1 for words
    lengths : int64 (C,), tokens up to the end token
    shared : how many tokens at the beginning are the same in all sentences
    """

    encoder: Encoder
    ids: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    shared: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def packs(self) -> bool:
        """Whether the common beginning can be computed once: no token of it may see what follows."""
        config = self.encoder.config.text
        return config.causal and config.pool == "eot" and self.shared > 0

    def tokens_per_class(self) -> int:
        """Tokens that a further class adds to a batch, at most."""
        return int(self.lengths.max()) - self.shared if self.packs else self.ids.shape[1]

    def encode(
        self,
        contexts: torch.Tensor,
        rows: torch.Tensor | None = None,
        deep: Mapping[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Encode every class with every one of K contexts, with gradients.

        Parameters
        ----------
        contexts : (K, M, width) vectors for the slots; M = 0 for sentences of words alone
        rows : int64 (c,), classes wanted (default: all)
        deep : layer from 1 on -> (M, width), that block's input in the place of what the context has become; only for
            a context directly behind the start token

        Returns
        -------
        unit rows (K, c, dim)
        """
        rows = torch.arange(len(self), device=self.ids.device) if rows is None else rows
        if self.packs and len(rows) > 1:
            return self._packed(contexts, rows, deep or {})
        ids, slots, lengths = self._part(rows)
        words = self.encoder.text.tokens(ids).expand(len(contexts), *ids.shape, -1)
        if contexts.shape[1]:
            learned = contexts.to(words.dtype)[:, slots.clamp(min=0)]
            words = torch.where(slots[..., None] >= 0, learned, words)
        found = self._run(words.flatten(0, 1), lengths.repeat(len(contexts)), deep or {})
        return found.unflatten(0, (len(contexts), len(rows)))

    def encode_own(self, contexts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Encode classes (c,) each with its own context (c, M, width): unit rows (c, dim)."""
        ids, slots, lengths = self._part(rows)
        words = self.encoder.text.tokens(ids)
        index = slots.clamp(min=0)[..., None].expand(-1, -1, contexts.shape[2])
        words = torch.where(slots[..., None] >= 0, contexts.to(words.dtype).gather(1, index), words)
        return self._run(words, lengths, {})

    def _part(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, slots and lengths of some classes, cut at the longest of them unless the last position is read."""
        lengths = self.lengths[rows]
        last = self.ids.shape[1] if self.encoder.config.text.pool == "last" else int(lengths.max())
        return self.ids[rows, :last], self.slots[rows, :last], lengths

    def _run(self, words: torch.Tensor, lengths: torch.Tensor, deep: Mapping[int, torch.Tensor]) -> torch.Tensor:
        rest, prompts = self._behind_start(words, deep)
        lengths, mask = lengths - (words.shape[1] - rest.shape[1]), None
        if self.encoder.config.text.mask_padding:
            mask = torch.arange(rest.shape[1], device=words.device) < lengths[:, None]
        return self.encoder.encode_text(embeddings=rest, eot=lengths - 1, mask=mask, prompts=prompts)

    def _behind_start(
        self, words: torch.Tensor, deep: Mapping[int, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Words without the context, and the context of every layer, as the tower takes them; as it is if not deep."""
        if not deep:
            return words, {}
        slots = int(self.slots.max()) + 1
        return torch.cat([words[:, :1], words[:, 1 + slots :]], 1), {0: words[:, 1 : 1 + slots], **deep}

    def _packed(self, contexts: torch.Tensor, rows: torch.Tensor, deep: Mapping[int, torch.Tensor]) -> torch.Tensor:
        text, many, begin = self.encoder.text, len(contexts), self.shared
        plan = _Plan(self.lengths[rows].tolist(), begin, self.ids.device)
        ids = torch.full(plan.owner.shape, self.encoder.config.text.eot_id, device=self.ids.device)
        ids[plan.row, plan.column] = self.ids[rows[plan.source], plan.position]
        first = text.tokens(self.ids[:1, :begin]).expand(many, -1, -1)
        if contexts.shape[1]:
            slots = self.slots[0, :begin]
            first = torch.where(slots[:, None] >= 0, contexts.to(first.dtype)[:, slots.clamp(min=0)], first)
        names = text.tokens(ids[:, begin:]).expand(many, -1, -1, -1)
        words = torch.cat([first[:, None].expand(-1, len(ids), -1, -1), names], dim=2)
        words = (words + text.positions[plan.places].to(words.dtype)).flatten(0, 1)

        def rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
            logits = (wide(q) * q.shape[-1] ** -0.5) @ wide(k).transpose(-2, -1)
            return (logits.unflatten(0, (many, -1)) + plan.hidden.to(logits.dtype)).softmax(-1).flatten(0, 1)

        none = text.positions.new_zeros(words.shape[1], words.shape[2])  # the positions are in the words already
        rest, prompts = self._behind_start(words, deep)
        tokens = text.run(
            embeddings=rest, eot=plan.owner.new_zeros(len(words)), positions=none, prompts=prompts,
            attention=dict.fromkeys(range(len(text.blocks)), rule),
        ).tokens.unflatten(0, (many, -1))  # fmt: skip
        ends = tokens[:, plan.end_row, plan.end_column]
        found = text.project(ends)
        return F.normalize(found if found.dtype == torch.float64 else found.float(), dim=-1)


class _Plan:
    """Where every token of every name goes: rows of `begin` shared tokens and about ROW tokens of names.

    Attributes
    ----------
    source, position -> row, column : tokens of names, by class and place in its sentence, and where they are put
    owner, places : (rows, T) class of every token (-1 in the beginning), and its place in its own sentence
    hidden : (rows, 1, T, T), 0 where a token sees another and minus infinity elsewhere
    end_row, end_column : where the end token of every class is
    """

    def __init__(self, lengths: Sequence[int], begin: int, device: torch.device):
        source: list[int] = []
        position: list[int] = []
        row: list[int] = []
        column: list[int] = []
        ends, number, used = [], 0, begin
        for index, length in enumerate(lengths):
            size = length - begin
            if used > begin and used + size > begin + ROW:
                number, used = number + 1, begin
            source += [index] * size
            position += range(begin, length)
            row += [number] * size
            column += range(used, used + size)
            used += size
            ends.append((number, used - 1))
        self.source, self.position, self.row, self.column = torch.tensor([source, position, row, column], device=device)
        self.end_row, self.end_column = torch.tensor(ends, device=device).T
        total = int(self.column.max()) + 1
        owner = torch.full((number + 1, total), len(lengths), device=device)  # what is left over sees the beginning
        places = torch.zeros_like(owner)
        owner[:, :begin], places[:, :begin] = -1, torch.arange(begin, device=device)
        owner[self.row, self.column], places[self.row, self.column] = self.source, self.position
        seen = (owner[:, None] == -1) | (owner[:, None] == owner[:, :, None])
        seen &= torch.ones(total, total, dtype=torch.bool, device=device).tril()
        self.owner, self.places = owner, places
        self.hidden = torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)[:, None]


def class_sentences(
    encoder: Encoder, names: Sequence[str], slots: int = 0, position: str | int = "end", words: Sequence[int] = ()
) -> Sentences:
    """Lay out one sentence per class name: learned vectors, fixed words, the name and a full stop.

    Parameters
    ----------
    encoder : its tokenizer and text tower decide the layout
    names : C class names; underscores become spaces
    slots : number of learned vectors
    position : of the name among them, "end", "middle" or "front", or how many of them stand before it
    words : token ids of fixed words between the learned vectors and the name

    Raises
    ------
    ClipworksError
        If a sentence is longer than the context.
    """
    check_choice("position", position, (*POSITIONS, *range(slots + 1)))
    head, tail = _frame(encoder)
    before = {"end": slots, "middle": slots // 2, "front": 0}[position] if isinstance(position, str) else position
    sentences = []
    for name in names:
        name = name.replace("_", " ")
        body, bare = phrase(encoder, f"{name}."), len(phrase(encoder, name))
        learned = [(0, i) for i in range(slots)]
        spoken = [[(i, -1) for i in part] for part in (head, words, body[:bare], body[bare:], tail)]
        row = [*spoken[0], *learned[:before], *spoken[1], *spoken[2], *learned[before:], *spoken[3], *spoken[4]]
        if len(row) > encoder.context_length:
            raise ClipworksError(
                f"context must leave room for the names: with {slots} learned vectors {name!r} takes {len(row)} "
                f"tokens, and the encoder reads {encoder.context_length}."
            )
        sentences.append(row)
    lengths = torch.tensor([len(row) for row in sentences])
    width = encoder.context_length if encoder.config.text.pool == "last" else int(lengths.max())
    padding = (encoder.config.text.pad_id, -1)
    table = torch.tensor([row + [padding] * (width - len(row)) for row in sentences], device=encoder.device)
    shared = len(head) + slots + len(words) if position in ("end", slots) else 0
    return Sentences(encoder, table[..., 0], table[..., 1], lengths.to(encoder.device), shared)


def phrase(encoder: Encoder, text: str) -> list[int]:
    """Token ids of a text without the tokens that the tokenizer puts around it."""
    head, _ = _frame(encoder)
    row = _ids(encoder, text)
    return row[len(head) : _end(encoder, row, len(head))]


def word_vectors(encoder: Encoder, ids: Sequence[int]) -> torch.Tensor:
    """Embeddings (n, width) of token ids, float32."""
    found = encoder.text.tokens.weight.detach()[torch.tensor(list(ids), device=encoder.device)]
    return found if found.dtype == torch.float64 else found.float()


def _frame(encoder: Encoder) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and behind every text (one end token, no padding)."""
    row = _ids(encoder, "")
    end = _end(encoder, row, 0)
    return row[:end], row[end : end + 1] if encoder.tokenizer.eot_id in row else []


def _ids(encoder: Encoder, text: str) -> list[int]:
    if encoder.tokenizer is None:
        raise ClipworksError("encoder must have a tokenizer, or class names cannot be read. This one has none.")
    return encoder.tokenizer.encode([text], encoder.context_length)[0][0].tolist()


def _end(encoder: Encoder, row: list[int], start: int) -> int:
    """Where the end token stands, or else the padding, or else the end of the row."""
    for token in (encoder.tokenizer.eot_id, encoder.tokenizer.pad_id):
        if token in row[start:]:
            return row.index(token, start)
    return len(row)
