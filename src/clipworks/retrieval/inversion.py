"""What both directions of modality inversion share: a batch of start tokens, and AdamW on each of them alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import check_range
from ..prompts.parts import frozen, random_vectors
from ..zeroshot.sentences import as_vectors

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


@dataclass
class Inverted:
    """Vectors brought to the other modality.

    Attributes
    ----------
    vectors : unit rows (n, dim), float32
    tokens : what was learned, (n, R, width)
    losses : 1 - cosine with the vector that was inverted, at every step and at the end, (n, steps + 1)
    """

    vectors: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray


def invert(
    features: Any,
    encoder: Encoder,
    encode: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, int],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
) -> Inverted:
    """Learn tokens (R, width) for every vector so that `encode` of them points where the vector does.

    All vectors of a batch share one start, and their losses are added, not averaged: with AdamW, whose state is each
    number's own, what is learned for a vector does not depend on those beside it.
    """
    rows = torch.from_numpy(as_vectors("features", features, encoder.dim))
    check_range("steps", steps, 0)
    check_range("lr", lr, 0.0)
    check_range("batch_size", batch_size, 1)
    start = random_vectors(*shape, seed=seed).to(encoder.device)
    parts: list[tuple[torch.Tensor, ...]] = []
    with frozen(encoder), torch.enable_grad():
        for some in rows.to(encoder.device).split(batch_size) if len(rows) else ():
            tokens = start.repeat(len(some), 1, 1).requires_grad_()
            optimizer = torch.optim.AdamW([tokens], lr=lr, weight_decay=weight_decay)
            losses = []
            for _ in range(steps):
                loss = 1 - (encode(tokens) * some).sum(1)
                (gradient,) = torch.autograd.grad(loss.sum(), [tokens])
                tokens.grad = gradient
                optimizer.step()
                losses.append(loss.detach())
            with torch.no_grad():
                found = encode(tokens)
            losses.append(1 - (found * some).sum(1))
            parts.append((found.float(), tokens.detach().float(), torch.stack(losses, 1)))
    if not parts:
        return Inverted(*(np.empty(s, np.float32) for s in ((0, encoder.dim), (0, *shape), (0, steps + 1))))
    return Inverted(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))
