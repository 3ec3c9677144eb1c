"""Step 5 of `clipworks-small`: the image tower learns to say in the space of texts what is known of every image.

The text vectors stand still (Zhai et al. 2022, LiT, with the sides exchanged), so every loss is a classification
against a table of vectors, and the batch may be small:

- names: cross-entropy over all class names of the corpus and of ImageNet; names that mean the same share the target;
- captions: cross-entropy over the own caption, those of the batch and others drawn from all captions (InfoNCE);
- classifier: what the ImageNet classifier said of the undisturbed view, 1000 probabilities against the 1000 class names
  (distillation of logits), also for images of other classes, sketches and thumbnails of photographs.

Gradients stop at the middle of the stem, whose maps were computed once (`views.py`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from towers import ridge
from views import View

from clipworks.encoders.encoder import Encoder
from clipworks.training.loop import TrainReport, train


class Tables:
    """Text vectors of names, of ImageNet's classes and of captions.

    Parameters
    ----------
    names : every class name
    imagenet : the 1000 names in the classifier's order; all of them are among `names`
    name_rows : unit rows of `names`
    captions, caption_rows : distinct captions and their unit rows
    """

    def __init__(
        self, names: Sequence[str], imagenet: Sequence[str], name_rows: torch.Tensor,
        captions: Sequence[str], caption_rows: torch.Tensor,
    ):  # fmt: skip
        self.name_place = {name: i for i, name in enumerate(names)}
        self.caption_place = {caption: i for i, caption in enumerate(captions)}
        self.names, self.captions = name_rows, caption_rows
        self.imagenet = name_rows[[self.name_place[name] for name in imagenet]]

    def to(self, device: torch.device) -> Tables:
        """Move the vectors to a device."""
        self.names, self.captions, self.imagenet = (
            rows.to(device) for rows in (self.names, self.captions, self.imagenet)
        )
        return self


class PlaceRecipe:
    """Cached maps of views, and what is known of each."""

    captions, split = False, False

    def __init__(
        self, views: Sequence[View], folder: Path, tables: Tables, weights: Sequence[float] = (1, 1, 1),
        pool: int = 1024,
    ):  # fmt: skip
        self.views, self.tables, self.weights, self.pool_size = views, tables, weights, pool
        self.same = (60 * tables.names @ tables.names.T).softmax(1)  # who shares the target with whom
        self.maps = np.load(folder / "maps.npy", mmap_mode="r")
        self.teacher = np.load(folder / "teacher.npy", mmap_mode="r")

    @property
    def settings(self) -> dict[str, Any]:
        return {"weights": list(self.weights), "pool": self.pool_size}

    def batch(self, items: Sequence[Any], step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Return maps, the place of the text among names or captions (-1: it has none), and the classifier's answer."""
        rows = [int(item.key) for item in items]
        shared = torch.from_numpy(rng.choice(len(self.tables.captions), self.pool_size, replace=False))
        name, caption = [], []
        for row, draw in zip(rows, rng.spawn(len(rows)), strict=True):
            view = self.views[row]
            name.append(self.tables.name_place[view.texts[0]] if view.named else -1)
            known = [self.tables.caption_place[t] for t in view.texts if t in self.tables.caption_place]
            caption.append(known[draw.integers(len(known))] if known and not view.named else -1)
        maps = torch.from_numpy(self.maps[rows].astype(np.float32)).permute(0, 3, 1, 2)
        teacher = torch.from_numpy(self.teacher[rows].astype(np.float32))
        return {"pixels": maps, "teacher": teacher, "photo": torch.tensor([self.views[row].photo for row in rows]),
                "name": torch.tensor(name), "caption": torch.tensor(caption), "others": shared}  # fmt: skip

    def forward(self, encoder: Encoder, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.autocast(batch["pixels"].device.type, torch.bfloat16):
            image, scale = encoder.encode_image(batch["pixels"]), encoder.log_scale.exp()
        count, tables = len(image), self.tables.to(image.device)
        named, told, photo = batch["name"] >= 0, batch["caption"] >= 0, batch["photo"]
        target = self.same[batch["name"][named].cpu()].to(image.device)
        names = F.cross_entropy(scale * image[named] @ tables.names.T, target, reduction="sum")
        own = batch["caption"][told]
        table, place = torch.cat([own, batch["others"]]), torch.arange(len(own), device=image.device)
        logits = scale * image[told] @ tables.captions[table].T
        again = table[None] == own[:, None]
        again[place, place] = False
        captions = F.cross_entropy(logits.masked_fill(again, -torch.inf), place, reduction="sum")
        said = (scale * image[photo] @ tables.imagenet.T).log_softmax(1)
        classifier = F.kl_div(said, batch["teacher"][photo].log_softmax(1), log_target=True, reduction="sum")
        values = {"names": names, "captions": captions, "classifier": classifier}
        return {name: w * value / count for (name, value), w in zip(values.items(), self.weights, strict=True)}


@torch.no_grad()
def fit(encoder: Encoder, recipe: PlaceRecipe, classifier: torch.nn.Linear, most: int = 6000) -> None:
    """Begin where closed forms end: the classifier as memory, and a linear map for what the memory does not say.

    The stem's 1280 channels become the 384 directions in which the classifier's answers vary most on these images; the
    memory's keys are its weights there, its values the vectors of the class names about their mean. The projection is a
    ridge regression of what is then missing to the vectors of names and captions.
    """
    visual, tables, stem = encoder.visual.eval(), recipe.tables, encoder.visual.stem
    chosen = range(min(most, len(recipe.views)))
    maps = [torch.from_numpy(recipe.maps[i : i + 64].astype(np.float32)).permute(0, 3, 1, 2) for i in chosen[::64]]
    features = torch.cat([stem.head(stem.body[stem.middle :](x)).mean((2, 3)) for x in maps]).double()
    mean, weight = features.mean(0), classifier.weight.double()
    spread = torch.cov(features.T)
    spread += 1e-3 * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype)
    root = torch.linalg.cholesky(spread)
    left, strength, right = torch.linalg.svd((weight - weight.mean(0)) @ root, full_matrices=False)
    width = len(visual.class_token)
    basis = torch.linalg.solve_triangular(root.T, right[:width].T, upper=True)
    stem.projection.weight.copy_(basis.T[:, :, None, None])
    stem.projection.bias.copy_(-mean @ basis)
    visual.memory.keys.weight.copy_(left[:, :width] * strength[:width])
    visual.memory.keys.bias.copy_(weight @ mean + classifier.bias.double())
    visual.memory.values.weight.copy_((tables.imagenet - tables.imagenet.mean(0)).T)
    known, target = [], []
    for i, view in enumerate(recipe.views[: len(features)]):
        table, place = (tables.names, tables.name_place) if view.named else (tables.captions, tables.caption_place)
        if view.texts[0] in place:
            known.append(i)
            target.append(table[place[view.texts[0]]])
    visual.projection.weight.zero_()
    recalled = torch.cat([encoder.encode_image(x, normalize=False) for x in maps])[known]
    visual.projection.weight.copy_(torch.eye(*visual.projection.weight.shape))
    pooled = torch.cat([encoder.encode_image(x, normalize=False) for x in maps])[known] - recalled
    visual.projection.weight.copy_(ridge(pooled[:, :width], torch.stack(target) - recalled, 1e-2).T)


def main(
    encoder: Encoder, folder: Path, tables: Tables, classifier: torch.nn.Linear, out: Path, *,
    weights: Sequence[float] = (1.0, 1.0, 1.0), epochs: float = 1.6, batch_size: int = 256,
    left_out: Collection[str] = (), **options: Any,
) -> TrainReport:  # fmt: skip
    """Train the image tower above the middle of its stem; text tower and memory stay.

    Views of images in `left_out` (near-copies that were found after the views were made) are passed over. Options are
    those of `train`.
    """
    usual = {"lr": 8e-4, "weight_decay": 0.05, "warmup": 50, "layer_decay": 0.6, "ema": 0.995, "save_every": 100}
    views = [View(**view) for view in json.loads((folder / "views.json").read_text(encoding="utf-8"))]
    recipe = PlaceRecipe(views, folder, tables, weights)
    fit(encoder, recipe, classifier)
    still = ["text.*", "visual.memory.*"] + [f"visual.stem.body.{i}.*" for i in range(encoder.visual.stem.middle)]
    items = [(str(i), "-") for i, view in enumerate(views) if view.path not in left_out]
    usual["steps"] = round(epochs * len(items) / batch_size)
    return train(items, encoder, out=out, recipe=recipe, freeze=still, clip=1.0,
                 batch_size=batch_size, **usual | options)  # fmt: skip
