"""Words to vectors in numpy, straight from a weights file: for a single query of a process that has just begun.

Importing torch and building both towers takes longer than all the rest of a search. This reads the text tower alone,
and of its table of tokens only the rows of the query; the arithmetic is that of `text.TextTransformer`, one text at a
time, so that no padding has to be hidden. It knows this library's own format and the two ways in which most towers
read a vector (causal at the end token, or the mean of all tokens); anything else is left to `Encoder.texts`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadWeights
from .config import EncoderConfig
from .formats import safe

KEY = "clipworks"  # as in `formats.native`
KINDS = {"F32": np.float32, "F16": np.float16, "I8": np.int8}
_erf = np.frompyfunc(math.erf, 1, 1)


class QuickText:
    """The text tower of a weights file.

    Parameters
    ----------
    path : file that `save` wrote

    Raises
    ------
    BadWeights
        If the tower, or its tokenizer, is none that is known here.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries, metadata = safe.header(path)
        try:
            record = json.loads(metadata[KEY])
            config = EncoderConfig.from_dict(record["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadWeights(f"{path}: not a file of this library ({error!r:.80}).") from error
        self.config, self.dim = config.text, config.dim
        at_end = self.config.pool == "eot" and self.config.causal
        if not (at_end or (self.config.pool == "mean" and not self.config.causal)):
            raise BadWeights(f"{path}: its text tower reads a vector in another way.")
        if self.config.activation not in ("gelu", "quick_gelu"):
            raise BadWeights(f"{path}: its text tower has the activation {self.config.activation!r}.")
        if any(entry["dtype"] not in KINDS for name, entry in self.entries.items() if name.startswith("text.")):
            raise BadWeights(f"{path}: its text tower is stored in another type.")
        self.tokenizer = _tokenizer(record["tokenizer"], path)
        size = max(entry["data_offsets"][1] for entry in self.entries.values())
        self.data = np.memmap(path, np.uint8, "r", offset=path.stat().st_size - size)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit rows, float32 (N, dim), as `Encoder.texts` gives them; `ClipworksError` for a text that is too long."""
        rows, _ = self.tokenizer.rows(list(texts), self.config.context_length, "error")
        vectors = np.stack([self._encode(row) for row in rows])
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def _encode(self, tokens: list[int]) -> np.ndarray:
        config = self.config
        if config.pool == "eot":
            tokens = tokens[: tokens.index(config.eot_id) + 1]
        x = self._get("text.tokens.weight", np.array(tokens)) + self._get("text.positions")[: len(tokens)]
        x = self._norm("text.norm_embedding", x) if config.embedding_norm else x
        for layer in range(config.layers):
            name = f"text.blocks.{layer}"
            if config.norm_order == "post":
                x = self._norm(f"{name}.norm1", x + self._attention(f"{name}.attention", x))
                x = self._norm(f"{name}.norm2", x + self._mlp(f"{name}.mlp", x))
            else:
                x = x + self._attention(f"{name}.attention", self._norm(f"{name}.norm1", x))
                x = x + self._mlp(f"{name}.mlp", self._norm(f"{name}.norm2", x))
        x = self._norm("text.norm", x) if config.norm_final else x
        pooled = x[-1:] if config.pool == "eot" else x.mean(0, keepdims=True)
        return (self._linear("text.projection", pooled) if config.projection else pooled)[0]

    def _attention(self, name: str, x: np.ndarray) -> np.ndarray:
        heads, length = self.config.heads, len(x)
        q, k, v = (self._linear(f"{name}.{part}", x).reshape(length, heads, -1).transpose(1, 0, 2) for part in "qkv")
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        if self.config.causal:
            scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self._linear(f"{name}.out", (weights @ v).transpose(1, 0, 2).reshape(length, -1))

    def _mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        x = self._linear(f"{name}.up", x)
        if self.config.activation == "gelu":
            x = 0.5 * x * (1 + np.asarray(_erf(x / math.sqrt(2)), np.float32))
        else:
            x = x / (1 + np.exp(-1.702 * x))
        return self._linear(f"{name}.down", x)

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x @ self._get(f"{name}.weight").T
        return x + self._get(f"{name}.bias") if f"{name}.bias" in self.entries else x

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.norm_eps)
        return x * self._get(f"{name}.weight") + self._get(f"{name}.bias")

    def _get(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """A tensor, or some of its rows, in float32; eight bits times the scale of their row."""
        values = self._stored(name)
        values = values if rows is None else values[rows]
        if values.dtype != np.int8:
            return np.asarray(values, np.float32)
        scale = self._stored(f"{name}.scale")
        return np.asarray(values, np.float32) * (scale if rows is None else scale[rows])[:, None]

    def _stored(self, name: str) -> np.ndarray:
        if name not in self.entries:
            raise BadWeights(f"{self.path}: lacks {name}.")
        entry = self.entries[name]
        begin, end = entry["data_offsets"]
        return self.data[begin:end].view(KINDS[entry["dtype"]]).reshape(entry["shape"])


def _tokenizer(record: Any, path: Path) -> Any:
    kind = (record or {}).get("kind")
    if kind == "clip-bpe":
        from .tokenizers.bpe import CLIPTokenizer

        return CLIPTokenizer(int(record["pad_id"]))
    if kind == "json":
        from .tokenizers.pretrained import PretrainedTokenizer

        return PretrainedTokenizer(record["file"].encode("utf-8"), **record["options"])
    raise BadWeights(f"{path}: its tokenizer is of another kind.")
