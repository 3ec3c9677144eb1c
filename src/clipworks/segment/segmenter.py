"""`segment`: which pixels each name means, for an image of any size, without training on masks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.decode import decode_pixels, describe
from ..encoders.preprocess import _resize
from ..errors import ClipworksError, check_choice, check_range
from ..zeroshot.classifier import check_names
from .background import SURE, background_threshold, background_words
from .common import Dense, Hidden, enter, interpolation, resample
from .mask import BACKGROUND, Mask
from .refine import LARGEST, dense_crf, pamr
from .windows import padded, slide

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

LARGEST_SIDE = 4096  # as of an encoder's images; larger ones are brought down to it first
LONGEST = 16384  # a longer side in pixels up to which an image is enlarged: a line of pixels stays one
SCALE = 40.0  # of the cosines before the softmax; one value for all data (NACLIP's, Trident's)
CANVAS = 320  # longer side on which masks are refined
BAND = 2**22  # numbers of a band of rows that is interpolated at a time

Refine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def segment(
    image: Any,
    names: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    method: str | os.PathLike | Dense = "sclip",
    encoder: str | Encoder | None = None,
    templates: str | Sequence[str] = "default",
    background: str | float | Sequence[str] | None = None,
    side: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    refine: str | Refine | None = None,
    scale: float = SCALE,
    smallest: float = 0.0,
    memory: bool = True,
    batch_size: int = 8,
) -> Mask:
    """Give every pixel of an image one of the names.

    Parameters
    ----------
    image : path, bytes, PIL image or uint8 array (H, W, 3), of any size
    names : what may be seen, in words; or name -> several words for it, of which a pixel takes the best
    method : registered dense method (`clipworks methods segment`), or one with settings of its own; of a method that
        is trained, the fitted object or the .safetensors file that it was saved to
    encoder : a name, a path or an encoder (default: the bundled one, or the one that the method was trained on)
    templates : sentences for the words, as for `classify`
    background : how a pixel can be none of the names: a number (probability that a name must reach), "words" (further
        words such as sky and wall, or your own list), "objects" (parts of the image that are no object); None for
        labels that fill the image
    side : the image is brought to this shorter side first, in pixels (default: twice the encoder's image size)
    window : side of the sliding windows in pixels, brought to a multiple of the patch (default: twice the encoder's
        image size); an image that is not larger is one window
    stride : pixels between windows (default: half a window)
    refine : "pamr", "crf", or a function of (image, scores) that returns scores: masks then follow the image's edges
    scale : factor of the cosines before the softmax
    smallest : names that cover a smaller share of the image are left out
    memory : whether a tower that has a memory (`clipworks-small`) recalls every patch
    batch_size : windows per pass

    Returns
    -------
    Mask

    Raises
    ------
    BadImage
        If the image cannot be used.
    ClipworksError
        If names or an option cannot be used.

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> toy = toy_encoder(tokenizer=CLIPTokenizer())
    >>> segment(np.zeros((30, 50, 3), np.uint8), ["sky", "tree"], encoder=toy).labels.shape
    (30, 50)
    """
    return Segmenter(
        names, method=method, encoder=encoder, templates=templates, background=background, side=side, window=window,
        stride=stride, refine=refine, scale=scale, smallest=smallest, memory=memory, batch_size=batch_size,
    )(image)  # fmt: skip


class Segmenter:
    """`segment` for many images: the words are encoded once.

    Parameters
    ----------
    names, method, encoder, templates, background, side, window, stride, refine, scale, smallest, memory, batch_size :
        as for `segment`

    Attributes
    ----------
    names : the names, "background" first where there can be some
    words : (W, dim), unit rows of all words
    owner : name of every word, by its index
    """

    def __init__(
        self,
        names: Sequence[str] | Mapping[str, Sequence[str]],
        *,
        method: str | os.PathLike | Dense = "sclip",
        encoder: str | Encoder | None = None,
        templates: str | Sequence[str] = "default",
        background: str | float | Sequence[str] | None = None,
        side: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        refine: str | Refine | None = None,
        scale: float = SCALE,
        smallest: float = 0.0,
        memory: bool = True,
        batch_size: int = 8,
    ):
        self.background = background_threshold(background)
        self.method = dense_method(method, encoder)
        self.refine = _refinement(refine)
        self.scale = check_range("scale", scale, 0)
        self.smallest = check_range("smallest", smallest, 0, 1)
        synonyms = dict(names) if isinstance(names, Mapping) else {name: [name] for name in check_names(names)}
        self.names = check_names(synonyms)
        if background is not None and BACKGROUND in self.names:
            raise ClipworksError(f"names must not hold {BACKGROUND!r} where background= is given.")
        model: Any = self.method.encoder_for(encoder)
        self.encoder, self.memory, self.batch_size = model, memory, batch_size
        self.patch = model.config.vision.patch_size
        usual = 2 * model.image_size
        self.side = int(check_range("side", usual if side is None else side, self.patch, LARGEST_SIDE))
        self.window = self._whole(check_range("window", usual if window is None else window, 1))
        self.stride = self._whole(check_range("stride", self.window // 2 if stride is None else stride, 1))
        if self.stride > self.window:
            raise ClipworksError(f"stride must be at most the window, {self.window}. Got {stride}.")
        further = background_words(self.background, self.names)
        words = [word for group in synonyms.values() for word in group] + further
        self.owner = [i for i, group in enumerate(synonyms.values()) for _ in group] + [-1] * len(further)
        if background is not None:
            self.names, self.owner = [BACKGROUND, *self.names], [i + 1 for i in self.owner]
        distinct = list(dict.fromkeys(words))
        rows = self.method.class_words(distinct, model, templates)
        self.words = rows[[distinct.index(word) for word in words]].to(model.device)

    def _whole(self, length: float) -> int:
        return max(self.patch, round(length / self.patch) * self.patch)

    def __call__(self, image: Any, key: str | None = None) -> Mask:
        """Segment one image, under a key of its own or its path."""
        pixels = decode_pixels(image, key=key)
        with self.encoder._inference():
            return self._segment(pixels, describe(image) if key is None else key)

    def _segment(self, pixels: np.ndarray, key: str) -> Mask:
        height, width = pixels.shape[:2]
        factor = min(self.side / min(height, width), max(1.0, LONGEST / max(height, width)))
        tall, wide = max(self.patch, round(height * factor)), max(self.patch, round(width * factor))
        resized = _resize(pixels, tall, wide, "bicubic")
        image = padded(torch.from_numpy(resized).permute(2, 0, 1) / 255, self.patch)
        objects: list[torch.Tensor] = []
        average = self._slide(image, lambda hidden: self.method.local(hidden, self.words))
        scores = self.method.whole(average, image, self.encoder, self.words).float().cpu()
        if self.background == "objects":
            objects = [self._slide(image, self.method.objects).cpu()[0]]
        scores = self._by_name(scores)
        # the part of the grid that is image and not padding
        span = (scores.shape[1] * tall / image.shape[1], scores.shape[2] * wide / image.shape[2])
        if self.refine is None:
            coarse = self._at(scores, objects, span, round(span[0]), round(span[1]))
            labels = self._labels(lambda rows: self._at(scores, objects, span, height, width, rows), height, width)
        else:
            coarse = self._refined(pixels, scores, objects, span)
            labels = self._labels(lambda rows: _enlarged(coarse, height, width, rows), height, width)
        return Mask(self._without_small(labels, coarse), self.names, coarse.numpy(), key)

    def _slide(self, image: torch.Tensor, work: Callable[[Hidden], torch.Tensor]) -> torch.Tensor:
        def run(windows: torch.Tensor) -> torch.Tensor:
            method = self.method
            return work(enter(self.encoder, windows, blocks=method.blocks, sides=method.sides, memory=self.memory))

        return slide(image, run, patch=self.patch, window=self.window, stride=self.stride, batch_size=self.batch_size)

    def _by_name(self, scores: torch.Tensor) -> torch.Tensor:
        """The best word of every name; the row of a background that has no words is lowest."""
        if self.owner == list(range(len(self.names))):
            return scores
        index = torch.tensor(self.owner)[:, None, None].expand_as(scores)
        lowest = scores.new_full((len(self.names), *scores.shape[1:]), -torch.inf)
        return lowest.scatter_reduce(0, index, scores, "amax")

    def _at(
        self, scores: torch.Tensor, objects: list[torch.Tensor], span: tuple[float, float], height: int, width: int,
        rows: slice = slice(None),
    ) -> torch.Tensor:  # fmt: skip
        """Probabilities (names, rows, width) at a size: cosines interpolated, then the softmax."""
        down = interpolation(height, scores.shape[1], span[0])[rows]
        right = interpolation(width, scores.shape[2], span[1])
        if self.background is None or -torch.inf != float(scores[0].max()):
            return self.method.probabilities(resample(scores, down, right), self.scale)
        found = self.method.probabilities(resample(scores[1:], down, right), self.scale)
        if isinstance(self.background, float | int):
            none = found.new_full(found.shape[1:], float(self.background))
        elif objects:
            none = SURE * (resample(objects[0], down, right) <= 0.5).to(found)
        else:
            none = found.new_zeros(found.shape[1:])
        return torch.cat([none[None], found])

    def _labels(self, part: Callable[[slice], torch.Tensor], height: int, width: int) -> np.ndarray:
        """The best name of every pixel, band by band; a name wins a tie with the background."""
        step = max(1, BAND // (len(self.names) * width))
        labels = np.empty((height, width), np.int32)
        for top in range(0, height, step):
            rows = slice(top, min(top + step, height))
            labels[rows] = _best(part(rows), self.background is not None)
        return labels

    def _refined(
        self, pixels: np.ndarray, scores: torch.Tensor, objects: list[torch.Tensor], span: tuple[float, float]
    ) -> torch.Tensor:
        """Refined probabilities on the canvas; names that are nowhere the best are left as they are."""
        height, width = pixels.shape[:2]
        shrink = min(1.0, CANVAS / max(height, width))
        if self.refine is dense_crf:
            shrink = min(shrink, (LARGEST / (height * width)) ** 0.5)
        tall, wide = max(1, int(height * shrink)), max(1, int(width * shrink))
        found = self._at(scores, objects, span, tall, wide)
        seen = np.unique(_best(found, self.background is not None))
        canvas = torch.from_numpy(_resize(pixels, tall, wide, "bilinear")).permute(2, 0, 1).float()
        if self.refine is not None and len(seen) > 1:
            found[seen] = self.refine(canvas, found[seen])
        return found

    def _without_small(self, labels: np.ndarray, coarse: torch.Tensor) -> np.ndarray:
        """Give pixels of names below the smallest share to the best of the others."""
        share = np.bincount(labels.ravel(), minlength=len(self.names)) / labels.size
        small = (share > 0) & (share < self.smallest)
        small[share.argmax()] = False
        if self.background is not None:
            small[0] = False
        if not small.any():
            return labels
        others = torch.from_numpy((share > 0) & ~small)[:, None, None] * coarse
        height, width = labels.shape
        again = self._labels(lambda rows: _enlarged(others, height, width, rows), height, width)
        return np.where(small[labels], again, labels)


def dense_method(method: str | os.PathLike | Dense, encoder: Any = None) -> Dense:
    """The method of a name or of a file that a trained one was saved to (`encoder`: its encoder), or the given one."""
    from ..registry import get_method, methods

    if isinstance(method, Dense):
        return method
    if isinstance(method, os.PathLike) or str(method).endswith(".safetensors"):
        from .trained import load_trained

        if not os.path.isfile(method):
            raise ClipworksError(f"method must be a name or a .safetensors file. Nothing is at {os.fspath(method)!r}.")
        return load_trained(method, encoder=encoder)
    known = [info.name.replace("_", "-") for info in methods("segment")]
    check_choice("method", method.replace("_", "-") if isinstance(method, str) else method, known)
    found: Any = get_method(method.replace("-", "_"), "segment")
    if not (isinstance(found, type) and issubclass(found, Dense)):
        raise ClipworksError(f"method must be a dense one. Got {method!r}, which has to be called by itself.")
    if hasattr(found, "fit"):
        raise ClipworksError(f"method {method!r} has to be trained: give the fitted object or its .safetensors file.")
    return found()


def _refinement(refine: str | Refine | None) -> Refine | None:
    table: dict[str, Refine] = {"pamr": pamr, "crf": dense_crf}
    if refine is None or callable(refine):
        return refine
    return table[check_choice("refine", refine, table)]


def _best(scores: torch.Tensor, background: bool) -> np.ndarray:
    if not background:
        return scores.argmax(0).numpy()
    value, index = scores[1:].max(0)
    return torch.where(scores[0] > value, 0, index + 1).numpy()


def _enlarged(maps: torch.Tensor, height: int, width: int, rows: slice) -> torch.Tensor:
    down, right = interpolation(height, maps.shape[1])[rows], interpolation(width, maps.shape[2])
    return resample(maps, down, right)
