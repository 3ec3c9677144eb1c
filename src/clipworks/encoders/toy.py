"""A tiny encoder with random weights: for examples and tests that need the parts of an encoder, not its knowledge."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from .config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from .encoder import Encoder


class ToyTokenizer:
    """A word is a number from 2 to 62 by its checksum; 1 begins a text, 63 ends it, 0 fills up."""

    pad_id, eot_id, fingerprint = 0, 63, "toy"

    def encode(self, texts: str | Sequence[str], context_length: int, on_long: str = "truncate") -> tuple[Any, int]:
        """Ids (n, longest) and how many texts were cut."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[2 + zlib.crc32(word.encode()) % 61 for word in text.split()] for text in texts]
        cut = sum(len(row) > context_length - 2 for row in rows)
        rows = [[1, *row[: context_length - 2], 63] for row in rows]
        longest = max(map(len, rows), default=1)
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows]), cut


def toy_encoder(seed: int = 0, *, dim: int = 8, image_size: int = 16, tokenizer: Any = None, **vision: Any) -> Encoder:
    """Build a ViT of two blocks on patches of 4 pixels and a text tower of one block.

    Parameters
    ----------
    seed : of the random weights
    dim : dimensions of the joint space
    image_size : side of the images in pixels
    tokenizer : as for `Encoder` with CLIP's vocabulary; None for `ToyTokenizer`
    vision : other fields of `VisionConfig`

    Examples
    --------
    >>> import torch
    >>> toy_encoder().images(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 8])
    """
    shape: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 32}
    tower = VisionConfig(**{"image_size": image_size, "patch_size": 4, **shape, **vision})
    words = {"vocab_size": 49408, "eot_id": 49407} if tokenizer else {"vocab_size": 64, "eot_id": 63}
    config = EncoderConfig(
        "toy", dim, tower, TextConfig(**{**shape, **words, "layers": 1}), PreprocessConfig(image_size)
    )
    return Encoder(config, tokenizer or ToyTokenizer(), seed=seed).eval()
