"""What several recipes share: modules of their own, several views of one decoded image, un-projected features."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..encoders.layers import TowerOutput, masked_mean
from ..errors import ClipworksError
from ..training.augment import Augment, open_image
from ..training.recipe import ContrastiveRecipe

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder


class ModuleRecipe(nn.Module):
    """A recipe with trained or slow modules of its own, around a plain contrastive one.

    Subclasses build their modules in `build`, which is called once the encoder is known, under `seed`.

    Parameters
    ----------
    plain : the contrastive part: caption, tokens, loss
    seed : of the start of the modules
    """

    split = True

    def __init__(self, plain: ContrastiveRecipe, seed: int = 0):
        super().__init__()
        self.plain, self.seed = plain, seed

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must share: the numbers, words and views that the recipe was made with."""
        names = [n for n in inspect.signature(type(self).__init__).parameters if n in vars(self)]
        own = {n: getattr(self, n) for n in names}
        plain = {n: v if isinstance(v, int | float | str | None) else repr(v) for n, v in own.items()}
        return {**self.plain.settings, **plain}

    def bind(self, encoder: Encoder, pool: Executor | None) -> None:
        """Take the encoder's tokenizer and preprocessing, and build the modules."""
        self.plain.bind(encoder, pool)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.build(encoder)

    def build(self, encoder: Encoder) -> None:
        """Make the modules for this encoder."""

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return self.plain.features(encoder, batch)

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.plain.losses(features)

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return self.losses(self.features(encoder, batch))

    def views(
        self, items: Sequence[Item], draws: Sequence[np.random.Generator], augments: Sequence[Augment]
    ) -> list[torch.Tensor]:
        """Return one batch of normalised pixels per augmentation, every image decoded once."""
        preprocess = self.plain.bound.preprocess
        size, interpolation = preprocess.config.size, preprocess.config.interpolation

        def make(item: Item, draw: np.random.Generator) -> list[torch.Tensor]:
            image = open_image(item, preprocess)
            return [preprocess.normalize(np.asarray(a(image, size, draw, interpolation))) for a in augments]

        run = map if self.plain.pool is None else self.plain.pool.map
        return [torch.stack(list(view)) for view in zip(*run(make, items, draws), strict=True)]


def head(width: int, hidden: int, out: int, layers: int) -> nn.Sequential:
    """Linear, batch norm, ReLU; ...; linear, as the self-supervised heads and projectors have it.

    Parameters
    ----------
    width, hidden, out : channels in, between and out
    layers : number of linear layers
    """
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*parts, nn.Linear(width, out))


def unprojected(visual: Any, output: TowerOutput) -> torch.Tensor:
    """Return the image feature before the projection into the joint space, (B, width).

    It is the class token, else the mean of the patches; an attention pool is a part of the projection.
    """
    x = visual.norm_post(output.tokens)
    return x[:, 0] if output.class_token else masked_mean(x[:, output.prefix :], None)


def need_vit(encoder: Encoder, what: str, class_token: bool = False) -> None:
    """Raise unless the image tower is a transformer (with a class token, if that is needed)."""
    vision = encoder.config.vision
    if vision.kind != "vit":
        raise ClipworksError(f"{what} needs an image tower of kind 'vit'. Got {vision.kind!r}.")
    if class_token and not vision.class_token:
        raise ClipworksError(f"{what} needs an image tower with a class token. This one has none.")


def unprojected_text(text: Any, tokens: torch.Tensor, output: TowerOutput) -> torch.Tensor:
    """Return the text feature before the projection into the joint space, (B, width), from what `text.run` gave."""
    x, config = text.norm(output.tokens), text.config
    if config.pool == "eot":
        return x[torch.arange(len(x), device=x.device), text.end(tokens)]
    if config.pool in ("first", "last"):
        return x[:, 0 if config.pool == "first" else -1]
    seen = tokens[:, : x.shape[1]] != config.pad_id if config.mask_padding else None
    return masked_mean(x, seen)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, decay: float) -> None:
    """Move the parameters of a slow copy towards those of the module: slow <- decay slow + (1 - decay) fast."""
    for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
        old.mul_(decay).add_(new, alpha=1 - decay)
