"""SAM-CLIP: a second vision model is merged into the first, which keeps what it could by rehearsing it.

Claim: one backbone can serve two models of unlike skills, merged by distillation on a few percent of their data (SAM's
ViT-B/16 taught by CLIP: ImageNet zero-shot 72.4, CLIP itself 73.5; COCO instances mAP 40.9, SAM itself 41.2; zero-shot
segmentation mIoU on VOC 60.6).

Formula: head H = blocks (copies of the last ones), maximum over the patches, norm, feed-forward part of two hidden
layers;  L = mean(1 - cos(H(f(x)), teacher(x))) + lambda L_keep.  L_keep rehearses the first model f_0: with a `skill`
that reads masks off the map of patches, 20 focal + Dice against the masks that skill_0(f_0(x)) > 0 shows; without one,
1 - cos of the image vectors of f and f_0 and of their projected patches.
Stage I trains H alone;  stage II all, f and the skill at a tenth of H's rate;  stage III, if wanted, H alone at several
image sizes. Dense vectors are H without the maximum.

Paper: Wang et al. 2024, SAM-CLIP: Merging Vision Foundation Models towards Semantic and Spatial Understanding (CVPR
workshops, arXiv 2310.15308).
Differs from the paper: any image transformer is the student and any encoder, or any module that gives feature maps, the
teacher; a teacher that gives maps is matched at every patch. Masks to rehearse are the first model's own, all of them.
Images of stage III are enlarged, not read anew.
Defaults: 3 layers, lambda 10, 20 epochs at 8e-4, then 16 at 4e-5, a tenth of that for the backbone: paper; batch 64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ..data.item import Item
from ..encoders.encoder import Encoder
from ..encoders.loading import resolve
from ..errors import ClipworksError, check_range
from ..pretraining.parts import need_vit
from ..registry import method
from ..segment.mask_losses import dice_loss, pixel_loss
from ..training.augment import Augment, resolve_augment
from ..training.recipe import ContrastiveRecipe
from ..zeroshot.classifier import check_names, class_vectors
from .common import TEMPLATE, Tuned, Tuner, only, run
from .merging import MergeHead, Teacher, cosine_distance, match
from .shots import Shots, as_given, check_images

T = TypeVar("T", bound="SAMCLIP")
FOCAL = {"gamma": 2.0, "alpha": 0.25}


@method(card="sam-clip", level="M")
class SAMCLIP(Tuner):
    """Teach the image tower of an encoder what another vision model knows, and keep what it could.

    Parameters
    ----------
    names : class names of what is predicted, by the words of the encoder (the skill that is kept)
    encoder : the student and what is rehearsed, an encoder, or its name or path; default: the bundled one
    teacher : encoder (its vectors), its name or path, or a module from RGB in [0, 1] to a map (B, D, h, w); default:
        the encoder itself, whose vectors the new head then learns to give for every patch
    skill : module from the map of patches (B, width, h, w) to mask logits (B, M, h', w'), trained on the encoder
        before, whose masks are rehearsed; default: the encoder's own vectors are
    keep_weight : lambda, of the rehearsal
    head_layers : blocks of the new head
    hidden : width of its hidden layers; default: four times the tower's
    templates : sentence around the names
    lr : of the head in the second stage, of AdamW
    backbone_rate : learning rate of the tower and the skill, as a multiple of `lr`
    probe_rate : learning rate of the first stage, as a multiple of `lr`
    weight_decay : of AdamW
    probe_epochs, epochs : passes over the images in the first and second stage; 0 leaves a stage out
    sizes : image sizes of the third stage, in pixels; none leaves it out
    size_epochs : passes of the third stage
    batch_size : images per step
    rehearsal_size : further images per step, where `fit` is given images to rehearse on
    augment : views: "light", "crop" (8 % and more, flip), "none", "standard", "strong"
    seed : of the head, order and views

    Attributes
    ----------
    encoder_, classes_, classifier_, alpha_, losses_ : see `common.Tuner`; `encoder_.merged` is the new head

    Inputs
    ------
    images; labels are not needed

    Relations
    ---------
    With `keep_weight` 0 it is plain feature distillation. `vr_lwf` rehearses similarities to words instead, and
    `training/distill` teaches a student that has nothing to keep.

    References
    ----------
    Wang et al. 2024, SAM-CLIP: Merging Vision Foundation Models towards Semantic and Spatial Understanding

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> tuner = SAMCLIP(encoder=toy_encoder(tokenizer=CLIPTokenizer()), probe_epochs=1, epochs=1)
    >>> tuner.fit(pixels, ["cat", "cat", "dog", "dog"]).maps(pixels).shape
    torch.Size([4, 4, 4, 8])
    """

    frozen = ("text.*", "log_scale")

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        teacher: str | Any = None,
        skill: Any = None,
        keep_weight: float = 10.0,
        head_layers: int = 3,
        hidden: int | None = None,
        templates: str | Sequence[str] = TEMPLATE,
        lr: float = 4e-5,
        backbone_rate: float = 0.1,
        probe_rate: float = 20.0,
        weight_decay: float = 0.05,
        probe_epochs: int = 20,
        epochs: int = 16,
        sizes: Sequence[int] = (),
        size_epochs: int = 3,
        batch_size: int = 64,
        rehearsal_size: int = 16,
        augment: str = "light",
        seed: int = 0,
    ):
        self.names, self.encoder, self.teacher, self.skill = names, encoder, teacher, skill
        self.keep_weight, self.head_layers, self.hidden, self.templates = keep_weight, head_layers, hidden, templates
        self.lr, self.backbone_rate, self.probe_rate, self.weight_decay = lr, backbone_rate, probe_rate, weight_decay
        self.probe_epochs, self.epochs, self.sizes, self.size_epochs = probe_epochs, epochs, sizes, size_epochs
        self.batch_size, self.rehearsal_size, self.augment, self.seed = batch_size, rehearsal_size, augment, seed

    def fit(
        self: T, images: Any, y: Any = None, *, rehearsal: Any = None, validation: Any = None,
        progress: bool | None = None,
    ) -> T:  # fmt: skip
        """Learn from images.

        Parameters
        ----------
        images, y, validation, progress : as in `common.Tuner.fit`; y only says which classes there are
        rehearsal : images that show the old skill; default: the batch itself is rehearsed
        """
        self._rehearsal = None if rehearsal is None else check_images(rehearsal)
        try:
            return super().fit(images, y, validation=validation, progress=progress)
        finally:
            del self._rehearsal

    # -- the new skill ---------------------------------------------------------------------------------------------

    def teacher_vectors(self, images: Any, *, batch_size: int = 32) -> torch.Tensor:
        """Return what the new head says of images: unit rows (n, D) in the teacher's space."""
        return self._read(images, lambda head, out: head(out.patches), batch_size)

    def maps(self, images: Any, *, size: int | None = None, batch_size: int = 32) -> torch.Tensor:
        """Return a unit vector of the teacher's space for every patch, (n, h, w, D); `size` enlarges the images."""
        return self._read(images, lambda head, out: head.dense(out.patches).unflatten(1, out.grid), batch_size, size)

    def segment(self, images: Any, names: Sequence[str], *, size: int | None = None) -> np.ndarray:
        """Return the number of the nearest name for every pixel of the (enlarged) images, (n, size, size).

        Background is a name like the others: give it words of its own ("sky", "wall") if there is one.
        """
        words = class_vectors(check_names(names), self._words_of(), templates=self.templates)
        scores = (self.maps(images, size=size) @ words.T).movedim(-1, 1)
        side = self.encoder_.image_size if size is None else size
        return F.interpolate(scores, (side, side), mode="bilinear", align_corners=False).argmax(1).numpy()

    def teacher_logits(self, images: Any, names: Sequence[str]) -> np.ndarray:
        """Return scale * cosine of the new head's vectors and the teacher's class words, (n, C)."""
        model = self._words_of()
        words = class_vectors(check_names(names), model, templates=self.templates)
        return (model.logit_scale * self.teacher_vectors(images) @ words.T).numpy()

    # -- training --------------------------------------------------------------------------------------------------

    def _shape(self, encoder: Encoder) -> None:
        need_vit(encoder, "SAMCLIP")
        check_range("head_layers", self.head_layers, 0)
        width = encoder.config.vision.width
        hidden = 4 * width if self.hidden is None else int(check_range("hidden", self.hidden, 1))
        out = self._taught(encoder).width(encoder.image_size)
        encoder.add_module("merged", MergeHead(encoder.visual, self.head_layers, hidden, out).to(encoder.dtype))
        if self.skill is not None:
            encoder.add_module("skill", copy.deepcopy(self.skill).to(encoder.dtype).requires_grad_(True))

    def _merge(self, encoder: Encoder) -> None:
        for name in ("merged", "skill"):
            if hasattr(encoder, name):
                delattr(encoder, name)

    def _open(self, images: Any, y: Any) -> Shots:
        if y is not None:
            return super()._open(images, y)
        listed = check_images(images)
        self.names_ = None if self.names is None else check_names(self.names)
        self.classes_ = np.asarray(self.names_ or [])
        return Shots([Item(str(i), image) for i, image in enumerate(listed)], None)

    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        for name in ("keep_weight", "backbone_rate", "probe_rate", "probe_epochs", "epochs", "size_epochs"):
            check_range(name, getattr(self, name), 0)
        if not self.probe_epochs and not self.epochs:
            raise ClipworksError("probe_epochs or epochs must be at least 1. Got 0 of both.")
        common: dict[str, Any] = {"batch_size": self.batch_size, "weight_decay": self.weight_decay, "clip": 1.0,
                                  "seed": self.seed, "progress": progress}  # fmt: skip
        parts: dict[str, Any] = {"teacher": self._taught(start), "augment": resolve_augment(self.augment)}
        head = {"freeze": only("merged.*"), "lr": self.probe_rate * self.lr, **common}
        tuned = Tuned(start, {})
        if self.probe_epochs:
            tuned = run(start, shots.items, MergeRecipe(**parts), epochs=self.probe_epochs, **head)
        if self.epochs:
            more = [] if self._rehearsal is None else [Item(str(i), x) for i, x in enumerate(self._rehearsal)]
            recipe = MergeRecipe(**parts, old=start, weight=self.keep_weight, more=more, count=self.rehearsal_size)
            slow = ["visual.*", *(["skill.*"] if self.skill is not None and self.keep_weight else [])]
            still = ["skill.*"] if self.skill is not None and not self.keep_weight else []
            tuned = run(tuned.encoder, shots.items, recipe, freeze=(*self.frozen, *still), lr=self.lr,
                        rates=dict.fromkeys(slow, self.backbone_rate), epochs=self.epochs, **common)  # fmt: skip
        if self.sizes and self.size_epochs:
            last = run(tuned.encoder, shots.items, MergeRecipe(**parts, sizes=self.sizes), epochs=self.size_epochs,
                       **{**head, "lr": self.lr})  # fmt: skip
            tuned = Tuned(last.encoder, {**tuned.losses, "sizes": last.losses["loss"]})
        return tuned

    def _taught(self, encoder: Encoder) -> Teacher:
        """The teacher, which reads what `encoder` sees."""
        if isinstance(self.teacher, nn.Module):
            return Teacher(self.teacher, encoder.config.preprocess)
        model = resolve(self.encoder if self.teacher is None else self.teacher)
        return Teacher(model, encoder.config.preprocess)

    def _words_of(self) -> Encoder:
        model = self._taught(self.encoder_).model
        if not isinstance(model, Encoder):
            raise ClipworksError(f"teacher must be an encoder to read names. Got {type(model).__name__}.")
        return model

    @torch.no_grad()
    def _read(
        self, images: Any, read: Callable[[Any, Any], torch.Tensor], batch_size: int, size: int | None = None
    ) -> torch.Tensor:
        """What `read(new head, output of the tower)` gives for images, as unit vectors."""
        check_is_fitted(self, "encoder_")
        encoder: Any = self.encoder_
        x = as_given(images)
        if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
            x = torch.stack([encoder.preprocess(image, key=str(i)) for i, image in enumerate(x)])
        views = (resized(part.to(encoder.device, encoder.dtype), size) for part in x.split(batch_size))
        found = [F.normalize(read(encoder.merged, encoder.visual.run(view)), dim=-1).cpu() for view in views]
        return torch.cat(found)


class MergeRecipe(ContrastiveRecipe):
    """A step of merging: the teacher's answers for the new head, and the old answers for what was there before.

    Parameters
    ----------
    teacher : see `merging.Teacher`
    augment : how views are drawn
    old : encoder that is rehearsed; a frozen copy is made
    weight : of the rehearsal
    more : images to rehearse on beside the batch; none: the batch itself
    count : how many of them per step
    sizes : image sizes, of which every step draws one
    """

    split, captions = False, False

    def __init__(
        self, teacher: Teacher, augment: Augment | None = None, old: Encoder | None = None, weight: float = 0.0,
        more: Sequence[Item] = (), count: int = 16, sizes: Sequence[int] = (),
    ):  # fmt: skip
        super().__init__("infonce", augment)
        self.teacher, self.weight, self.more, self.count, self.sizes = teacher, weight, more, count, list(sizes)
        self.old: Any = None if old is None else copy.deepcopy(old).requires_grad_(False).eval()

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return pixels, those to rehearse on if they are others, and the size of the step."""
        found: dict[str, Any] = {"pixels": self.pixels(items, rng.spawn(len(items)))}
        if self.more and self.weight:
            chosen = [self.more[i] for i in rng.choice(len(self.more), min(self.count, len(self.more)), replace=False)]
            found["kept"] = self.pixels(chosen, rng.spawn(len(chosen)))
        if self.sizes:
            found["size"] = int(self.sizes[int(rng.integers(len(self.sizes)))])
        return found

    def forward(self, encoder: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the distance from the teacher and, weighted, from the old answers."""
        pixels = resized(batch["pixels"], batch.get("size"))
        out, answer = encoder.visual.run(pixels), self.teacher(pixels)
        if answer.ndim == 4:
            found = {"teacher": match(encoder.merged.dense(out.patches), out.grid, answer)}
        else:
            found = {"teacher": cosine_distance(encoder.merged(out.patches), answer)}
        if self.weight and self.old is not None:
            kept = batch.get("kept")
            out, pixels = (out, pixels) if kept is None else (encoder.visual.run(kept), kept)
            found["kept"] = self.weight * self.rehearse(encoder, out, pixels)
        return found

    def rehearse(self, encoder: Any, out: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Return how far the first model's skill has moved."""
        self.old.to(pixels.device)
        with torch.no_grad():
            before = self.old.visual.run(pixels)
        if not hasattr(encoder, "skill"):
            rows = [(encoder.visual.project(out.patches), self.old.visual.project(before.patches)),
                    (out.pooled, before.pooled)]  # fmt: skip
            return cosine_distance(*rows[0]) + cosine_distance(*rows[1])
        with torch.no_grad():
            target = (self.old.skill(grid_map(before)) > 0).to(out.tokens.dtype).flatten(2)
        logits = encoder.skill(grid_map(out)).flatten(2)
        return (20 * pixel_loss(logits, target, **FOCAL) + dice_loss(logits, target)).mean()


def grid_map(out: Any) -> torch.Tensor:
    """The patches of a tower's output as a map, (B, width, h, w)."""
    return out.patches.transpose(1, 2).unflatten(2, out.grid)


def resized(pixels: torch.Tensor, size: int | None) -> torch.Tensor:
    """Pixels (B, 3, H, W) at another side; None leaves them."""
    if size is None or pixels.shape[2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)
