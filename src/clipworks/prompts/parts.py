"""Parts that methods are made of: starts of learned tensors, a prompted image tower, a frozen encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_range
from .words import phrase, word_vectors

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

STD = 0.02  # of vectors that start at random


def context_start(encoder: Encoder, context: int, init: str | None, seed: int) -> torch.Tensor:
    """A context (M, width) at its start: embeddings of words, or `context` random vectors."""
    if init is not None:
        ids = phrase(encoder, init)
        if not ids:
            raise ClipworksError(f"init must hold words. Got {init!r}.")
        return word_vectors(encoder, ids)
    check_range("context", context, 1)
    return random_vectors(context, encoder.config.text.width, seed=seed)


def linear_start(name: str, out: int, width: int, seed: int) -> dict[str, torch.Tensor]:
    """Weight (out, width) and bias (out,) of a linear map, drawn as torch draws them."""
    draw, bound = torch.Generator().manual_seed(seed), width**-0.5
    shapes = {"weight": (out, width), "bias": (out,)}
    return {f"{name}.{k}": bound * (2 * torch.rand(shape, generator=draw) - 1) for k, shape in shapes.items()}


def prompted_images(encoder: Encoder, stem: torch.Tensor, prompts: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Unit image vectors (B, dim) from kept stems, with learned tokens among the patches.

    Parameters
    ----------
    stem : what `visual.stem` gave
    prompts : layer -> (n, width), behind the class token; those of layer 0 go through the norm before the first block
        with the patches, those of a later layer take the place of what the earlier ones have become
    """
    given = {layer: value.to(encoder.dtype) for layer, value in prompts.items()}
    if 0 in given:
        given[0] = encoder.visual.norm_pre(given[0])
    found = encoder.visual(embeddings=stem, prompts=given)
    return F.normalize(found if found.dtype == torch.float64 else found.float(), dim=-1)


def layer_statistics(encoder: Encoder, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Unit vectors "image" (B, dim), "mean" and "deviation" (B, blocks, width) over the tokens after every block."""
    found = encoder.visual.run(pixels.to(encoder.dtype), output_layers=range(encoder.config.vision.depth))
    tokens = torch.stack(list(found.layers.values()), 1).float()
    image = F.normalize(found.pooled.float(), dim=-1)
    return {"image": image, "mean": tokens.mean(2), "deviation": tokens.std(2, correction=0)}


def need_tokens(method: str, encoder: Encoder) -> None:
    """Raise where the image tower has no tokens to prompt."""
    if encoder.config.vision.kind != "vit":
        raise ClipworksError(f"{method} needs an image tower with tokens. Got a {encoder.config.vision.kind}.")


def random_vectors(*shape: int, seed: int, std: float = STD) -> torch.Tensor:
    """Normal vectors from a seed, the same on every device."""
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def frozen(encoder: Encoder) -> Iterator[None]:
    """Evaluation mode, and no gradient for any weight of the encoder; everything is afterwards as it was."""
    learning = [q for q in encoder.parameters() if q.requires_grad]
    training = [m for m in encoder.modules() if m.training]
    encoder.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
