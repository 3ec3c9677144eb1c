"""The step of most few-shot methods: cross-entropy of images against the words of their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..training.augment import Augment, resolve_augment
from ..training.recipe import ContrastiveRecipe
from ..zeroshot.templates import resolve_templates
from .common import Tuned, run

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder
    from .shots import Shots

CHUNK = 128  # sentences whose activations are held at a time


def few_shot_steps(method: Any, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
    """Train by the protocol of CLIP-LoRA, which CLIP-SVD took over: AdamW, a cosine over so many steps per shot.

    Parameters
    ----------
    method : a `Tuner` with `templates`, `augment`, `lr`, `weight_decay`, `steps_per_shot`, `batch_size` and `seed`
    start, shots, progress : as `Tuner._train` is given them
    """
    recipe = ClassRecipe(shots.table or {}, method.templates, resolve_augment(method.augment))
    return run(
        start, shots.items, recipe, freeze=method.frozen, steps=shots.steps(method.steps_per_shot), lr=method.lr,
        weight_decay=method.weight_decay, betas=(0.9, 0.999), eps=1e-8, warmup=0, end_lr=min(1e-6, method.lr),
        batch_size=method.batch_size, seed=method.seed, progress=progress,
    )  # fmt: skip


class ClassRecipe(ContrastiveRecipe):
    """Cross-entropy over the classes at the encoder's own scale; the class words are encoded in every step.

    Where nothing in the text tower learns they are encoded once. With many classes the activations of `CHUNK` sentences
    at a time are held and computed anew in the backward pass, so memory hardly grows with the number of classes.

    Parameters
    ----------
    table : label -> class name
    templates : sentences around the names; a class is the mean of its sentences, as in `class_vectors`
    augment : how views are drawn
    smoothing : share of the target that is spread evenly over all classes
    """

    split, captions = False, False

    def __init__(
        self,
        table: Mapping[str, str],
        templates: str | Sequence[str],
        augment: Augment | None = None,
        smoothing: float = 0.0,
    ):
        super().__init__("infonce", augment)
        self.place = {label: i for i, label in enumerate(table)}
        self.sentences = [t.replace("{}", name) for t in resolve_templates(templates) for name in table.values()]
        self.smoothing = smoothing
        self.rows: torch.Tensor | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "sentences": self.sentences, "smoothing": self.smoothing}

    def bind(self, encoder: Encoder, pool: Any) -> None:
        super().bind(encoder, pool)
        self.tokens, self.rows = encoder.tokenize(self.sentences), None

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        labels = torch.tensor([self.place[str(item.label)] for item in items])
        return {"pixels": self.pixels(items, rng.spawn(len(items))), "labels": labels}

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the cross-entropy."""
        image = encoder.encode_image(batch["pixels"])
        logits = encoder.log_scale.exp().reshape(()) * image @ self.classes(encoder).T
        return {"cross_entropy": F.cross_entropy(logits, batch["labels"], label_smoothing=self.smoothing)}

    def classes(self, encoder: Encoder) -> torch.Tensor:
        """Return one unit row per class, (C, dim), with gradient where the text tower learns."""
        if self.rows is not None:
            return self.rows
        learns = any(p.requires_grad for p in encoder.text.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            rows = class_rows(encoder, self.tokens.to(encoder.device), len(self.place))
        self.rows = None if learns else rows
        return rows


def class_rows(encoder: Encoder, tokens: torch.Tensor, classes: int, chunk: int = CHUNK) -> torch.Tensor:
    """Return the normalised mean of every class's unit sentence vectors, (classes, dim).

    Parameters
    ----------
    tokens : int64 (templates * classes, L), all classes of the first template first
    classes : how many there are
    chunk : sentences encoded at a time; with more, their activations are computed anew in the backward pass
    """
    if len(tokens) <= chunk or not torch.is_grad_enabled():
        parts = [encoder.encode_text(part) for part in tokens.split(chunk)]
    else:
        parts = [checkpoint(encoder.encode_text, part, use_reentrant=False) for part in tokens.split(chunk)]
    return F.normalize(torch.cat(parts).unflatten(0, (-1, classes)).sum(0), dim=-1)
