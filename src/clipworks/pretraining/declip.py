"""DeCLIP: patch features for open vocabularies, learned from images alone by decoupled distillation.

Claim: with the last attention split into content (must agree with crops of the frozen model) and context (must agree
with a vision model), CLIP's patches serve detection and segmentation: OV-COCO novel AP 44.3 (CLIPSelf) to 46.2, patches
alone on ADE20K 16.7 (ClearCLIP) to 21.6 mIoU.

Formula: X = Proj_q(ln_1(x)), content = Proj_o(softmax(s X X^T) V), last norm and projection; no residual sum, no
feed-forward part;  L = content(RoIAlign over a random grid of boxes, frozen vector of each box cut out) + a context(cos
X, cos of the vision model), see `losses/declip`.

Papers: Wang et al. 2025, DeCLIP: Decoupled Learning for Open-Vocabulary Dense Perception (CVPR); Generalized Decoupled
Learning for Enhancing Open-Vocabulary Dense Perception (2025).
Differs from the papers: the vision model's map is brought to the student's grid, not the other way round; one random
grid per step, shared by its images. Maps of a diffusion model are a function of the caller's (`maps`).
Defaults: s = 1 / sqrt(d) (the released code has 1), a = 0.1, at most 6 splits and 20 boxes; lr 1e-5, weight decay 0.1,
6 epochs, batch 16, 1000 steps of warm-up belong to `train`; averaging 0.7 to `training.wise_ft`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ..encoders.layers import Rule
from ..errors import ClipworksError, check_choice, check_range
from ..losses.declip import FORMS, completed
from ..registry import method
from ..segment.affinity import SIDE, Provider, features_of, provider
from ..segment.common import enter, similarities
from ..segment.regions import roi_align
from ..training.augment import Augment
from ..training.recipe import ContrastiveRecipe
from .parts import need_vit
from .regions import ALL, placed

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder


@method(card="declip", level="M")
class DeclipRecipe(ContrastiveRecipe):
    """A training step of decoupled distillation; captions are not needed.

    Parameters
    ----------
    side : side of the student's images in pixels (default: twice the encoder's image size; paper: 560 to 224)
    relations : vision model whose patches belong together, see `segment.affinity`: "hf:facebook/dinov2-base" ..., a
        function, or "own" for the frozen encoder's earlier features
    weight : of the context
    form : "distance" (CVPR) or "divergence" (generalised)
    tokens : parts per side into which a box is pooled
    temperature : of the divergences
    scale : s of the query-query attention; None is 1 / sqrt(channels of a head)
    maps : function from images (B, 3, S, S), RGB in [0, 1], to self-attention maps of a diffusion model, a list of
        (B, N, N) on the student's grid; None leaves the relations as they are
    splits, most : greatest number of splits per side of the grid of boxes, and of boxes
    augment : how views are drawn; None takes what the encoder's own preprocessing shows

    Raises
    ------
    ClipworksError
        If a number is out of range, form or relations is unknown, or the image tower is not a transformer.

    Inputs
    ------
    images; a frozen copy of the encoder, and a vision model where one is named

    Relations
    ---------
    The trained map is read by `segment(method="clearclip")`, which has the same last block at the default scale.
    `losses/declip` is its loss, `training/wise_ft` its averaging with the start. `farslip` needs no second model.

    References
    ----------
    Wang et al. 2025, DeCLIP: Decoupled Learning for Open-Vocabulary Dense Perception

    Examples
    --------
    >>> DeclipRecipe(form="divergence", tokens=3).settings["tokens"]
    3
    """

    captions = False

    def __init__(
        self,
        side: int | None = None,
        relations: str | Provider = "own",
        weight: float = 0.1,
        form: str = "distance",
        tokens: int = 1,
        temperature: float = 0.1,
        scale: float | None = None,
        maps: Callable[[torch.Tensor], Sequence[torch.Tensor]] | None = None,
        splits: int = 6,
        most: int = 20,
        augment: Augment | None = None,
    ):
        check_choice("form", form, FORMS)
        options = {"weight": check_range("weight", weight, 0.0), "form": form, "temperature": temperature}
        super().__init__("declip", augment, options)
        if not temperature > 0:
            raise ClipworksError(f"temperature must be above 0. Got {temperature}.")
        self.side, self.source, self.relations = side, relations, provider(relations)
        self.form, self.tokens, self.scale = form, int(check_range("tokens", tokens, 1)), scale
        self.maps = maps
        self.splits, self.most = int(check_range("splits", splits, 1)), int(check_range("most", most, 1))
        self.teacher: Encoder | None = None

    @property
    def settings(self) -> dict[str, Any]:
        # the teacher is no part of a checkpoint: a resumed run must begin from the same encoder
        own = {name: getattr(self, name) for name in ("side", "tokens", "scale", "splits", "most")}
        start = None if self.teacher is None else self.teacher.fingerprint
        source = self.source if isinstance(self.source, str) else type(self.source).__name__
        return {**super().settings, **own, "relations": source, "teacher": start}

    def bind(self, encoder: Encoder, pool: Any) -> None:
        need_vit(encoder, "DeCLIP")
        super().bind(encoder, pool)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False).eval()
        patch = encoder.config.vision.patch_size
        self.length = max(patch, round((self.side or 2 * encoder.image_size) / patch) * patch)

    @property
    def rule(self) -> Rule:
        """Query-query attention at the scale."""
        if self.scale is None:
            return "qq"
        scale = self.scale
        return lambda q, k, v, mask: (scale * q.float() @ q.float().transpose(-2, -1)).softmax(-1)

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return `images` (n, 3, S, S), RGB in [0, 1], `boxes` (n, K, 4) of a grid, and `crops` (n, K, 3, H, W)."""
        preprocess = self.bound.preprocess
        grid = grid_boxes(rng, min(self.splits, self.length // self.bound.config.vision.patch_size), self.most)

        def make(item: Item, draw: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            view = placed(item, preprocess, self.augment, self.length, draw)
            size, rule = preprocess.config.size, preprocess.config.interpolation
            cut = [preprocess.normalize(np.asarray(view.cut(box, size, rule))) for box in grid.tolist()]
            return torch.from_numpy(np.array(view.image)).permute(2, 0, 1) / 255, torch.stack(cut)

        run = map if self.pool is None else self.pool.map
        images, crops = zip(*run(make, items, rng.spawn(len(items))), strict=True)
        return {"images": torch.stack(images), "boxes": grid.repeat(len(items), 1, 1), "crops": torch.stack(crops)}

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return what both teachers and the student say of boxes and patches."""
        images, boxes = batch["images"], batch["boxes"].float()
        hidden = enter(encoder, images)
        maps = hidden.project(hidden.attend(self.rule)).float()
        block = hidden.block
        context = block.attention.q(block.norm1(hidden.inputs[-1]))[:, hidden.prefix :]
        found = {"region": roi_align(maps, boxes, self.tokens).flatten(2, 3), "context": context}
        with torch.no_grad():
            teacher = self._frozen(images.device)
            crops = batch["crops"]
            found["teacher"] = teacher.encode_image(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
            seen = features_of(self.relations, enter(teacher, images, sides=(SIDE,)))
            seen = F.adaptive_avg_pool2d(seen.permute(0, 3, 1, 2).float(), hidden.grid).permute(0, 2, 3, 1)
            near = similarities(seen)
            found["relations"] = near if self.maps is None else completed(near, self.maps(images))
            if self.form == "divergence":
                inside = roi_align(seen, boxes, self.tokens).flatten(2, 3)
                found["region_relations"] = similarities(inside.flatten(0, 1)).unflatten(0, inside.shape[:2])
        return found

    def _frozen(self, device: torch.device) -> Encoder:
        self.teacher = (self.teacher if self.teacher is not None else copy.deepcopy(self.bound)).to(device)
        return self.teacher

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return content and weighted context of this process; every process has as many boxes and patches."""
        rows = {name: features[name].flatten(0, 1) for name in ("region", "teacher")}
        inside = features["region_relations"].flatten(0, 1) if "region_relations" in features else None
        return self.loss(**rows, context=features["context"], relations=features["relations"], region_relations=inside,
                         **self.options)  # fmt: skip


def grid_boxes(rng: np.random.Generator, splits: int, most: int) -> torch.Tensor:
    """Draw a grid of boxes that fill an image: (K, 4), shares, K = rows x columns <= most.

    >>> grid_boxes(np.random.default_rng(0), 1, 20)
    tensor([[0., 0., 1., 1.]])
    """
    rows = int(rng.integers(1, min(splits, most) + 1))
    columns = int(rng.integers(1, min(splits, most // rows) + 1))
    if rows * columns == 1:
        return torch.tensor([ALL])
    y, x = torch.arange(rows) / rows, torch.arange(columns) / columns
    top, left = (v.flatten() for v in torch.meshgrid(y, x, indexing="ij"))
    return torch.stack([left, top, left + 1 / columns, top + 1 / rows], 1).clamp(max=1.0)
