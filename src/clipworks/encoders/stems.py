"""From pixels to the first tokens of an image tower: (B, 3, H, W) to (B, width, h, w).

A stem of the name "some-name" is the class `SomeNameStem` of this module; adding one is adding a class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import check_choice

if TYPE_CHECKING:
    from .config import VisionConfig


def build_stem(config: VisionConfig) -> nn.Module:
    """The stem that `config.stem` names.

    Parameters
    ----------
    config : its `stem` is a name of this module, "patch" for `PatchStem`; `width` is the channels of the result

    Returns
    -------
    module from (B, 3, H, W) to (B, width, h, w)
    """
    known = {_name(key): value for key, value in globals().items() if key.endswith("Stem")}
    return known[check_choice("stem", config.stem, known)](config)


def _name(class_name: str) -> str:
    """PatchStem -> patch, EfficientNetLite0Stem would be spelled EfficientnetLite0Stem -> efficientnet-lite0."""
    words = class_name.removesuffix("Stem")
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in words).lstrip("-")


class PatchStem(nn.Module):
    """A linear map of every patch, written as a convolution whose stride is its size."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        size = config.patch_size
        self.projection = nn.Conv2d(3, config.width, size, stride=size, bias=config.patch_bias)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.projection(pixels)
