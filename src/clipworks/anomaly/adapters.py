"""What the detectors trained on defects of other things share: losses of maps, learned states, the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ClipworksError, check_range
from .states import bad_share

TEMPERATURE = 0.07


def focal(probability: torch.Tensor, mask: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Mean of -(1 - p_t)^gamma log p_t, p_t the probability of the truth; cross-entropy for gamma 0.

    Parameters
    ----------
    probability : of "defective", any shape
    mask : the truth, 0 or 1, same shape
    """
    right = torch.where(mask > 0.5, probability, 1 - probability).clamp(1e-6, 1)
    return -((1 - right) ** gamma * right.log()).mean()


def dice(probability: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - (2 sum p m + 1) / (sum p + sum m + 1) of each map (n, h, w), on average."""
    both, sums = (probability * mask).sum((1, 2)), (probability + mask).sum((1, 2))
    return (1 - (2 * both + 1) / (sums + 1)).mean()


def map_loss(probability: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Focal loss, Dice of the defects and Dice of the good pixels."""
    return focal(probability, mask) + dice(probability, mask) + dice(1 - probability, 1 - mask)


def states(features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Probability of the second of two unit texts, (2, dim) or (n, 2, dim), for unit features (n, ..., dim)."""
    if text.ndim == 2:
        return bad_share(features, text, 1 / TEMPERATURE)
    flat = features.flatten(1, -2) if features.ndim > 2 else features[:, None]
    found = (flat @ text.to(features).transpose(1, 2) / TEMPERATURE).softmax(-1)[..., 1]
    return found.view(features.shape[:-1])


class StatePrompts(nn.Module):
    """Learned word embeddings of the two states, in front of fixed words.

    Parameters
    ----------
    encoder : its text tower stays frozen
    tokens : learned tokens of each state
    seed : of the start values
    """

    def __init__(self, encoder: Any, tokens: int, seed: int):
        super().__init__()
        check_range("tokens", tokens, 1)
        draw = torch.Generator().manual_seed(seed)
        self.context = nn.Parameter(0.02 * torch.randn(2, tokens, encoder.config.text.width, generator=draw))

    def forward(self, encoder: Any, words: list[str], extra: torch.Tensor | None = None) -> torch.Tensor:
        """Unit vectors (2, dim) of the two states with these two endings, or (n, 2, dim) with `extra` (n, m, width)
        tokens of each image behind the learned ones."""
        ids, home = encoder.tokenize(words), self.context.device
        if extra is None:
            return encoder.encode_text(ids, prompts={0: self.context.to(encoder.device)}).to(home)
        n = len(extra)
        both = torch.cat([self.context.repeat(n, 1, 1), extra.repeat_interleave(2, 0)], 1)
        return encoder.encode_text(ids.repeat(n, 1), prompts={0: both.to(encoder.device)}).to(home).view(n, 2, -1)


def spread_layers(depth: int, count: int = 4) -> list[int]:
    """Numbers of up to `count` blocks at equal steps, the last among them.

    >>> spread_layers(24), spread_layers(12), spread_layers(3)
    ([5, 11, 17, 23], [2, 5, 8, 11], [0, 1, 2])
    """
    return sorted({max(0, round(depth * (k + 1) / count) - 1) for k in range(count)})


def check_training(images: int, masks: Any) -> torch.Tensor:
    """Return masks (n, H, W) as float 0 or 1, or raise where they do not fit the images."""
    found = torch.as_tensor(np.asarray(masks) != 0).float()
    if found.ndim != 3 or len(found) != images or not images:
        raise ClipworksError(f"masks must have the shape ({images}, H, W), one per image. Got {tuple(found.shape)}.")
    defective = found.flatten(1).amax(1) > 0
    if defective.all() or not defective.any():
        raise ClipworksError(
            f"masks must show defects in some images and none in others. Got {int(defective.sum())} "
            f"defective of {images}."
        )
    return found


def train(
    module: nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], count: int, *, epochs: int, batch_size: int,
    lr: float, seed: int,
) -> list[float]:  # fmt: skip
    """Train a module's parameters with Adam (0.5, 0.999) on batches of row numbers; returns the mean loss per epoch.

    Afterwards the module is in evaluation mode, and its norms use their running statistics.
    """
    check_range("epochs", epochs, 1)
    check_range("batch_size", batch_size, 2)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=lr, betas=(0.5, 0.999))
    module.train()
    history = []
    with torch.enable_grad():
        for _ in range(epochs):
            losses = []
            for rows in torch.randperm(count, generator=draw).split(batch_size):
                if len(rows) < 2:  # a norm has no variance of one image
                    continue
                value = loss(rows)
                optimizer.zero_grad()
                value.backward(inputs=list(module.parameters()))  # the encoder's get none
                optimizer.step()
                losses.append(value.item())
            history.append(float(np.mean(losses)))
    module.eval()
    return history
