"""What the trained dense methods share: `fit(images, masks, names)` by the one loop, `segment`, save and load.

A method is a subclass of `TrainedDense` with its settings as keywords, `Method(encoder=None, ..., steps, batch_size,
lr, side=None, seed=0)`, in a file of its own marked `@method`, and with these parts:

    _build(encoder, names)                    an `nn.Module` of everything new that learns (`parts_` after `fit`);
                                              called under the seed, and again by `load`
    _losses(parts, encoder, images, labels)   named scalar losses, weights applied. `images` (B, 3, side, side), RGB in
                                              [0, 1], as `common.enter` takes them; `labels` int64 (B, side, side) into
                                              the names, 255 where there is none. The encoder is in evaluation mode.
    local(hidden, words)                      as for every dense method, with `self.parts_` and `self.encoder_`
    class_words(names, encoder, templates)    only if `words` are not to be the unit rows of the names asked for

and, where it needs them: `_learns(encoder)`, patterns of the encoder's parameters that learn too (then `encoder_` is a
changed copy, else the very encoder), `_rates(encoder)`, factors of their learning rate, and `_no_decay(encoder)`, all
by names such as "visual.blocks.0.norm1.weight" and "recipe.parts.gamma"; `_bind(base)`, called before `_build` in `fit`
and `load`, for what is made of encoder and names and not learned (`names_` and `words_`, the unit rows of the fitted
names, are there by then); `_train(base, items, progress)`, if one run of `_losses` is not all. A method whose scores
are no cosines overrides `probabilities(scores, scale)`: `mask_decoder.share` of a semantic map, a softmax of logits.

Decoder, heads and pooling are in `mask_decoder`, its losses in `mask_losses`. `sides` are the finer maps of a
convolutional stem that `enter` keeps, where there are any. Settings have to fit JSON, for `save`; what is saved is
`parts_` and the tensors of the encoder that changed.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from PIL import Image
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ..data.decode import decode
from ..data.item import Item
from ..encoders.loading import resolve
from ..errors import BadImage, BadWeights, ClipworksError, check_range
from ..metrics.segmentation import IGNORE
from ..registry import get_method
from ..tuning.files import read_change, write_change
from ..tuning.shots import as_given, check_images
from ..zeroshot.classifier import check_names, class_vectors
from .common import Dense

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

T = TypeVar("T", bound="TrainedDense")
Losses = Callable[[nn.Module, Any, torch.Tensor, torch.Tensor], "dict[str, torch.Tensor]"]


class TrainedDense(Dense, BaseEstimator, ABC):
    """Base of the dense methods that learn from masks.

    After `fit`: `names_`, `words_` (unit rows of the names in the encoder as it was), `encoder_`, `parts_` (what was
    learned beside it), `losses_` of the last step.
    """

    sides: ClassVar[tuple[int, ...]] = (16, 8)

    encoder: Any
    steps: int
    batch_size: int
    lr: float
    side: int | None
    seed: int
    names_: list[str]
    words_: torch.Tensor
    encoder_: Encoder
    parts_: nn.Module
    losses_: dict[str, float]
    _fingerprint: str

    # -- what a method defines -----------------------------------------------------------------------------------

    @abstractmethod
    def _build(self, encoder: Encoder, names: Sequence[str]) -> nn.Module:
        """What is new and learns."""

    @abstractmethod
    def _losses(
        self, parts: Any, encoder: Encoder, images: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Named losses of a batch, weights applied."""

    def _bind(self, base: Encoder) -> None:
        """Make what follows from encoder and names alone."""

    def _learns(self, encoder: Encoder) -> Sequence[str]:
        """Patterns of the encoder's parameters that learn, as `training.optim.freeze` takes them ("!" lets learn)."""
        return ()

    def _rates(self, encoder: Encoder) -> Mapping[str, float]:
        """Pattern of parameters -> factor of their learning rate."""
        return {}

    def _no_decay(self, encoder: Encoder) -> Sequence[str]:
        """Patterns of parameters without weight decay, beside vectors and norms, which never have any."""
        return ()

    def _train(self, base: Encoder, items: Sequence[Item], progress: bool | None) -> None:
        """Train, and set `encoder_`, `parts_` and `losses_`."""
        self._run(base, items, self._built(base), self._losses, progress)

    # -- what the base does --------------------------------------------------------------------------------------

    def fit(self: T, images: Any, masks: Any, names: Sequence[str], *, progress: bool | None = None) -> T:
        """Learn from images whose pixels have names.

        Parameters
        ----------
        images : list of paths, PIL images, encoded bytes or uint8 arrays; or a float tensor of preprocessed pixels
            (n, 3, H, W)
        masks : a label map (H, W) of every image's size: integer arrays, PIL images or paths; 0 is the first of
            `names`, 255 a pixel that does not count
        names : at most 255 class names
        progress : show a bar (default: on a terminal)
        """
        base = resolve(self.encoder)
        sources = _sources(images, base)
        self._begin(base, names)
        if not hasattr(masks, "__len__") or len(masks) != len(sources):
            got = len(masks) if hasattr(masks, "__len__") else type(masks).__name__
            raise ClipworksError(f"masks must be as many as images ({len(sources)}). Got {got}.")
        items = [Item(str(i), image, columns={"labels": mask})
                 for i, (image, mask) in enumerate(zip(sources, masks, strict=True))]  # fmt: skip
        for item in items:
            if isinstance(item.columns["labels"], np.ndarray | torch.Tensor):
                label_map(item, len(self.names_))
        check_range("steps", self.steps, 1)
        check_range("batch_size", self.batch_size, 1)
        self._train(base, items, progress)
        return self

    def predict(self, images: Any) -> Any:
        """The number of the name that every pixel has, among the fitted ones.

        Parameters
        ----------
        images : as for `fit`

        Returns
        -------
        int array (n, H, W) of images given as one tensor, else a list of arrays (H, W)
        """
        from .segmenter import Segmenter

        check_is_fitted(self, "parts_")
        sources = _sources(images, self.encoder_)
        work = Segmenter(self.names_, method=self)
        found = [work(image).labels for image in sources]
        return np.stack(found) if isinstance(as_given(images), torch.Tensor) else found

    def encoder_for(self, encoder: str | Encoder | None) -> Encoder:
        """The encoder that belongs to the trained parts; another one is an error."""
        check_is_fitted(self, "parts_")
        if encoder is not None:
            given = resolve(encoder).fingerprint
            if given not in (self._fingerprint, self.encoder_.fingerprint):
                raise ClipworksError(f"encoder must be the one that the method was trained on, "
                                     f"{self._fingerprint[:12]}. Got {given[:12]}.")  # fmt: skip
        return self.encoder_

    def save(self, path: str | os.PathLike) -> Path:
        """Write what was learned, and the settings, into one safetensors file; returns its path."""
        check_is_fitted(self, "parts_")
        tensors = {f"parts.{name}": value for name, value in self.parts_.state_dict().items()}
        base = resolve(self.encoder)
        if self.encoder_ is not base:
            before = base.state_dict()
            tensors |= {f"encoder.{name}": value for name, value in self.encoder_.state_dict().items()
                        if not torch.equal(value.cpu(), before[name].cpu())}  # fmt: skip
        settings = {k: v for k, v in self.get_params(deep=False).items() if k != "encoder"}
        record = {
            "method": type(self).__module__.rpartition(".")[2], "settings": settings, "names": self.names_,
            "fingerprint": self._fingerprint, "encoder": self.encoder if isinstance(self.encoder, str) else None,
        }  # fmt: skip
        return write_change(path, record, tensors)

    @classmethod
    def load(cls: type[T], path: str | os.PathLike, *, encoder: Any = None) -> T:
        """Return the fitted method of a file that `save` wrote.

        Parameters
        ----------
        path : the file
        encoder : the encoder it was trained on, or its name (default: the name in the file, else the bundled one)
        """
        record, tensors = read_change(path)
        name = cls.__module__.rpartition(".")[2]
        if record["method"] != name:
            raise ClipworksError(f"path must be a file of {name}. {str(path)!r} is one of {record['method']}.")
        made = cls(**{**record["settings"], "encoder": record["encoder"] if encoder is None else encoder})
        base = resolve(made.encoder)
        if base.fingerprint != record["fingerprint"]:
            raise ClipworksError(f"encoder must be the one that {str(path)!r} was trained on, "
                                 f"{record['fingerprint'][:12]}. Got {base.fingerprint[:12]}.")  # fmt: skip
        made._begin(base, record["names"])
        parts = made._built(base)
        kept = {n.removeprefix("parts."): v for n, v in tensors.items() if n.startswith("parts.")}
        changed = {n.removeprefix("encoder."): v for n, v in tensors.items() if n.startswith("encoder.")}
        try:
            parts.load_state_dict(kept)
            made._take(_with(base, changed), parts, {})
        except RuntimeError as error:
            raise BadWeights(f"{path}: its tensors do not fit {name}: {error}.") from error
        return made

    # -- inside --------------------------------------------------------------------------------------------------

    def _begin(self, base: Encoder, names: Sequence[str]) -> None:
        self.names_ = check_names(names)
        check_range("the number of names", len(self.names_), 1, IGNORE)
        self.words_ = class_vectors(self.names_, base).to(base.dtype)
        self._fingerprint = base.fingerprint
        self._bind(base)

    def _built(self, base: Encoder) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self._build(base, self.names_).to(base.dtype)

    def _run(
        self, base: Encoder, items: Sequence[Item], parts: nn.Module, losses: Losses, progress: bool | None,
        *, learns: Sequence[str] | None = None, classes: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """One run of the loop over crops of the images: trains `parts`, and of the encoder what `learns` names.

        `classes` is how many labels there are, where they are not those of the names; `options` as in
        `training.loop.train`, in the place of the method's own steps, rate and so on.
        """
        from ..training.loop import train

        side = 2 * base.image_size if self.side is None else int(check_range("side", self.side, 1))
        patch = base.config.vision.patch_size
        recipe = CropRecipe(parts, losses, max(patch, round(side / patch) * patch), classes or len(self.names_))
        learns = self._learns(base) if learns is None else learns
        usual = {"steps": self.steps, "lr": self.lr, "weight_decay": 1e-4, "warmup": 0.1, "clip": 1.0,
                 "rates": self._rates(base), "no_decay": self._no_decay(base)}  # fmt: skip
        report = train(
            list(items), base, out=None, recipe=recipe, batch_size=min(self.batch_size, len(items)),
            freeze=("*", "!recipe.*", *learns), augment="none", seed=self.seed, progress=progress,
            **{**usual, **options},
        )  # fmt: skip
        parts = parts.cpu()
        parts.load_state_dict({n.removeprefix("parts."): v for n, v in report.parts.items()})
        self._take(report.encoder if learns else base, parts, report.losses)

    def _take(self, encoder: Any, parts: nn.Module, losses: dict[str, float]) -> None:
        self.encoder_, self.losses_ = encoder.eval(), losses
        self.parts_ = parts.to(encoder.device).eval().requires_grad_(False)
        self.words_ = self.words_.to(encoder.device)


class CropRecipe(nn.Module):
    """A step on square crops with their label maps.

    Parameters
    ----------
    parts : what learns beside the encoder
    losses : from (parts, encoder, images, labels) to named losses
    side : of the crops, in pixels
    names : number of class names
    """

    captions = False

    def __init__(self, parts: nn.Module, losses: Losses, side: int, names: int):
        super().__init__()
        self.parts, self.losses, self.side, self.names = parts, losses, side, names
        self.pool: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"side": self.side}

    def bind(self, encoder: Encoder, pool: Any) -> None:
        self.pool = pool

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """`images` (n, 3, side, side), RGB in [0, 1], and `labels` int64 (n, side, side)."""
        run = map if self.pool is None else self.pool.map
        found = list(run(self._view, items, rng.spawn(len(items))))
        return {name: torch.stack([pair[i] for pair in found]) for i, name in enumerate(("images", "labels"))}

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        encoder.eval()
        return self.losses(self.parts, encoder, batch["images"], batch["labels"])

    def _view(self, item: Item, draw: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A random square, from half of the shorter side's square to all of it, flipped half of the time."""
        image, labels = decode(item.source(), key=item.key), label_map(item, self.names)
        if labels.shape != (image.height, image.width):
            raise BadImage(item.key, f"has {image.height} x {image.width} pixels, its mask has {labels.shape}")
        length = max(1, round(min(image.size) * draw.uniform(0.5, 1.0) ** 0.5))
        left, top = (int(draw.integers(n - length + 1)) for n in image.size)
        box = (left, top, left + length, top + length)
        pixels = np.asarray(image.resize((self.side, self.side), Image.Resampling.BICUBIC, box=box))
        at = ((np.arange(self.side) + 0.5) * length / self.side).astype(int)
        truth = labels[top + at][:, left + at]
        turn = 1 if draw.random() < 0.5 else -1
        image_part = torch.from_numpy(pixels[:, ::turn].copy()).permute(2, 0, 1) / 255
        return image_part, torch.from_numpy(truth[:, ::turn].astype(np.int64))


def label_map(item: Item, names: int) -> np.ndarray:
    """The integer labels (H, W) of an item.

    Raises
    ------
    ClipworksError
        If it is no label map, or holds a label that is neither below `names` nor 255.
    """
    given = item.columns["labels"]
    if isinstance(given, str | os.PathLike):
        with Image.open(given) as page:
            found = np.asarray(page)
    else:
        found = np.asarray(given)
    if found.ndim != 2 or found.dtype.kind not in "iub":
        raise ClipworksError(f"masks must be label maps (H, W) of integers. The one of image {item.key!r} has the "
                             f"shape {found.shape} and {found.dtype}.")  # fmt: skip
    wrong = found[(found != IGNORE) & ((found < 0) | (found >= names))]
    if wrong.size:
        raise ClipworksError(f"masks must hold labels from 0 to {names - 1}, or {IGNORE}. The one of image "
                             f"{item.key!r} holds {wrong[0]}.")  # fmt: skip
    return found


def load_trained(path: str | os.PathLike, *, encoder: Any = None) -> TrainedDense:
    """Return the fitted method of a file, whichever it is; `encoder` as for `TrainedDense.load`."""
    record, _ = read_change(path)
    found = get_method(str(record.get("method")), "segment")
    if not (isinstance(found, type) and issubclass(found, TrainedDense)):
        raise ClipworksError(f"path must be a file of a trained dense method. {str(path)!r} is one of "
                             f"{record.get('method')!r}.")  # fmt: skip
    return found.load(path, encoder=encoder)


def _with(base: Encoder, changed: Mapping[str, torch.Tensor]) -> Encoder:
    """The encoder, or a copy with changed tensors."""
    if not changed:
        return base
    encoder = copy.deepcopy(base)
    if unknown := encoder.load_state_dict(dict(changed), strict=False).unexpected_keys:
        raise BadWeights(f"unknown tensors, for example {unknown[0]!r}.")
    encoder.refresh()
    return encoder


def _sources(images: Any, encoder: Encoder) -> list[Any]:
    """Checked images; preprocessed pixels are brought back to bytes."""
    listed = check_images(images)
    config = encoder.config.preprocess
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (config.mean, config.std))

    def source(image: Any) -> Any:
        if not (isinstance(image, torch.Tensor) and image.is_floating_point()):
            return image
        values = 255 * (image.cpu().float().numpy() * std + mean)
        return np.ascontiguousarray(values.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))

    return [source(image) for image in listed]
