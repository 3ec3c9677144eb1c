"""What one training step does with a batch: the protocol of recipes, and the plain contrastive one.

A recipe chooses views and captions (`batch`), runs the encoder and names its losses (`forward`). The loop owns all
else: order, decoding threads, processes, precision, optimizer, checkpoints, logs. A recipe that states its work in
two halves, `features` and `losses`, gets exact large batches on little memory (`micro_batch`) for nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ..errors import ClipworksError, check_choice, closest
from ..registry import get_method, methods, read_call
from .augment import Augment, resolve_augment, view
from .gather import full_matrix, gather, local_rows, processes

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder


class Recipe(Protocol):
    """What the loop needs.

    A recipe with parameters of its own is an `nn.Module`; they are trained and saved too. Optional attributes:
    `split` (it has the two halves), `captions = False` (it needs no words), `settings` (JSON values that a resumed
    run must share), `bind(encoder, pool)` (called once before training), `order(count, batch_size, seed)` (says which
    samples belong to which step, in the place of `feed.Order`).
    """

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Turn this process's items of one step into tensors whose first dimension is the sample.

        Runs ahead in a thread. All randomness comes from `rng`: draws from it are the same on every process;
        `rng.spawn(len(items))` gives one generator per sample, the same however many processes share the batch.
        Raises `BadImage` for an image that cannot be used; the loop then replaces that item and calls again.
        """
        ...

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return named scalar losses, weights already applied; their sum is minimised."""
        ...


class ContrastiveRecipe:
    """One view and one caption per sample, one contrastive loss; the base that other recipes vary.

    Subclasses override `texts` (which words), `pixels` (which views), `encode`, `features` or `losses`. One that cannot
    be split into the two halves overrides `forward` and sets `split = False`.

    Parameters
    ----------
    loss : name of a registered loss, or a function `(image, text, scale, **extra) -> scalar or dict of scalars`
    augment : how views are drawn; None takes the encoder's own preprocessing
    options : further keyword arguments of the loss
    """

    split = True  # `forward` is `losses(features(...))`, so the loop may run the halves apart

    def __init__(
        self,
        loss: str | Callable[..., Any] = "infonce",
        augment: Augment | None = None,
        options: dict[str, Any] | None = None,
    ):
        self.loss = get_method(loss, "losses") if isinstance(loss, str) else loss
        self.loss_name = loss if isinstance(loss, str) else getattr(loss, "__name__", "loss")
        self.augment = augment
        self.options = options or {}
        self.encoder: Encoder | None = None
        self.pool: Executor | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it continues; plain JSON values."""
        return {"loss": self.loss_name, "options": repr(self.options), "augment": repr(self.augment)}

    def bind(self, encoder: Encoder, pool: Executor | None) -> None:
        """Give the recipe the encoder (its tokenizer and preprocessing) and the decoding threads, before training."""
        # past nn.Module, which would register the encoder as a part of the recipe
        object.__setattr__(self, "encoder", encoder)
        object.__setattr__(self, "pool", pool)

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return `pixels` of shape (n, 3, H, W) and `tokens` of shape (n, L)."""
        draws = rng.spawn(len(items))
        return {"pixels": self.pixels(items, draws), "tokens": self.bound.tokenize(self.texts(items, draws))}

    def pixels(self, items: Sequence[Item], draws: Sequence[np.random.Generator]) -> torch.Tensor:
        """Decode, augment and normalise the images, in threads."""
        preprocess = self.bound.preprocess
        run = map if self.pool is None else self.pool.map
        return torch.stack(list(run(lambda item, draw: view(item, preprocess, self.augment, draw), items, draws)))

    def texts(self, items: Sequence[Item], draws: Sequence[np.random.Generator]) -> list[str]:
        """Return the words of every item: its caption."""
        return [item.caption or "" for item in items]

    def encode(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the rows of both sides."""
        return {"image": encoder.encode_image(batch["pixels"]), "text": encoder.encode_text(batch["tokens"])}

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Encode both sides; every value is a tensor of rows or a scalar of shape ()."""
        # () also where sharding keeps the parameter as a vector of one
        found = {**self.encode(encoder, batch), "scale": encoder.log_scale.exp().reshape(())}
        bias: Any = encoder.bias
        if bias is not None and "bias" in inspect.signature(self.loss).parameters:
            found["bias"] = bias.reshape(())
        return found

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return named losses from this process's features; gathers what it needs from the others."""
        return contrast(self.loss, self.loss_name, features, **self.options)

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return self.losses(self.features(encoder, batch))

    @property
    def bound(self) -> Encoder:
        if self.encoder is None:
            raise ClipworksError("the recipe has no encoder yet: `train` gives it one, or call bind(encoder, None).")
        return self.encoder


def contrast(
    loss: Callable[..., Any], name: str, features: dict[str, torch.Tensor], **options: Any
) -> dict[str, torch.Tensor]:
    """Apply a loss to image and text rows across processes: local rows where the loss can, else the full matrix.

    Parameters
    ----------
    loss : function `(image, text, scale, **extra)`; takes `group` if it exchanges rows between processes itself
    name : what to call its value, if it returns one
    features : `image` and `text` of shape (n, dim), `scale` of shape (), and any rows or scalars that the loss takes by
        name; rows are gathered too
    options : further arguments of the loss
    """
    known = inspect.signature(loss).parameters
    extra = {k: v for k, v in features.items() if k not in ("image", "text", "scale") and k in known}
    image, text, scale = features["image"], features["text"], features["scale"]
    if "group" in known:  # the loss exchanges rows with the other processes itself
        value = loss(image, text, scale, **extra, **options)
    elif "all_image" in known:
        if processes() > 1:
            extra |= {f"all_{k}": gather(v) for k, v in extra.items() if f"all_{k}" in known}
        value = local_rows(loss, image, text, scale, **extra, **options)
    else:
        extra = {k: gather(v) if v.ndim else v for k, v in extra.items()}
        value = full_matrix(loss, image, text, scale, **extra, **options)
    return value if isinstance(value, dict) else {name: value}


def resolve_recipe(
    recipe: Recipe | str | None, loss: str | Callable[..., Any] = "infonce", augment: Augment | None = None
) -> Recipe:
    """Return a recipe: as it is, the plain one for None, or a method of `pretraining/` by name.

    Parameters
    ----------
    recipe : an object, or text: "slip", or with arguments as in Python, "flip(drop=0.75)"; views may be given by name,
        "slip(strong='standard')"
    loss, augment : what a recipe gets that takes one and was not given its own
    """
    if recipe is None:
        if isinstance(loss, str):
            check_choice("loss", loss.removeprefix("losses/").replace("-", "_"), plain_losses())
        return ContrastiveRecipe(loss, augment)
    if not isinstance(recipe, str):
        return recipe
    name, options = read_call("recipe", recipe, "flip(drop=0.75)")
    made: Any = get_method(check_choice("recipe", name, [m.name for m in methods("pretraining")]), "pretraining")
    if inspect.isfunction(made):
        raise ClipworksError(f"recipe must train. {name!r} prepares the data: call it before, and train on its result.")
    known = inspect.signature(made).parameters
    for argument, value in options.items():
        if argument not in known:
            raise ClipworksError(f"{name} has no argument {argument!r}. It takes {', '.join(known)}."
                                 f"{closest(argument, known)}")  # fmt: skip
        if isinstance(value, str) and "Augment" in str(known[argument].annotation):
            options[argument] = resolve_augment(value)
    of_run = {k: v for k, v in {"loss": loss, "augment": augment}.items() if k in known}
    return made(**{**of_run, **options})


def plain_losses() -> list[str]:
    """Return the registered losses that need image and text rows, the scale and perhaps the bias, and nothing else."""
    found = []
    for name in (m.name for m in methods("losses")):
        known = inspect.signature(get_method(name, "losses")).parameters
        needed = {k for k, p in known.items() if p.default is p.empty}
        if {"image", "text", "scale"} <= set(known) and needed <= {"image", "text", "scale", "bias"}:
            found.append(name)
    return found
