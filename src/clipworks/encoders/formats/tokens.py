"""The tokenizer that belongs to a model: the CLIP vocabulary of the package, or `tokenizer.json` beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import BadWeights
from ..config import TextConfig
from ..tokenizers.bpe import CLIPTokenizer
from ..tokenizers.pretrained import NoTokenizer, PretrainedTokenizer
from .files import read_json

CLIP_VOCABULARY = 49408


def clip_tokenizer(text: TextConfig) -> Any:
    """CLIP's byte-pair tokenizer where the vocabulary has its size, else a stand-in that says so."""
    if text.vocab_size == CLIP_VOCABULARY:
        return CLIPTokenizer(text.pad_id)
    return _none(text, f"CLIP's vocabulary has {CLIP_VOCABULARY} tokens, this model's {text.vocab_size}.")


def tokenizer_beside(folder: Path, text: TextConfig, clean: str) -> Any:
    """The tokenizer of `tokenizer.json` in a folder, or a stand-in that says which file is missing.

    Parameters
    ----------
    folder : where the weights lie
    text : gives the end and padding ids, and whether rows have the full length (pool "last")
    clean : cleaning before the file's own rules, see `PretrainedTokenizer`

    Raises
    ------
    BadWeights
        If the file cannot be read, or has more tokens than the model.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _none(text, f"Put the tokenizer.json of the model into {folder}.")
    try:
        tokenizer = PretrainedTokenizer(
            path, pad_id=text.pad_id, eot_id=text.eot_id, clean=clean, fixed_length=text.pool == "last"
        )
    except BadWeights as error:
        raise BadWeights(f"{path}: {error}") from error
    if tokenizer.vocab_size > text.vocab_size:
        raise BadWeights(f"{path} has {tokenizer.vocab_size} tokens, the model {text.vocab_size}.")
    return tokenizer


def special_id(folder: Path, role: str) -> int | None:
    """The id of the "pad", "eos" ... token by the tokenizer files of a folder, or None if they do not say.

    `tokenizer_config.json` and `special_tokens_map.json` name the token, `tokenizer.json` numbers it.
    """
    token = None
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if token is None and (folder / file).is_file():
            token = read_json(folder / file).get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str) or not (folder / "tokenizer.json").is_file():
        return None
    try:
        record = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        numbers = {t["content"]: t["id"] for t in record.get("added_tokens", [])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadWeights(f"{folder / 'tokenizer.json'} is not a tokenizer ({error!r:.80}).") from error
    return numbers.get(token)


def _none(text: TextConfig, why: str) -> NoTokenizer:
    return NoTokenizer(why, vocab_size=text.vocab_size, eot_id=text.eot_id, pad_id=text.pad_id,
                       fixed_length=text.pool == "last")  # fmt: skip
