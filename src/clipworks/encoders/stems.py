"""From pixels to the first tokens of an image tower: (B, 3, H, W) to (B, width, h, w).

A stem is a public function of this module that builds one; adding a stem is adding a function, whose name (with
hyphens for underscores) is then a value of `VisionConfig.stem`.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ClipworksError, check_choice
from .efficientnet import EfficientNetLiteStem

if TYPE_CHECKING:
    from .config import VisionConfig


def build_stem(config: VisionConfig) -> nn.Module:
    """The stem that `config.stem` names.

    Parameters
    ----------
    config : `stem` is the name, `width` the channels of the result, `patch_size` the pixels per token

    Returns
    -------
    module from (B, 3, H, W) to (B, width, h, w)

    Raises
    ------
    ClipworksError
        If there is no stem of that name.
    """
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    own = {name.replace("_", "-"): f for name, f in functions if f.__module__ == __name__ and name[0] != "_"}
    del own["build-stem"]
    return own[check_choice("vision.stem", config.stem, own)](config)


def patch(config: VisionConfig) -> nn.Module:
    """The linear patch embedding of every CLIP and SigLIP."""
    return PatchStem(config.width, config.patch_size, config.patch_bias)


def efficientnet_lite0(config: VisionConfig) -> nn.Module:
    """Feature map of EfficientNet-Lite0, one token per 32 pixels."""
    return _efficientnet(config, "lite0")


def efficientnet_lite2(config: VisionConfig) -> nn.Module:
    """Feature map of EfficientNet-Lite2, one token per 32 pixels."""
    return _efficientnet(config, "lite2")


def _efficientnet(config: VisionConfig, size: str) -> nn.Module:
    if config.patch_size != 32:
        raise ClipworksError(f"vision.patch_size must be 32 with the stem {config.stem!r}. Got {config.patch_size}.")
    return EfficientNetLiteStem(config.width, size)


class PatchStem(nn.Module):
    """A linear map of every patch, written as a convolution whose stride is its size; what is left over at the right
    and bottom is not seen (SigLIP at 384 with patches of 14)."""

    def __init__(self, width: int, size: int, bias: bool):
        super().__init__()
        self.projection = nn.Conv2d(3, width, size, stride=size, bias=bias)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        side, weight = self.projection.kernel_size[0], self.projection.weight
        rows, columns = (n // side for n in pixels.shape[-2:])
        cells = pixels[..., : rows * side, : columns * side].reshape(-1, 3, rows, side, columns, side)
        # as one product: with half-precision weights four times as fast on a CPU as the convolution, bit for bit the
        # same layout as the tokens
        x = F.linear(cells.permute(0, 2, 4, 1, 3, 5).flatten(3), weight.flatten(1), self.projection.bias)
        return x.permute(0, 3, 1, 2)
