"""FarSLIP: patches of the whole image follow those of its crops, then crops of objects follow their category.

Claim: adapting CLIP to satellite images this way helps segmentation and the image level together (mean mIoU, ViT-B/16:
CLIP 32.3, CLIPSelf 12.8, FineCLIP 24.2, first stage 35.4; mean zero-shot accuracy of eight sets 46.8 to 62.2).

Formula: F = (softmax(q q^T) + softmax(k k^T) + softmax(v v^T)) v of the last attention, without residual sum and
feed-forward part, projected;  first stage: InfoNCE + 0.1 (1 - mean cos(RoIAlign(F(image), box), mean F(crop)));  second
stage: InfoNCE + the contrast of the class tokens of cut-out objects with "a satellite image of {category}".

Paper: Li et al. 2025, FarSLIP: Discovering Effective CLIP Adaptation for Fine-Grained Remote Sensing Understanding.
Differs from the paper: objects are filtered by their share of the view (`smallest`), since the size in pixels of a
file may not be known; a step without objects gives 0, not NaN. Both stages may be weighted into one.
Defaults: from the released code: 4 crops of 0.3 to 0.7 of the area, weight 0.1, the student its own teacher, 4 objects.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.regions import COLUMN
from ..encoders.layers import Rule
from ..errors import ClipworksError, check_choice, check_range
from ..registry import method
from ..segment.common import Hidden
from ..segment.regions import roi_align
from ..training.augment import Augment
from ..training.gather import gather
from .parts import follow, need_vit
from .regions import RegionRecipe, encode_kept, kept_rows

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder

RULE = "qq+kk+vv"
TEACHERS = ("active", "frozen", "ema")


def dense_run(visual: Any, pixels: torch.Tensor, rule: Rule = RULE) -> tuple[Any, torch.Tensor]:
    """Run a tower once; return its ordinary output, and its map under another last attention, (B, h, w, dim).

    The map is that of `segment.clearclip.ClearCLIP(rule)`: the attention of the last block alone, projected.
    """
    depth = len(visual.blocks)
    embedded = visual.stem(pixels.to(visual.positions.dtype))
    output = visual.run(embeddings=embedded, output_layers=(depth - 2,))
    patches = embedded.flatten(2).transpose(1, 2)
    hidden = Hidden(visual, pixels, [output.layers[depth - 2]], output.grid, output.prefix, patches)
    return output, hidden.project(hidden.attend(rule))


@method(card="farslip", level="M")
class FarslipRecipe(RegionRecipe):
    """A training step of the first stage, of the second, or of both.

    Parameters
    ----------
    distillation : weight of the distillation between patches (first stage: 0.1); 0 leaves it out
    categories : weight of the contrast of objects (second stage: 1); 0 leaves it out
    teacher : whose crops are followed: "active" (the student's, with gradient), "frozen" (of the start), or "ema"
    momentum : of the slow copy with teacher="ema"
    crops : crops of an image in a step
    crop : how they are cut
    regions : objects of an image in a step
    template : sentence around their words
    smallest : share of the view that an object must cover
    column : column of the data that holds the objects, see `data.regions`
    augment : how views are drawn; None takes what the encoder's own preprocessing shows
    loss : registered contrastive loss of images and captions
    seed : of nothing in this recipe; part of the protocol

    Raises
    ------
    ClipworksError
        If a number is out of range, teacher is unknown, or the image tower has fewer than two blocks.

    Inputs
    ------
    image-text pairs; for the second stage with objects: boxes and categories in a column

    Relations
    ---------
    With both weights 0 it is plain contrastive training. The trained map is read by
    `segment(method=ClearCLIP("qq+kk+vv"))`; `declip` follows the class token of crops. `losses/farslip` is its loss.

    References
    ----------
    Li et al. 2025, FarSLIP: Discovering Effective CLIP Adaptation for Fine-Grained Remote Sensing Understanding

    Examples
    --------
    >>> FarslipRecipe(distillation=0, categories=1).settings["template"]
    'a satellite image of {}'
    """

    def __init__(
        self,
        distillation: float = 0.1,
        categories: float = 0.0,
        teacher: str = "active",
        momentum: float = 0.99,
        crops: int = 4,
        crop: Augment = Augment(scale=(0.3, 0.7)),
        regions: int = 4,
        template: str = "a satellite image of {}",
        smallest: float = 0.004,
        column: str = COLUMN,
        augment: Augment | None = None,
        loss: str = "infonce",
        seed: int = 0,
    ):
        super().__init__(regions, column=column, template=template, smallest=smallest, augment=augment, loss=loss,
                         seed=seed)  # fmt: skip
        self.distillation = check_range("distillation", distillation, 0.0)
        self.categories = check_range("categories", categories, 0.0)
        self.teacher = check_choice("teacher", teacher, TEACHERS)
        self.momentum, self.crops = check_range("momentum", momentum, 0.0, 1.0), int(check_range("crops", crops, 1))
        self.crop = crop
        self.split = teacher != "ema"  # the slow copy moves once per step

    def build(self, encoder: Encoder) -> None:
        need_vit(encoder, "FarSLIP")
        if self.distillation and len(encoder.visual.blocks) < 2:
            raise ClipworksError("FarSLIP needs an image tower of at least two blocks. This one has one.")
        slow = self.distillation and self.teacher != "active"
        # part of the checkpoint, so that a resumed run follows the same teacher
        self.slow = copy.deepcopy(encoder.visual).requires_grad_(False) if slow else None

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return pixels and tokens; `crops` (n, C, 3, H, W) with `places` (n, C, 4); `objects`, `words`, `labels`."""
        draws = rng.spawn(len(items))
        views = self.views_of(items, draws)
        config = self.plain.bound.preprocess.config
        tokens = self.plain.bound.tokenize(self.plain.texts(items, draws))
        found: dict[str, Any] = {"pixels": self.pixels([view.image for view in views]), "tokens": tokens}
        if self.distillation:
            places, cut = [], []
            for view, draw in zip(views, draws, strict=True):
                wide, tall = view.crop[2] - view.crop[0], view.crop[3] - view.crop[1]
                for _ in range(self.crops):
                    box = np.array(self.crop.box(wide, tall, draw)) / (wide, tall, wide, tall)
                    places.append(torch.tensor(box, dtype=torch.float32))
                    cut.append(view.cut(box.tolist(), config.size, config.interpolation))
            found["places"] = torch.stack(places).unflatten(0, (len(items), self.crops))
            found["crops"] = self.pixels(cut).unflatten(0, (len(items), self.crops))
        if self.categories:
            there = self.regions_in(items, views, draws)
            boxes = there.pop("boxes").tolist()
            cut = [view.cut(box, config.size, config.interpolation)
                   for view, row in zip(views, boxes, strict=True) for box in row]  # fmt: skip
            found["objects"] = self.pixels(cut).unflatten(0, (len(items), self.regions))
            found |= there
        return found

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return rows of images and captions; pooled patches of both sides; rows of objects and their words."""
        if not self.distillation:
            found = self.plain.features(encoder, batch)
        else:
            output, maps = dense_run(encoder.visual, batch["pixels"])
            found = self.plain.features(encoder, {**batch, "pooled": output.pooled})
            found["full"] = F.normalize(roi_align(maps.float(), batch["places"].float())[:, :, 0, 0], dim=-1)
            found["crop"] = self.taught(encoder, batch["crops"])
        if self.categories:
            kept = batch["labels"] >= 0
            found["region"] = encode_kept(encoder.encode_image, batch["objects"], kept, encoder.dim)
            found |= {"words": self.words_of(encoder, batch), "labels": batch["labels"]}
        return found

    def taught(self, encoder: Encoder, crops: torch.Tensor) -> torch.Tensor:
        """Return the mean of the patches of each crop, unit rows (n, C, dim), by the teacher."""
        visual = encoder.visual if self.slow is None else self.slow
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.slow is None):
            maps = dense_run(visual, crops.flatten(0, 1))[1]
            return F.normalize(maps.float().mean((1, 2)), dim=-1).unflatten(0, crops.shape[:2])

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Move the slow copy, if it moves, and return the losses."""
        if self.slow is not None and self.teacher == "ema":
            follow(self.slow, encoder.visual, self.momentum)
        return super().forward(encoder, batch)

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the contrast of images and captions and the weighted losses of the stages that are on."""
        from ..losses.farslip import category_contrast, patch_distillation

        found = self.contrast(features)
        if self.distillation:
            sides = (gather(features[name]).flatten(0, 1) for name in ("full", "crop"))
            found["distillation"] = self.distillation * patch_distillation(*sides)
        if self.categories:
            kept = kept_rows(features, "region", "words")
            value = category_contrast(kept["region"], kept["words"], features["scale"], kept["labels"])
            found["categories"] = self.categories * value
        return found
