"""Which patches belong together, as another model sees it: features on a grid of their own, from any provider.

A provider is "own" (the tower's own convolutional stem, at 16 pixels a cell; without one, what its last block is
given), the name of a vision model for transformers ("hf:facebook/dino-vitb16"), or any function from images
(B, 3, H, W), RGB in [0, 1], to features (B, channels, rows, columns).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ClipworksError, need
from .common import Hidden

SIDE = 16  # pixels of a cell of the own stem's map

Provider = Callable[[torch.Tensor], torch.Tensor]


def provider(affinity: str | Provider) -> str | Provider:
    """A function for a name; "own" stays as it is."""
    if callable(affinity) or affinity == "own":
        return affinity
    if isinstance(affinity, str) and affinity.startswith("hf:"):
        return VisionModel(affinity[3:])
    raise ClipworksError(f"affinity must be 'own', 'hf:organisation/name' or a function. Got {affinity!r}.")


def pretrained(kind: Any, name: str, wanted: str, **options: Any) -> Any:
    """A model of transformers from safetensors only; `kind` is its class, `wanted` what it is for."""
    try:
        return kind.from_pretrained(name, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ClipworksError(f"{wanted} must be a name on the hub or a folder that transformers can load, with weights "
                             f"in safetensors. Got {name!r}: {reason}") from error  # fmt: skip


def features_of(affinity: str | Provider, hidden: Hidden) -> torch.Tensor:
    """Features (B, rows, columns, channels) on a grid that has a whole number of cells for each patch."""
    if not isinstance(affinity, str):
        maps = affinity(hidden.images)
        if not isinstance(maps, torch.Tensor) or maps.ndim != 4 or len(maps) != len(hidden.images):
            raise ClipworksError(f"affinity must give features ({len(hidden.images)}, channels, rows, columns).")
    elif hidden.maps:
        maps = hidden.maps[min(hidden.maps)]
    else:
        maps = hidden.inputs[-1][:, hidden.prefix :].transpose(1, 2).unflatten(2, hidden.grid)
    fine = max(1, round(maps.shape[-2] / hidden.grid[0]))
    size = (hidden.grid[0] * fine, hidden.grid[1] * fine)
    if tuple(maps.shape[-2:]) != size:
        maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1)


class VisionModel:
    """Patch features of a vision transformer that transformers can load (DINO, DINOv2 ...).

    Parameters
    ----------
    name : on the hub, or a folder; weights are read from safetensors only
    """

    def __init__(self, name: str):
        transformers = need("transformers", "teachers")
        self.name = name
        self.model = pretrained(transformers.AutoModel, name, "a vision model").eval().requires_grad_(False)
        try:
            settings: Any = transformers.AutoImageProcessor.from_pretrained(name)
            self.mean, self.std = tuple(settings.image_mean), tuple(settings.image_std)
        except OSError:  # a folder of weights alone
            self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        size = self.model.config.patch_size
        self.patch = int(size if isinstance(size, int) else size[0])

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), RGB in [0, 1], to (B, channels, H / patch, W / patch)."""
        rows, columns = (max(1, round(n / self.patch)) for n in images.shape[-2:])
        size = (rows * self.patch, columns * self.patch)
        if tuple(images.shape[-2:]) != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        how = {"interpolate_pos_encoding": True} if self.model.config.model_type in ("vit", "dinov2") else {}
        hidden = self.model(pixel_values=((images - mean) / std).float(), **how).last_hidden_state
        return hidden[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
