"""What methods that learn the inputs of frozen towers share: an estimator, its training, its file.

A method derives from `PromptMethod` and writes up to four functions; p are its learned tensors by name, x what is kept
of a batch of images, rows the numbers of the classes wanted:

    start(encoder)    -> p before the first step; sets nothing, works on the meta device (parameter counts)
    texts(p, x, rows) -> unit class vectors (c, dim), or (c, B, dim) where they depend on the images (`per_image`)
    images(p, x)      -> unit image vectors (B, dim); as kept unless the image tower is prompted
    loss(p, x, y, images, texts) -> cross entropy unless there is more to it

(`parts` has beginnings of both) and, where needed, `ready` (constants made once per encoder and names, such as
`class_sentences`), `look` (what is kept of pixels), `draw` (which view a step sees) and `optimizer`. `keeps` says what
an image is to the method: "features", its vector, for a tower that does not change (it then runs once per view, and fit
takes vectors too); "stem", what comes before the first block; "own", what `look` returns.

Memory does not grow with the number of classes: text is encoded a few classes at a time, once without graph and once
more with it, by the same `cached_backward` that the training loop uses for large batches. That loop itself is for
image-text pairs from disk; steps here take milliseconds and need no processes, feeds or logs, so its schedule and
gradients are used and its machinery is not. Class vectors that do not depend on the image are computed once.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from ..errors import ClipworksError, check_range
from ..heads.common import class_numbers, softmax
from ..progress import Progress
from ..training.augment import AUGMENTS, Augment
from ..training.gradcache import cached_backward
from ..training.schedule import learning_rate
from ..zeroshot.classifier import check_names
from .files import read_learned, write_learned
from .kept import Kept, keep_images
from .parts import frozen, need_tokens
from .words import Sentences

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

Learned = dict[str, torch.Tensor]
M = TypeVar("M", bound="PromptMethod")
WARM_LR = 1e-5  # of the first epoch, in the released code of CoOp and of all that follow it
TOKENS = 1024  # of text in one backward pass: about 0.7 GB in the text tower of ViT-B


class PromptMethod(ClassifierMixin, BaseEstimator, ABC):
    """Base of the methods. Settings of all: encoder, names, epochs, lr, batch_size, views, chunk, seed.

    After `fit`: `classes_` (labels in the order of all columns), `names_`, `learned_` (what was learned, by name),
    `losses_` (one per step).
    """

    keeps: ClassVar[str] = "features"
    per_image: ClassVar[bool] = False
    crops: ClassVar[Augment] = AUGMENTS["crop"]  # type: ignore[assignment]
    momentum: ClassVar[float] = 0.9
    weight_decay: ClassVar[float] = 5e-4

    encoder: Any
    names: Sequence[str] | None
    epochs: int
    lr: float
    batch_size: int
    views: int
    chunk: int | None
    seed: int
    classes_: np.ndarray
    names_: list[str]
    learned_: Learned
    losses_: np.ndarray
    _vectors: torch.Tensor | None

    # -- what a method writes ------------------------------------------------------------------------------------

    @abstractmethod
    def start(self, encoder: Encoder) -> Learned:
        """Learned tensors before the first step."""

    def ready(self, encoder: Encoder) -> None:
        """Make what does not change while learning, from `encoder` and `names_`; names begin with `_`."""

    def look(self, encoder: Encoder, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is kept of a batch of pixels; runs without gradients."""
        if self.keeps == "features":
            return {"image": encoder.encode_image(pixels)}
        need_tokens(type(self).__name__, encoder)
        return {"stem": encoder.visual.stem(pixels.to(encoder.dtype))}

    def draw(self, kept: Kept, rows: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """One view of each of these images, on the device of the encoder."""
        return kept.take(rows, rng.integers(kept.views, size=len(rows)), self.model.device)

    @abstractmethod
    def texts(self, p: Learned, x: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Unit class vectors (c, dim), or (c, B, dim) where they depend on the images."""

    def images(self, p: Learned, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """Unit image vectors (B, dim)."""
        return x["image"]

    def loss(
        self, p: Learned, x: dict[str, torch.Tensor], y: torch.Tensor, images: torch.Tensor, texts: torch.Tensor
    ) -> torch.Tensor:
        """Mean loss of a batch; `y` are class numbers."""
        return F.cross_entropy(self.scores(images, texts), y)

    def step_tokens(self, batch: int) -> int:
        """Tokens of text that one class costs in a step on `batch` images."""
        sentences: Sentences | None = getattr(self, "_sentences", None)
        return 0 if sentences is None else sentences.tokens_per_class() * (batch if self.per_image else 1)

    # -- estimator -----------------------------------------------------------------------------------------------

    @property
    def model(self) -> Encoder:
        """The encoder; loaded when first needed if it was given by name."""
        if getattr(self, "_encoder", None) is None:
            from ..encoders.loading import resolve

            given = self.encoder
            self._encoder = resolve(given)
        return self._encoder

    def fit(self: M, images: Any, y: Any, *, names: Sequence[str] | None = None, progress: bool | None = None) -> M:
        """Learn from labelled images.

        Parameters
        ----------
        images : n paths, PIL images, uint8 arrays or items; float pixels (n, 3, H, W); what `keep` returned; and
            where the image tower is left as it is also `Features` or vectors (n, dim) or (n, views, dim)
        y : n labels, numbers into the names or the names themselves
        names : C class names in the order of the labels (default: the setting, or else the sorted labels)
        progress : show a bar (default: on a terminal)

        Raises
        ------
        ClipworksError
            If an image cannot be used, or labels, names and images do not belong together.
        """
        numbers = self._open(y, names)
        kept = self._kept(images, self.views)
        if len(kept) != len(numbers):
            raise ClipworksError(f"y must hold one label per image ({len(kept)}). Got {len(numbers)}.")
        self._remake()
        p = {name: value.detach().to(self.model.device).clone() for name, value in self.start(self.model).items()}
        self.losses_ = np.array(self._train(p, kept, torch.from_numpy(numbers), progress) if p else [])
        self._learn(p)
        return self

    def keep(self, images: Any, views: int = 1) -> Kept:
        """Look at images once, for several fits or predictions: the first view is the image, the others are crops."""
        return self._kept(images, views)

    def logits(self, images: Any) -> np.ndarray:
        """Return logits (n, C): the encoder's scale times the cosine."""
        check_is_fitted(self, "learned_")
        kept = self._kept(images, 1)
        self._remake()
        p = {name: value.to(self.model.device) for name, value in self.learned_.items()}
        found = []
        with frozen(self.model), torch.no_grad():
            for rows in batches(np.arange(len(kept)), 32):
                x = kept.take(rows, np.zeros(len(rows), int), self.model.device)
                found.append(self.scores(self.images(p, x), self._class_vectors(p, x)).double().cpu())
        return torch.cat(found).numpy()

    def predict_proba(self, images: Any) -> np.ndarray:
        """Return probabilities (n, C), columns in the order of `classes_`."""
        return softmax(self.logits(images))

    def predict(self, images: Any) -> np.ndarray:
        """Return the most probable label of every image."""
        best = self.logits(images).argmax(1)
        return self.classes_[best]

    def score(self, images: Any, y: Any) -> float:  # type: ignore[override]
        """Return the share of images that get their label."""
        check_is_fitted(self, "learned_")
        numbers = self._numbers(y)
        best = self.logits(images).argmax(1)
        if numbers.shape != best.shape:
            raise ClipworksError(f"y must hold one label per image ({len(best)}). Got {len(numbers)}.")
        return float(np.mean(best == numbers))

    def class_vectors(self) -> torch.Tensor:
        """Return the unit class vectors (C, dim) that were learned, for heads and searches; not where they depend on
        the image."""
        check_is_fitted(self, "learned_")
        if self.per_image:
            raise ClipworksError(f"{type(self).__name__} has other class vectors for every image; call logits.")
        self._remake()
        with frozen(self.model), torch.no_grad():
            return self._class_vectors({k: v.to(self.model.device) for k, v in self.learned_.items()}, {}).cpu()

    def to_new(self: M, names: Sequence[str]) -> M:
        """Return the same learned inputs with other classes, whose labels are 0, 1, ... (base-to-new, transfer)."""
        check_is_fitted(self, "learned_")
        made = copy.copy(self)
        made.names_ = check_names(names)
        made.classes_ = np.arange(len(made.names_))
        made._encoder = self.model  # copies leave out what begins with an underscore
        return made

    def save(self, path: Any) -> None:
        """Write what was learned, the settings and the class names; not the encoder."""
        check_is_fitted(self, "learned_")
        write_learned(path, self, self.model.fingerprint)

    @classmethod
    def load(cls: type[M], path: Any, encoder: Any = None) -> M:
        """Read what `save` wrote.

        Parameters
        ----------
        path : the file
        encoder : the encoder, its name or path; default: the bundled one. It must be the one that was learned with.
        """
        settings, names, labels, learned, fingerprint = read_learned(path, cls)
        made = cls(encoder=encoder, **settings)
        if made.model.fingerprint != fingerprint:
            raise ClipworksError(f"encoder must be the one that {path} was learned with, {fingerprint[:12]}. "
                                 f"Got {made.model.fingerprint[:12]}.")  # fmt: skip
        made.names_, made.classes_, made.losses_ = names, labels, np.zeros(0)
        made._learn(learned)
        return made

    def scores(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of unit image vectors (B, dim) and class vectors (C, dim) or (C, B, dim)."""
        if texts.ndim == 3:
            return self.model.logit_scale * (images * texts).sum(-1).T
        return self.model.logit_scale * images @ texts.T

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    # -- inside --------------------------------------------------------------------------------------------------

    def _open(self, y: Any, names: Sequence[str] | None) -> np.ndarray:
        """Set `names_` and `classes_`, return the labels' class numbers."""
        for name in ("epochs", "batch_size", "views"):
            check_range(name, getattr(self, name), 1)
        check_range("lr", self.lr, 0)
        labels = _labels(y)
        given = self.names if names is None else names
        if given is None and labels.dtype.kind in "iu":
            raise ClipworksError("names must hold the class names where labels are numbers. Got None.")
        self.names_ = check_names(np.unique(labels).tolist() if given is None else given)
        if len(self.names_) < 2:
            raise ClipworksError(f"names must hold at least 2 classes. Got {self.names_}.")
        self.classes_ = np.arange(len(self.names_)) if labels.dtype.kind in "iu" else np.array(self.names_)
        self._made = False
        return self._numbers(y)

    def _numbers(self, y: Any, argument: str = "y") -> np.ndarray:
        """Class numbers of labels that are numbers or names."""
        labels = _labels(y, argument)
        known = np.arange(len(self.names_)) if labels.dtype.kind in "iu" else np.array(self.names_)
        return class_numbers(argument, labels, known).astype(np.int64)

    def _kept(self, images: Any, views: int) -> Kept:
        with frozen(self.model):
            return keep_images(images, self.model, self.look, self.keeps, views, self.seed, self.crops)

    def _learn(self, p: Learned) -> None:
        # clones: the last bits of a product depend on where its factors lie in memory, and files place them elsewhere
        self.learned_ = {name: value.detach().cpu().clone() for name, value in p.items()}
        self._vectors = None

    def _remake(self) -> None:
        """Make what depends on encoder and names, unless it is there."""
        if not getattr(self, "_made", False):
            self.ready(self.model)
            self._made, self._vectors = True, None

    def _class_vectors(self, p: Learned, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """Class vectors without graph, a few classes at a time; kept where they do not depend on the image."""
        if self._vectors is not None:
            return self._vectors
        every = torch.arange(len(self.names_), device=self.model.device)
        size = self._classes_at_a_time(len(next(iter(x.values()))) if x else 1)
        found = torch.cat([self.texts(p, x, rows) for rows in every.split(size)])
        self._vectors = None if self.per_image else found
        return found

    def _classes_at_a_time(self, batch: int) -> int:
        cost = max(1, self.step_tokens(batch))
        return min(len(self.names_), max(1, TOKENS // cost) if self.chunk is None else self.chunk)

    def _train(self, p: Learned, kept: Kept, y: torch.Tensor, progress: bool | None) -> list[float]:
        """Momentum and cosine, the first epoch at a small constant rate; returns the loss of every step."""
        rng, losses = np.random.default_rng(self.seed), []
        for value in p.values():
            value.requires_grad_()
        optimizer = self.optimizer(p)
        with frozen(self.model), torch.enable_grad():
            for epoch in Progress(range(self.epochs), self.epochs, "learning prompts", enabled=progress):
                for group in optimizer.param_groups:
                    group["lr"] = self.rate(epoch)
                for rows in batches(rng.permutation(len(y)), self.batch_size):
                    x = self.draw(kept, rows, rng)
                    losses.append(self.backward(p, x, y[rows].to(self.model.device)))
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                if not np.isfinite(losses[-1]):
                    raise ClipworksError(f"the loss is {losses[-1]} in epoch {epoch + 1}. Lower lr ({self.lr}).")
        return losses

    def optimizer(self, p: Learned) -> torch.optim.Optimizer:
        """What steps; its rate is set by `rate`."""
        return torch.optim.SGD(p.values(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch: a small one for the first (of several), then the cosine over all epochs."""
        warm = min(1, self.epochs - 1)
        return min(WARM_LR, self.lr) if epoch < warm else learning_rate(epoch - warm, lr=self.lr, total=self.epochs)

    def backward(self, p: Learned, x: dict[str, torch.Tensor], y: torch.Tensor) -> float:
        """Add the gradient of one batch to the learned tensors; returns the loss."""
        found = cached_backward(
            lambda piece: {"texts": self.texts(p, x, piece["rows"])},
            lambda f: {"loss": self.loss(p, x, y, self.images(p, x), f["texts"])},
            {"rows": torch.arange(len(self.names_), device=self.model.device)},
            micro_batch=self._classes_at_a_time(len(y)),
        )
        return float(found["loss"])


def batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive pieces of at most `size` rows; the last may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _labels(y: Any, argument: str = "y") -> np.ndarray:
    labels = np.asarray(y.detach().cpu() if isinstance(y, torch.Tensor) else y)
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iuUO":
        raise ClipworksError(
            f"{argument} must be a list of class numbers or names, one per image. "
            f"Got {labels.dtype} of shape {labels.shape}."
        )
    return labels.astype(str) if labels.dtype.kind == "O" else labels
