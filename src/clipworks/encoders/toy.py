"""A tiny encoder with random weights: for examples and tests that need the parts of an encoder, not its knowledge."""

from __future__ import annotations

from typing import Any

from .config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from .encoder import Encoder


def toy_encoder(seed: int = 0, *, dim: int = 8, image_size: int = 16, tokenizer: Any = None, **vision: Any) -> Encoder:
    """Build a ViT of two blocks on patches of 4 pixels and a text tower of one block.

    Parameters
    ----------
    seed : of the random weights
    dim : dimensions of the joint space
    image_size : side of the images in pixels
    tokenizer : as for `Encoder`; None for one that reads token ids only
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
    return Encoder(config, tokenizer, seed=seed).eval()
