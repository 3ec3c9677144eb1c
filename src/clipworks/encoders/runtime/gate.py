"""The gate: how far another form of an encoder is from fp32 on the user's own images and texts, and how fast it is."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ...errors import ClipworksError, check_range

if TYPE_CHECKING:
    from ..encoder import Encoder

BOUND = 0.98  # cosine to fp32 that 95 in 100 images, and texts, must reach
SAME = 1e-7  # 1 - cosine of vectors that are the same to the rounding with which collections store them (float16)
MOST = 200  # images that are read
SPARE = 20_000  # images that are looked at to draw from
NEAREST = 10
TURNS = 5
TEXTS = tuple(
    template.format(name)
    for template in ("{}", "a photo of a {}.", "a drawing of the {} seen from the side", "there is a {} in front of it")
    for name in ("cat", "golden retriever", "fire engine", "bowl of soup", "wooden bridge over a river", "violin",
                 "red bicycle", "crowd of people at night")
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One form of an encoder beside fp32.

    Attributes
    ----------
    runtime, precision, recipe : which form; the recipe of the quantisation
    cosine, low, worst : mean, the value that 95 in 100 images reach, and the least cosine of the images
    text_low : the value that 95 in 100 texts reach
    neighbours : share of an image's ten nearest images that stay the same
    ms, ratio : milliseconds per image, and how many times as fast as fp32 in torch
    accepted : whether `low` and `text_low` pass the bound
    """

    runtime: str
    precision: str
    recipe: str
    cosine: float = 0.0
    low: float = 0.0
    worst: float = 0.0
    text_low: float = 0.0
    neighbours: float = 0.0
    ms: float = 0.0
    ratio: float = 0.0
    accepted: bool = False

    def as_row(self) -> dict[str, Any]:
        """For a table or JSON."""
        digits = {"cosine": 6, "low": 6, "worst": 6, "text_low": 6, "neighbours": 3, "ms": 2, "ratio": 2}
        return {k: round(v, digits[k]) if k in digits else v for k, v in dataclasses.asdict(self).items()}


def read_images(source: Any, encoder: Encoder, most: int = MOST, seed: int = 0) -> torch.Tensor:
    """Pixels of a drawn sample of a source's images, (n, 3, H, W); those that cannot be used are left out.

    Raises
    ------
    ClipworksError
        If fewer than two images can be used.
    """
    from ...data.loader import load_batches
    from ...data.sources import open_source

    items = list(islice(open_source(source), SPARE))
    items = random.Random(seed).sample(items, len(items))
    found: list[torch.Tensor] = []
    for batch in load_batches(items, encoder.preprocess, 16, on_error="skip"):
        found.append(batch.pixels)
        if sum(map(len, found)) >= most:
            break
    pixels = torch.cat(found)[:most] if found else torch.empty(0)
    if len(pixels) < 2:
        raise ClipworksError(f"images must hold at least 2 images that can be used. {len(pixels)} of {len(items)} can.")
    return pixels


def read_texts(texts: str | Path | Sequence[str] | None) -> list[str]:
    """Texts as given, the lines of a text file, or some sentences of everyday things."""
    if texts is None:
        return list(TEXTS)
    if isinstance(texts, str | Path):
        if not Path(texts).is_file():
            raise ClipworksError(f"texts must be a text file with one text per line, or a list. Got {str(texts)!r}.")
        texts = Path(texts).read_text(encoding="utf-8-sig").splitlines()
    found = [text for text in texts if text.strip()]
    if not found:
        raise ClipworksError("texts must hold at least one text. Got none.")
    return found


class Gate:
    """What every form is measured against.

    Parameters
    ----------
    exact : the encoder in fp32
    pixels : preprocessed images of the user
    texts : texts of the user
    bound : least cosine, see `BOUND`
    batch_size : images per pass when speed is measured
    """

    def __init__(self, exact: Encoder, pixels: torch.Tensor, texts: Sequence[str], bound: float, batch_size: int = 16):
        check_range("bound", bound, 0.0, 1.0)
        self.exact, self.pixels, self.texts, self.bound, self.batch_size = exact, pixels, texts, bound, batch_size
        self.images = exact.images(pixels, batch_size=batch_size)
        self.words = exact.texts(texts)

    def measure(self, other: Encoder, recipe: str = "") -> Measured:
        """Cosines of all images and texts, and the speed in turns with fp32."""
        images, words = other.images(self.pixels, batch_size=self.batch_size), other.texts(self.texts)
        cosine, said = _cosine(images, self.images), _cosine(words, self.words)
        low, text_low = (float(c.quantile(0.05, interpolation="lower")) for c in (cosine, said))
        ms, ratio = self._speed(other)
        return Measured(
            getattr(other, "runtime", "torch"), other.precision, recipe, float(cosine.mean()), low,
            float(cosine.min()), text_low, _kept(images, self.images), ms, ratio,
            bool(low >= self.bound and text_low >= self.bound),
        )  # fmt: skip

    def same(self, measured: Encoder) -> bool:
        """Whether vectors of both may stand in one collection: all are equal to the rounding of its storage."""
        images = measured.images(self.pixels, batch_size=self.batch_size)
        pairs = ((images, self.images), (measured.texts(self.texts), self.words))
        return all(float((1 - _cosine(a, b)).max()) <= SAME for a, b in pairs)

    def _speed(self, other: Encoder) -> tuple[float, float]:
        """Milliseconds per image, and the median ratio to fp32."""
        batch = self.pixels[: self.batch_size]
        mine: list[float] = []
        ratios: list[float] = []
        for turn in range(TURNS + 1):
            usual, taken = (_seconds(encoder.images, batch, len(batch)) for encoder in (self.exact, other))
            if turn:
                mine.append(taken)
                ratios.append(usual / taken)
        return 1e3 * statistics.median(mine) / len(batch), statistics.median(ratios)


def _seconds(encode: Callable[..., Any], batch: torch.Tensor, size: int) -> float:
    start = time.perf_counter()
    encode(batch, batch_size=size)
    return time.perf_counter() - start


def _cosine(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Row by row, in float64: in float32 its own rounding would be larger than what is looked for."""
    return (F.normalize(one.double(), dim=-1) * F.normalize(two.double(), dim=-1)).sum(-1)


def _kept(one: torch.Tensor, two: torch.Tensor) -> float:
    """Share of the nearest rows of each row that are the same in both sets."""
    count = min(NEAREST, len(one) - 1)
    near = [(x @ x.T).fill_diagonal_(-torch.inf).topk(count).indices.tolist() for x in (one, two)]
    return sum(len({*a} & {*b}) for a, b in zip(*near, strict=True)) / (count * len(one))
