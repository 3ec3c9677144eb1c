"""Distillation: a student encoder learns from the vectors of a frozen teacher, which are computed once.

Claim: feature, relation and interactive terms on top of the contrastive loss make a small student far better
(CLIP-KD, ImageNet zero-shot, ViT-T/16 from a ViT-B/16: 30.6 alone, 34.9 with the sum; from a strong ViT-L/14 40.9).

Formula: L = clip + 1 * CRD + 1 * ICL + 2000 * FD, with student rows u, w (image, text) and teacher rows v, y:
FD = mean (u - v)^2 + mean (w - y)^2;  CRD = KL(softmax(s_t v y^T) || softmax(s u w^T)), both ways;
ICL = (CE(s' u y^T) + CE(s' w v^T)) / 2, student of one side against teacher of the other.

Paper: Yang et al. 2024, CLIP-KD: An Empirical Study of CLIP Model Distillation (CVPR); stored views and vectors as in
Vasu et al. 2024, MobileCLIP (dataset reinforcement).
Differs from the papers: a teacher may have one side only, and then only FD of that side applies; other widths go
through a linear map that is trained along; the scale of ICL is a logarithm and is exponentiated. With `views` above 1
student and teacher see the same K stored crops of every image, never different ones.
Defaults: weights, lr 1e-3 and weight decay 0.1 from CLIP-KD's released code (there for batches of 1024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.item import Item
from ..errors import ClipworksError, check_choice, check_range
from ..registry import get_method, method
from .augment import Augment, open_image, resolve_augment
from .feed import open_items, open_pairs
from .gather import gather
from .loop import TrainReport, train
from .recipe import ContrastiveRecipe
from .run import resolve_model, start_processes
from .teacher import TeacherRows, Views, teacher_rows

if TYPE_CHECKING:
    from ..encoders.config import EncoderConfig
    from ..encoders.encoder import Encoder

WEIGHTS = {"fd": 2000.0, "crd": 1.0, "icl": 1.0, "clip": 1.0}


class DistillRecipe(nn.Module):
    """A step of distillation: the student's view and words, the teacher's rows for the same.

    Parameters
    ----------
    student : the encoder that learns
    items : all samples, in the order of `rows`
    rows : the teacher's vectors
    losses : weight by term: "fd", "crd", "icl", "clip"
    views : the stored views
    teacher_scale : logit scale of the teacher
    """

    split = True

    def __init__(
        self,
        student: Encoder,
        items: Sequence[Item],
        rows: TeacherRows,
        losses: Mapping[str, float],
        views: Views,
        teacher_scale: float,
    ):
        super().__init__()
        self.plain = ContrastiveRecipe("infonce", None)
        self.index = {item.key: i for i, item in enumerate(items)}
        self.rows, self.weights, self.views, self.teacher_scale = rows, dict(losses), views, teacher_scale
        self.captions = set(losses) != {"fd"} or rows.text is not None
        wanted = {"fd", "icl"} & set(losses)
        draw = torch.Generator().manual_seed(views.seed)
        self.image_map = self._map(student.dim, rows.image, wanted, draw)
        self.text_map = self._map(student.dim, rows.text, wanted, draw)
        # ICL compares across models, so it has a scale of its own
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07))) if "icl" in losses else None

    @staticmethod
    def _map(width: int, rows: torch.Tensor | None, wanted: set[str], draw: torch.Generator) -> nn.Module:
        if rows is None or rows.shape[-1] == width or not wanted:
            return nn.Identity()
        layer = nn.Linear(width, rows.shape[-1], bias=False)
        nn.init.normal_(layer.weight, std=width**-0.5, generator=draw)
        return layer

    @property
    def settings(self) -> dict[str, Any]:
        return {"losses": self.weights, "views": repr(self.views), "teacher_scale": self.teacher_scale}

    def bind(self, encoder: Encoder, pool: Any) -> None:
        self.plain.bind(encoder, pool)

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return the student's pixels and tokens and the teacher's rows of the same views."""
        here = [self.index[item.key] for item in items]
        numbers = [int(draw.integers(self.views.count)) for draw in rng.spawn(len(items))]
        run = map if self.plain.pool is None else self.plain.pool.map
        found: dict[str, Any] = {"pixels": torch.stack(list(run(self._pixels, items, numbers)))}
        if self.captions:
            found["tokens"] = self.plain.bound.tokenize([item.caption or "" for item in items])
        if self.rows.image is not None:
            found["teacher_image"] = self.rows.image[here, numbers]
        if self.rows.text is not None:
            found["teacher_text"] = self.rows.text[here]
        return found

    def _pixels(self, item: Item, number: int) -> torch.Tensor:
        preprocess, augment = self.plain.bound.preprocess, self.views.augment
        if augment is None:
            return preprocess(item.source(), key=item.key)
        size, interpolation = preprocess.config.size, preprocess.config.interpolation
        made = augment(open_image(item, preprocess), size, self.views.draw(item.key, number), interpolation)
        return preprocess.normalize(np.asarray(made))

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return student rows, the same mapped into the teacher's space, teacher rows, and the scales."""
        found = {"image": encoder.encode_image(batch["pixels"]), "scale": encoder.log_scale.exp().reshape(())}
        found["image_there"] = F.normalize(self.image_map(found["image"]), dim=-1)
        if "tokens" in batch:
            found["text"] = encoder.encode_text(batch["tokens"])
            found["text_there"] = F.normalize(self.text_map(found["text"]), dim=-1)
        if self.log_scale is not None:
            found["icl_scale"] = self.log_scale.exp().clamp(max=100.0).reshape(())
        for side in ("teacher_image", "teacher_text"):
            if side in batch:
                found[side] = F.normalize(batch[side], dim=-1)
        return found

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weighted terms; rows of all processes enter each."""
        found = {}
        f = {name: gather(value) if value.ndim else value for name, value in features.items()}
        for name, weight in self.weights.items():
            if name == "clip":
                value = self.plain.losses(features)[self.plain.loss_name]
            else:
                value = TERMS[name](f, self.teacher_scale)
            found[name] = weight * value
        return found

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return self.losses(self.features(encoder, batch))


def _fd(f: dict[str, torch.Tensor], teacher_scale: float) -> torch.Tensor:
    loss = get_method("feature_distillation", "losses")
    pairs = [(f[f"{s}_there"], f[f"teacher_{s}"]) for s in ("image", "text") if f"teacher_{s}" in f]
    return torch.stack([loss(student, teacher) for student, teacher in pairs]).sum()


def _crd(f: dict[str, torch.Tensor], teacher_scale: float) -> torch.Tensor:
    loss = get_method("relation_distillation", "losses")
    return loss(f["image"], f["text"], f["teacher_image"], f["teacher_text"], f["scale"], teacher_scale)


def _icl(f: dict[str, torch.Tensor], teacher_scale: float) -> torch.Tensor:
    loss = get_method("interactive_distillation", "losses")
    return loss(f["image_there"], f["text_there"], f["teacher_image"], f["teacher_text"], f["icl_scale"])


TERMS = {"fd": _fd, "crd": _crd, "icl": _icl}


@method(card="distillation-foundations", level="M")
def distill(
    data: Any,
    teacher: str | Encoder | Any,
    student: EncoderConfig | str | Encoder = "clipworks-small",
    *,
    out: str | Path,
    losses: str | Mapping[str, float] | None = None,
    views: int = 1,
    augment: str | Augment = "light",
    teacher_scale: float | None = None,
    teacher_batch: int = 32,
    epochs: int = 32,
    steps: int | None = None,
    batch_size: int = 256,
    micro_batch: int | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    warmup: float = 0.1,
    schedule: str = "cosine",
    clip: float | None = None,
    precision: str = "fp32",
    ema: float | None = None,
    freeze: Sequence[str] = (),
    layer_decay: float | None = None,
    validation: str | Any = None,
    names: Sequence[str] | Mapping[str, str] | None = None,
    templates: str | Sequence[str] = "default",
    evaluate_every: int | None = None,
    save_every: int | None = None,
    tensorboard: bool = False,
    distributed: str = "ddp",
    device: str = "auto",
    workers: int | None = None,
    on_error: str = "raise",
    timeout: float = 3600.0,
    seed: int = 0,
    resume: str = "auto",
    progress: bool | None = None,
) -> TrainReport:
    """Train a student encoder on a teacher's vectors.

    Parameters
    ----------
    data : anything `open_source` takes, or (image, caption) pairs; captions may lack where only "fd" of images is used
    teacher : name or path of an encoder, or any object with `images(list)` and/or `texts(list)` that return rows
    student : configuration (or JSON file of one) to train from scratch; name, weights file or encoder to go on from
    out : folder of the run; the teacher's vectors are kept in its folder `teacher`
    losses : weights such as "fd=2000,crd=1,icl=1,clip=1" (CLIP-KD, the default for a teacher with both sides;
        "fd=2000,clip=1" otherwise)
    views : stored views per image; 1 is the plain view, more are crops that student and teacher share
    augment : how views beyond the plain one are drawn: "light", "standard", "strong"
    teacher_scale : logit scale of the teacher (default: its own, else 100)
    teacher_batch : images per call of the teacher
    epochs, steps, batch_size, micro_batch, lr, weight_decay, warmup, schedule, clip, precision : as in `train`
    ema, freeze, layer_decay, validation, names, templates, evaluate_every, save_every, tensorboard : as in `train`
    distributed, device, workers : as in `train`
    on_error : "raise" at an unusable image, or "skip" to leave it out
    timeout : seconds after which a process that waits for another gives up; must cover the teacher's pass
    seed, resume, progress : as in `train`

    Returns
    -------
    TrainReport

    Raises
    ------
    ClipworksError
        If a term is unknown, or needs a side that the teacher lacks.

    Inputs
    ------
    images with captions; no labels

    Relations
    ---------
    With losses="clip=1" it is plain contrastive training. CRD ignores rotations of either space and works across
    widths; FD and ICL tie the student to the teacher's space.

    References
    ----------
    Yang et al. 2024, CLIP-KD; Vasu et al. 2024, MobileCLIP

    Examples
    --------
    >>> parse_losses("fd=2000,clip=1")
    {'fd': 2000.0, 'clip': 1.0}
    """
    check_range("views", views, 1)
    start_processes(device, timeout)
    if isinstance(teacher, str):
        from ..encoders.loading import load

        teacher = load(teacher)
    weights = check_losses(parse_losses(losses), teacher)
    encoder = resolve_model(student, seed)
    items = open_pairs(data) if needs_words(weights, teacher) else open_items(data)
    stored = Views(views, resolve_augment(augment) if views > 1 else None, seed)
    rows = teacher_rows(teacher, items, stored, encoder.preprocess, Path(out) / "teacher", batch_size=teacher_batch,
                        on_error=on_error, progress=progress)  # fmt: skip
    scale = teacher_scale if teacher_scale is not None else float(getattr(teacher, "logit_scale", 100.0))
    kept = rows.good.nonzero().flatten()
    items = [items[i] for i in kept.tolist()]
    image, text = (None if side is None else side[kept] for side in (rows.image, rows.text))
    rows = TeacherRows(image, text, rows.good[kept])
    return train(
        items, encoder, out=out, recipe=DistillRecipe(encoder, items, rows, weights, stored, scale), epochs=epochs,
        steps=steps, batch_size=batch_size, micro_batch=micro_batch, lr=lr, weight_decay=weight_decay, warmup=warmup,
        schedule=schedule, clip=clip, precision=precision, ema=ema, freeze=freeze, layer_decay=layer_decay,
        validation=validation, names=names, templates=templates, evaluate_every=evaluate_every, save_every=save_every,
        tensorboard=tensorboard, distributed=distributed, device=device, workers=workers, on_error=on_error,
        timeout=timeout, seed=seed, resume=resume, progress=progress,
    )  # fmt: skip


def parse_losses(losses: str | Mapping[str, float] | None) -> dict[str, float] | None:
    """Return weights by term from a mapping or from text such as "fd=2000,crd=1"."""
    if losses is None or isinstance(losses, Mapping):
        return None if losses is None else {str(name): float(weight) for name, weight in losses.items()}
    found = {}
    for part in losses.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            raise ClipworksError(f"losses must look like 'fd=2000,clip=1'. Got {losses!r}.") from None
    return found


def check_losses(weights: Mapping[str, float] | None, teacher: Any) -> dict[str, float]:
    """Return the terms to use, refusing unknown ones and those that need a side that the teacher lacks."""
    both = hasattr(teacher, "images") and hasattr(teacher, "texts")
    if weights is None:
        return dict(WEIGHTS) if both else {"fd": WEIGHTS["fd"], "clip": WEIGHTS["clip"]}
    for name, weight in weights.items():
        check_choice("losses", name, WEIGHTS)
        check_range(f"losses[{name!r}]", weight, 0)
        if name in ("crd", "icl") and not both:
            lacking = "texts()" if hasattr(teacher, "images") else "images()"
            raise ClipworksError(f"losses={name!r} needs a teacher with images() and texts(). This has no {lacking}.")
    used = {name: weight for name, weight in weights.items() if weight}
    if not used:
        raise ClipworksError(f"losses must give at least one term a weight above 0. Got {dict(weights)}.")
    return used


def needs_words(weights: Mapping[str, float], teacher: Any) -> bool:
    """Return whether captions are needed: always, but for feature distillation from images alone."""
    return set(weights) != {"fd"} or hasattr(teacher, "texts")
