"""What the tests of recipes share: toy pairs as items, a bound recipe, one step of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from clipworks.data.item import Item
from clipworks.training.feed import step_generator
from clipworks.training.loop import train
from training.toy import drawings, tiny

QUICK = {"steps": 3, "batch_size": 8, "lr": 1e-3, "log_every": 1, "workers": 1, "device": "cpu", "seed": 0}


def items(count: int = 16, **columns: list[Any]) -> list[Item]:
    """Coloured shapes with captions, keyed p0, p1 ..."""
    return [
        Item(f"p{i}", image, caption=caption, columns={name: values[i] for name, values in columns.items()})
        for i, (image, caption) in enumerate(drawings(count))
    ]


def step_of(recipe: Any, count: int = 8, step: int = 0, **columns: list[Any]) -> tuple[Any, dict[str, Any]]:
    """Bind a recipe to a tiny encoder; return both and one batch."""
    encoder = tiny()
    recipe.bind(encoder, None)
    return encoder, recipe.batch(items(count, **columns), step, step_generator(0, step))


def trained(tmp_path: Any, recipe: Any, data: Any = None, **changes: Any) -> Any:
    """Three steps of training."""
    return train(items() if data is None else data, tiny(), out=tmp_path, recipe=recipe, **{**QUICK, **changes})


def same(one: Any, other: Any) -> bool:
    """Whether two encoders have the very same weights."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def unit_rows(*shape: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
