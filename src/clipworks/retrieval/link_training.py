"""Training for record linkage, both stages of CLIPPINGS, by the training loop.

Stage 1 contrasts every image with its own text (no labels). Stage 2 pulls together the records of a group, in batches
that put a group beside those it is most easily taken for; which these are is computed anew before every round.

    L_2 = SupCon of z = unit(u + v) over batches of 3 records each of 42 groups

From the released code: learning rates 5e-6 and 5e-7 (a usual 1e-5 destroys stage 1), AdamW with betas 0.9 and 0.98, eps
1e-6, weight decay 0.001. Its warm restarts are those of the rounds here: each begins with a fresh optimiser, and the
rate falls as a cosine to 0 in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.item import Item
from ..errors import ClipworksError, check_range
from ..losses.supcon import supcon
from ..training.augment import Augment, resolve_augment
from ..training.feed import open_pairs
from ..training.loop import TrainReport, train
from ..training.recipe import ContrastiveRecipe
from ..training.run import resolve_model
from .clippings import hard_batches, record_vectors

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


class DistinctTexts(ContrastiveRecipe):
    """Image against text, every text once in a batch: the same text of another image is no wrong answer."""

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        first: dict[str, Item] = {}
        for item in items:
            first.setdefault(item.caption or "", item)
        return super().batch(list(first.values()), step, rng)


class LinkRecipe(ContrastiveRecipe):
    """Supervised contrast of record vectors, on batches that are laid out before.

    Parameters
    ----------
    records : all records, with labels
    batches : which of them belong to each step
    temperature : of `losses/supcon` (0.1)
    augment : how views are drawn
    """

    split = False  # the batches are laid out for one process

    def __init__(
        self,
        records: Sequence[Item],
        batches: Sequence[np.ndarray],
        temperature: float = 0.1,
        augment: Augment | None = None,
    ):
        super().__init__("infonce", augment)
        self.records, self.batches, self.temperature = records, list(batches), temperature
        names = sorted({str(item.label) for item in records})
        self.classes = {name: i for i, name in enumerate(names)}

    @property
    def settings(self) -> dict[str, Any]:
        return {"steps": len(self.batches), "temperature": self.temperature, "augment": repr(self.augment)}

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """The step's own records, whatever the loop's order gave."""
        own = [self.records[i] for i in self.batches[step % len(self.batches)]]
        found = super().batch(own, step, rng)
        return {**found, "labels": torch.tensor([self.classes[str(item.label)] for item in own])}

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        rows = self.encode(encoder, batch)
        return {"supcon": supcon(F.normalize(rows["image"] + rows["text"], dim=-1), batch["labels"], self.temperature)}


def train_linker(
    data: Any,
    model: str | Encoder = "clipworks-small",
    *,
    out: str | Path | None = None,
    pairs: int = 1,
    rounds: int = 0,
    pairs_lr: float = 5e-6,
    lr: float = 5e-7,
    temperature: float = 0.1,
    views: int = 3,
    near: int = 3,
    batch_size: int = 126,
    augment: str | Augment = "light",
    seed: int = 0,
    **options: Any,
) -> list[TrainReport]:
    """Train an encoder on records of image and text.

    Parameters
    ----------
    data : records as `open_source` takes them; labels are groups, needed for stage 2
    model : name, path or encoder to begin with; an encoder is not changed
    out : folder; each stage and round has one in it
    pairs : passes over the records of stage 1
    rounds : of stage 2, each once over all groups
    pairs_lr, lr : learning rates of the stages (5e-6 and 5e-7)
    temperature : of stage 2 (0.1)
    views, near : records of a group in a batch, and groups put together (3 and 3), see `clippings.hard_batches`
    batch_size : records of a batch, a multiple of views * near for stage 2 (126)
    augment : views, as in `train`
    seed : of everything drawn
    options : further arguments of `train`, such as device or workers

    Returns
    -------
    the report of every stage and round; the last one's `encoder` is the result
    """
    check_range("pairs", pairs, 0)
    check_range("rounds", rounds, 0)
    items = open_pairs(data)
    if rounds and any(item.label is None for item in items):
        raise ClipworksError("data must give every record a label for stage 2. Got records without; or rounds=0.")
    if not pairs and not rounds:
        raise ClipworksError("pairs or rounds must be at least 1. Got 0 of both.")
    encoder: Any = resolve_model(model, seed)
    recipe: ContrastiveRecipe
    reports: list[TrainReport] = []
    shared = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.001, "warmup": 0.0, "seed": seed, **options}
    folder = None if out is None else Path(out)
    views_of = resolve_augment(augment)
    if pairs:
        recipe = DistinctTexts("infonce", views_of)
        reports.append(train(items, encoder, out=folder and folder / "pairs", recipe=recipe, epochs=pairs, lr=pairs_lr,
                             batch_size=min(batch_size, len(items)), **shared))  # fmt: skip
        encoder = reports[-1].encoder
    for number in range(rounds):
        image = encoder.images([item.source() for item in items])
        rows = record_vectors(image, encoder.texts([item.caption or "" for item in items]))
        batches = list(hard_batches(rows, [str(i.label) for i in items], views=views, near=near, batch_size=batch_size,
                                    seed=seed + number))  # fmt: skip
        recipe = LinkRecipe(items, batches, temperature, views_of)
        reports.append(train(items, encoder, out=folder and folder / f"round-{number}", recipe=recipe,
                             steps=len(batches), lr=lr, batch_size=1, **shared))  # fmt: skip
        encoder = reports[-1].encoder
    return reports
