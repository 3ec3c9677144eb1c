"""Any `tokenizer.json` model (SigLIP's sentencepiece shapes, BERT WordPiece ...) through the `tokenizers`
library.

The file says how text is cut and which special tokens stand around it; what it may not say (padding id, end
id, the cleaning that the model was trained with) is given by the weight format that the file came with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BadWeights, ClipworksError, check_choice
from . import common

if TYPE_CHECKING:
    import torch

MAX_BYTES = 256 << 20  # the largest real file (XLM-V, 900,000 pieces) has about 60 MB


class PretrainedTokenizer:
    """A tokenizer read from a `tokenizer.json` file.

    Parameters
    ----------
    source : path of the file, or its bytes
    pad_id : id that fills short rows (default: the file's own padding entry, else its `<pad>` or `[PAD]`
        token)
    eot_id : id of the end token (default: the last special token that the file puts after a text)
    clean : cleaning before the file's own rules, one of `none`, `whitespace`, `lower`, `lowercase`,
        `canonicalize` (open_clip's names; `canonicalize` is what SigLIP models of open_clip use) and `siglip`
        (transformers' SigLIP)
    fixed_length : pad every row to the whole context, as models need that read the last position (SigLIP)

    Attributes
    ----------
    prefix, suffix : special token ids before and after every text
    vocab_size, eot_id, pad_id, fingerprint : as in `CLIPTokenizer`

    Raises
    ------
    BadWeights
        If the file is not a tokenizer, or says nothing of a padding or end token and none was given.
    """

    def __init__(
        self,
        source: str | Path | bytes,
        *,
        pad_id: int | None = None,
        eot_id: int | None = None,
        clean: str = "none",
        fixed_length: bool = False,
    ):
        from tokenizers import Tokenizer

        self.clean = check_choice("clean", clean, common.CLEANERS)
        self.fixed_length = fixed_length
        self.data = source if isinstance(source, bytes) else _read(Path(source))
        try:
            self._model = Tokenizer.from_str(self.data.decode("utf-8"))
            padding = json.loads(self.data).get("padding") or {}
            self._model.no_padding()
            self._model.no_truncation()
            self.prefix, self.suffix = self._specials()
        except BaseException as error:  # the library raises bare Exception, and panics
            if not _of_library(error):
                raise
            raise BadWeights(f"tokenizer.json cannot be read: {error}") from error
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)
        self.pad_id = _first(
            pad_id, padding.get("pad_id"), *map(self._model.token_to_id, ("<pad>", "[PAD]")), what="pad_id"
        )
        self.eot_id = _first(eot_id, self.suffix[-1] if self.suffix else None, what="eot_id")
        rules = json.dumps([self.clean, self.pad_id, self.eot_id, self.fixed_length]).encode()
        self.fingerprint = f"tokenizer-json:{hashlib.sha256(self.data + rules).hexdigest()[:16]}"

    def _specials(self) -> tuple[list[int], list[int]]:
        encoded = self._model.encode("a")
        inner = [i for i, special in enumerate(encoded.special_tokens_mask) if not special]
        first, last = (inner[0], inner[-1] + 1) if inner else (0, 0)
        return encoded.ids[:first], encoded.ids[last:]

    def options(self) -> dict[str, Any]:
        """The keyword arguments that rebuild this tokenizer from its file."""
        return {
            "pad_id": self.pad_id,
            "eot_id": self.eot_id,
            "clean": self.clean,
            "fixed_length": self.fixed_length,
        }

    def _encode(self, texts: str | Sequence[str]) -> list[Any]:
        cleaned = [common.CLEANERS[self.clean](t) for t in common.as_list(texts)]
        # a lone surrogate is no Unicode text and the library refuses it
        safe = [t.encode("utf-8", errors="replace").decode("utf-8") for t in cleaned]
        try:
            return self._model.encode_batch(safe, add_special_tokens=False)
        except BaseException as error:  # as above; a file may lack what only some texts need
            if not _of_library(error):
                raise
            raise BadWeights(f"tokenizer.json has no way to write these texts: {error}") from error

    def encode(
        self, texts: str | Sequence[str], context_length: int, on_long: str = "truncate"
    ) -> tuple[torch.Tensor, int]:
        """Turn texts into token ids; parameters, result and errors as in `CLIPTokenizer.encode`.

        With `fixed_length` the rows always have `context_length` columns.
        """
        rows, cut = self.rows(texts, context_length, on_long)
        return common.pad(rows, self.pad_id, context_length if self.fixed_length else None), cut

    def rows(
        self, texts: str | Sequence[str], context_length: int, on_long: str = "truncate"
    ) -> tuple[list[list[int]], int]:
        """As `encode`, each text as a list that is not padded."""
        common.check_on_long(on_long)
        listed = common.as_list(texts)
        rows, cut = [], 0
        for i, (text, encoded) in enumerate(zip(listed, self._encode(listed), strict=True)):
            body, was_cut = common.fit(
                encoded.ids, context_length, len(self.prefix) + len(self.suffix), on_long, text, i
            )
            rows.append([*self.prefix, *body, *self.suffix])
            cut += was_cut
        return rows, cut

    def chunks(self, texts: str | Sequence[str], context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Split long texts between words; result as in `CLIPTokenizer.chunks`."""
        import torch

        space = common.room(context_length, len(self.prefix) + len(self.suffix))
        rows, owner = [], []
        for i, encoded in enumerate(self._encode(texts)):
            words: list[list[int]] = []
            last: Any = None
            for token, word in zip(encoded.ids, encoded.word_ids, strict=True):
                if word is None or word != last or not words:
                    words.append([])
                words[-1].append(token)
                last = word
            for piece in common.pieces(words, space):
                rows.append([*self.prefix, *piece, *self.suffix])
                owner.append(i)
        table = common.pad(rows, self.pad_id, context_length if self.fixed_length else None)
        return table, torch.tensor(owner, dtype=torch.long)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


class NoTokenizer:
    """Stands in where a model came without its tokenizer: images work, texts raise and say which file is
    missing."""

    fixed_length = False

    def __init__(
        self, looked_for: str, *, vocab_size: int, eot_id: int, pad_id: int, fixed_length: bool = False
    ):
        self.looked_for, self.fixed_length = looked_for, fixed_length
        self.vocab_size, self.eot_id, self.pad_id = vocab_size, eot_id, pad_id
        self.fingerprint = "none"

    def encode(
        self, texts: Any, context_length: int = 0, on_long: str = "truncate"
    ) -> tuple[torch.Tensor, int]:
        raise ClipworksError(
            f"this model came without its tokenizer, so it cannot read texts. {self.looked_for}"
        )

    def chunks(self, texts: Any, context_length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encode(texts)  # type: ignore[return-value]


def _of_library(error: BaseException) -> bool:
    """Whether the library stumbled; a panic of its own derives from BaseException, as Ctrl-C does."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _first(*candidates: int | None, what: str) -> int:
    for candidate in candidates:
        if candidate is not None:
            return int(candidate)
    raise BadWeights(f"tokenizer.json does not say its {what}; the weight format must give it.")


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise BadWeights(f"{path} has {path.stat().st_size} bytes, a tokenizer at most {MAX_BYTES}.")
    return path.read_bytes()
