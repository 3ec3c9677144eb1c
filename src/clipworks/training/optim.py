"""Which parameters learn, how fast, and which are pulled towards zero."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ClipworksError, check_range, closest

BETAS = {"vit": ((0.9, 0.98), 1e-6), "resnet": ((0.9, 0.999), 1e-8)}  # open_clip's, by the kind of image tower
_BLOCK = re.compile(r"(?:^|\.)(visual|text)\.(?:blocks\.(\d+)|layers\.(\d+)\.(\d+))\.")
_FRONT = re.compile(r"(?:^|\.)(visual|text)\.(stem|class_token|positions|norm_pre|conv\d|bn\d|tokens|norm_embedding)\b")


def freeze(module: nn.Module, patterns: str | Sequence[str], prefix: str = "") -> list[str]:
    """Switch off the gradient of every parameter whose name matches one of the patterns.

    Parameters
    ----------
    module : the module
    patterns : shell patterns on parameter names, for example "visual.*", "text.blocks.[0-3].*", "*.positions"; they
        are taken in order, and one that begins with "!" lets its parameters learn again: "*", "!text.projection.*"
    prefix : left out of the names before matching

    Returns
    -------
    list of the names that are frozen at the end

    Raises
    ------
    ClipworksError
        If a pattern matches nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = {name.removeprefix(prefix): parameter for name, parameter in module.named_parameters()}
    frozen: dict[str, None] = {}
    for pattern in patterns:
        found = fnmatch.filter(names, pattern.removeprefix("!"))
        if not found:
            shown = closest(pattern, names) or f" Names look like {', '.join(map(repr, list(names)[:3]))}."
            raise ClipworksError(f"freeze must match parameter names. Nothing matches {pattern!r}.{shown}")
        for name in found:
            learns = pattern.startswith("!")
            names[name].requires_grad_(learns)
            frozen.pop(name, None) if learns else frozen.setdefault(name)
    return list(frozen)


def still(module: nn.Module) -> None:
    """Keep the running statistics of batch normalisation whose parameters are all frozen."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            own = list(part.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                part.eval()


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float = 0.2,
    layer_decay: float | None = None,
    no_decay: Sequence[str] = (),
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return optimizer groups: decay for matrices only, and learning rates that shrink towards the input.

    Parameters
    ----------
    named : names and parameters; those without gradient are left out
    weight_decay : of parameters with two or more dimensions; norms, biases, class token, scale get none
    layer_decay : factor per layer; the last block and everything above it learn at the full rate, block i of L at
        `layer_decay ** (L - 1 - i)`, patch and token embeddings at `layer_decay ** L`
    no_decay : further names (shell patterns, as in `freeze`) without weight decay
    rates : shell pattern -> factor on the learning rate; of several that match the last one holds

    Returns
    -------
    list of dicts with `params`, `names`, `weight_decay` and `lr_scale`, in a stable order

    Raises
    ------
    ClipworksError
        If a pattern of `rates` or `no_decay` matches nothing that learns.
    """
    check_range("weight_decay", weight_decay, 0)
    if layer_decay is not None:
        check_range("layer_decay", layer_decay, 0, 1)
    learning = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    names = [name.removeprefix("encoder.") for name, _ in learning]
    for argument, patterns in (("no_decay", no_decay), ("rates", rates or {})):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ClipworksError(f"{argument} must match parameters that learn. Nothing matches {pattern!r}."
                                     f"{closest(pattern, names)}")  # fmt: skip
    factors = [(pattern, check_range(f"rates[{pattern!r}]", factor, 0)) for pattern, factor in (rates or {}).items()]
    factors.reverse()
    depths = _depths(name for name, _ in learning)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for short, (name, parameter) in zip(names, learning, strict=True):
        plain = parameter.ndim < 2 or any(fnmatch.fnmatch(short, p) for p in no_decay)
        scale = 1.0 if layer_decay is None else layer_decay ** depths[name]
        scale *= next((factor for pattern, factor in factors if fnmatch.fnmatch(short, pattern)), 1.0)
        decay = 0.0 if plain else weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _depths(names: Iterable[str]) -> dict[str, int]:
    """Return, for every name, how many layers lie above it in its tower."""
    names = list(names)
    places: dict[str, tuple[str, tuple[int, int]]] = {}
    for name in names:
        if block := _BLOCK.search(name):
            tower, index, stage, inner = block.groups()
            places[name] = (tower, (int(index), 0) if index else (int(stage), int(inner)))
    ranks = {}
    for tower in ("visual", "text"):
        order = sorted({place for t, place in places.values() if t == tower})
        ranks[tower] = {place: len(order) - 1 - i for i, place in enumerate(order)}
    depths = {}
    for name in names:
        if name in places:
            tower, place = places[name]
            depths[name] = ranks[tower][place]
        else:
            front = _FRONT.search(name)
            depths[name] = len(ranks[front.group(1)]) if front else 0
    return depths


def adamw(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """Return AdamW over the groups; refuses a run in which nothing would learn."""
    if not groups:
        raise ClipworksError("freeze leaves no parameter that could learn.")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
