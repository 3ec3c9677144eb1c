"""`AnomalyDetector`: the contract of all detectors that look at images, and how they come to their thresholds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.exceptions import NotFittedError

from ..encoders.precision import exact_convolutions
from ..errors import ClipworksError, check_range
from .common import SMOOTHING, quantile, smooth, views
from .result import AnomalyMap

FOLDS = 5  # parts that good images are dealt out into; each is judged by what the others taught
HELD = 200  # images at most that the thresholds are set with


class AnomalyDetector(OutlierMixin, BaseEstimator, ABC):
    """Base of the detectors. One defines `_describe` (pixels to features), `_learn` and `_judge` (features to maps).

    The thresholds are set with the good images themselves: each is judged without what its fold taught, and
    `threshold_` is the score that at most `rate` of further good images exceed, on average (a conformal quantile; the
    largest score where there are fewer than 1 / rate - 1 images). `pixel_threshold_` is the same of the maps' maxima.

    Attributes
    ----------
    threshold_, pixel_threshold_ : above them an image, a pixel is defective
    floor_ : median heat of good images
    scores_ : scores of the good images that the thresholds were set with, ascending
    """

    encoder: Any
    image_size: int | None
    rate: float
    needs_images: ClassVar[bool] = True  # False for a detector that words alone can teach
    sigma: ClassVar[float] = SMOOTHING

    def fit(self, images: Any, y: Any = None) -> AnomalyDetector:
        """Learn from images of good parts.

        Parameters
        ----------
        images : a folder or another source, a list of images, or pixels (n, 3, H, W); None for a detector that knows
            defects from words, which then answers with probabilities and thresholds of 0.5
        y : not used
        """
        check_range("rate", self.rate, 0, 1)
        self._open()
        self._begin()
        self.threshold_ = self.pixel_threshold_ = 0.5
        self.floor_, self.scores_ = 0.0, np.empty(0)
        if images is None and not self.needs_images:
            return self
        held: list[tuple[int, dict[str, torch.Tensor]]] = []
        count, draw = 0, np.random.default_rng(0)
        for batch in views(images, self._model, self.side_):
            described = self._described(batch.pixels)
            for i in range(len(batch.keys)):
                one = {name: value[i : i + 1] for name, value in described.items()}
                self._learn(one, count % FOLDS)
                place = len(held) if len(held) < HELD else int(draw.integers(count + 1))
                held[place:place + 1] = [(count % FOLDS, one)] if place < HELD else []  # fmt: skip
                count += 1
            first = batch.pixels[:1]
        if not count:
            raise ClipworksError("images must hold at least one image of a good part. Got none.")
        if count == 1:  # nothing else to compare with: its mirror image
            held = [(FOLDS, self._described(first.flip(-1)))]
        judged = [self._maps(one, fold) for fold, one in held]
        maps = np.concatenate([m for m, _ in judged])
        self.scores_ = np.sort(np.concatenate([s for _, s in judged]))
        self.threshold_ = quantile(self.scores_, self.rate)
        self.pixel_threshold_ = quantile(maps.max((1, 2)), self.rate)
        self.floor_ = float(np.median(maps))
        return self

    def score_map(self, image: Any, key: str | None = None) -> AnomalyMap:
        """Judge one image.

        Parameters
        ----------
        image : path, encoded bytes, PIL image, uint8 array (H, W, 3), or pixels (3, H, W)
        key : what the result calls it
        """
        real = hasattr(image, "ndim") and image.ndim == 3 and getattr(image, "dtype", None) != np.uint8
        (found,) = self.score_maps(image[None] if real else [image])
        found.key = found.key if key is None else key
        return found

    def score_maps(self, images: Any, *, batch_size: int = 16, errors: list | None = None) -> Iterator[AnomalyMap]:
        """Judge many images, one result at a time.

        Parameters
        ----------
        images : as for `fit`
        batch_size : images per pass
        errors : list that takes up images that cannot be used; without it the first one raises
        """
        self._fitted()
        on_error = "raise" if errors is None else "report"
        for batch in views(images, self._model, self.side_, batch_size, on_error):
            if errors is not None:
                errors += batch.errors
            if not batch.keys:
                continue
            maps, scores = self._maps(self._described(batch.pixels))
            each = zip(batch.keys, maps, scores, batch.sizes, batch.pictures, strict=True)
            for key, heat, score, (width, height), picture in each:
                if heat.shape != (height, width):
                    whole = torch.from_numpy(heat)[None, None]
                    heat = F.interpolate(whole, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
                yield AnomalyMap(key, heat, float(score), self.threshold_, self.pixel_threshold_, self.floor_, picture)

    def score(self, images: Any, y: Any = None) -> np.ndarray:  # type: ignore[override]
        """How unusual each image is; shape (n,)."""
        self._fitted()
        parts = [self._maps(self._described(batch.pixels))[1] for batch in views(images, self._model, self.side_)]
        return np.concatenate(parts) if parts else np.empty(0)

    def decision_function(self, images: Any) -> np.ndarray:
        """The threshold less the score, as scikit-learn has it: below 0 for defective images; shape (n,)."""
        scores = self.score(images)
        return self.threshold_ - scores

    def predict(self, images: Any) -> np.ndarray:
        """-1 for defective images, 1 for good ones, as scikit-learn has it; shape (n,)."""
        return np.where(self.decision_function(images) < 0, -1, 1)

    # -- what a detector defines ---------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Forget, and prepare what does not depend on images."""

    @abstractmethod
    def _describe(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of a batch, every value with the images in front."""

    def _learn(self, described: dict[str, torch.Tensor], fold: int) -> None:
        """Take in one good image."""

    @abstractmethod
    def _judge(self, described: dict[str, torch.Tensor], without: int | None) -> tuple[torch.Tensor, Any]:
        """Maps (n, h, w), and scores (n,), or None for the maxima of the smoothed maps."""

    # -- what they share -----------------------------------------------------------------------------------------

    def _open(self) -> None:
        from ..encoders.loading import resolve

        self._model: Any = resolve(self.encoder)
        model = self._model
        self.side_ = int(self.image_size or model.image_size)
        if self.side_ % model.config.vision.patch_size:
            side = model.config.vision.patch_size
            raise ClipworksError(f"image_size must be a multiple of the patches' {side} pixels. Got {self.side_}.")
        self.fingerprint_ = model.fingerprint

    def _fitted(self) -> None:
        if not hasattr(self, "threshold_"):
            raise NotFittedError(f"fit {type(self).__name__} with images of good parts before using it.")

    def _described(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features on the CPU, where memories are kept and judged, whatever device the encoder is on."""
        with torch.no_grad(), exact_convolutions(self._model.device):
            described = self._describe(pixels.to(self._model.device, self._model.dtype))
            return {name: value.cpu() for name, value in described.items()}

    def _many(self, images: Any, argument: str = "images") -> dict[str, torch.Tensor]:
        """Features of all images of a source, for a detector that is trained on them at once."""
        parts = [self._described(batch.pixels) for batch in views(images, self._model, self.side_)]
        if not parts:
            raise ClipworksError(f"{argument} must hold at least one image. Got none.")
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _maps(self, described: dict[str, torch.Tensor], without: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        maps, scores = self._judge(described, without)
        large = smooth(maps, self.side_, self.sigma)
        return large, large.max((1, 2)) if scores is None else np.asarray(scores, np.float64)

    def __getstate__(self) -> dict[str, Any]:
        """The encoder is saved only where it was given as an object; a named one is loaded again."""
        state = super().__getstate__()
        return {k: v for k, v in state.items() if k != "_model"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "threshold_"):
            return
        made = self.fingerprint_
        self._open()
        if self.fingerprint_ != made:
            raise ClipworksError(f"encoder must be the one this was fitted with, {made[:12]}. "
                                 f"Got {self.fingerprint_[:12]}.")  # fmt: skip
