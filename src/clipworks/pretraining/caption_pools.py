"""Several captions per image: one or a few of them drawn at each step.

Claim: captions rewritten or enriched once by a language model, mixed with the originals, make a much better CLIP at no
cost in training (LaCLIP, CC12M ViT-B/16, ImageNet zero-shot: 40.2 and 48.4; VeCLIP, 3M pairs, COCO R@1: 5.5 / 3.3 and
22.3 / 13.0; DreamLIP, sentences of long captions one by one instead of whole, COCO R@1: 30.2 / 21.4 and 35.7 / 25.6).

Formula: t_i ~ uniform over {c_i, r_i1 .. r_iM} (LaCLIP), or c_i with probability p and otherwise uniform over the
others (VeCLIP), with long captions cut into sentences first (DreamLIP).  L = (1/K) sum_k InfoNCE(image, text_k).

Papers: Fan et al. 2023, Improving CLIP Training with Language Rewrites (NeurIPS); Lai et al. 2024, VeCLIP: Improving
CLIP Training via Visual-enriched Captions (ECCV); Zheng et al. 2024, DreamLIP: Language-Image Pre-training with Long
Captions (ECCV).
Differs from the papers: captions are found by the image's key, never by line number alone, so that leaving out broken
images cannot shift them. The drawing is by sample and step, from the step's generator.
Defaults: a uniform draw of one text, and the original where the drawn one has fewer than two words (LaCLIP's code);
p = 0.5 is VeCLIP's; DreamLIP takes the original and six sentences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ClipworksError, check_range, closest
from ..registry import method
from ..training.augment import Augment
from ..training.recipe import ContrastiveRecipe, contrast

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder

# a stop ends a sentence if a space or the end follows and no abbreviation or single letter stands before it
_STOP = re.compile(r"(?<!\b[A-Za-z]\.)(?<!\b(?:Mr|Dr|St|vs)\.)(?<!\b(?:Mrs|etc)\.)(?<=[.!?])\s+|\n+")


@method(card="laclip", level="M")
class CaptionPools(ContrastiveRecipe):
    """A training step in which every image has a pool of captions.

    Parameters
    ----------
    pools : image key -> further captions; None takes them from the `columns` of the items
    columns : columns of the data that hold further captions (a string each, or a list of strings)
    original : probability of the image's own caption (VeCLIP: 0.5); None draws uniformly over all texts (LaCLIP)
    texts_per_image : captions K drawn per image and step; above 1 the mean of K losses, each draw from what is left
    keep_original : whether the first of the K is always the image's own caption (DreamLIP)
    sentences : whether further captions are cut into sentences (DreamLIP)
    min_words : a drawn text with fewer words gives way to the original
    loss : registered loss or function, as in `ContrastiveRecipe`
    augment : how views are drawn; None takes the encoder's own preprocessing
    options : further keyword arguments of the loss

    Raises
    ------
    ClipworksError
        If original or texts_per_image is out of range, or a column does not exist.

    Inputs
    ------
    image-text pairs with further captions per image

    Relations
    ---------
    With original=1, or without further captions, it is plain contrastive training. `dreamlip` adds a loss on patches;
    `laclip` and `veclip` make the further captions.

    References
    ----------
    Fan et al. 2023, Improving CLIP Training with Language Rewrites
    Lai et al. 2024, VeCLIP; Zheng et al. 2024, DreamLIP

    Examples
    --------
    >>> draw_captions(["a dog runs", "a puppy at play"], np.random.default_rng(0), original=0.0)
    ['a puppy at play']
    >>> split_sentences("A cat, 2.5 kg. It sleeps.")
    ['A cat, 2.5 kg.', 'It sleeps.']
    """

    def __init__(
        self,
        pools: Mapping[str, Sequence[str]] | None = None,
        columns: Sequence[str] = (),
        original: float | None = None,
        texts_per_image: int = 1,
        keep_original: bool = False,
        sentences: bool = False,
        min_words: int = 2,
        loss: str | Callable[..., Any] = "infonce",
        augment: Augment | None = None,
        options: dict[str, Any] | None = None,
    ):
        super().__init__(loss, augment, options)
        self.pools, self.columns, self.sentences = pools, tuple(columns), sentences
        self.original = None if original is None else check_range("original", original, 0.0, 1.0)
        self.texts_per_image = int(check_range("texts_per_image", texts_per_image, 1))
        self.keep_original, self.min_words = keep_original, min_words

    @property
    def settings(self) -> dict[str, Any]:
        names = ("original", "texts_per_image", "keep_original", "sentences", "min_words")
        return {**super().settings, "columns": list(self.columns), **{name: getattr(self, name) for name in names}}

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return `pixels`, and `tokens` of shape (n, L), or (n, K, L) with several texts per image."""
        found = super().batch(items, step, rng)
        if self.texts_per_image > 1:
            found["tokens"] = found["tokens"].unflatten(0, (len(items), self.texts_per_image))
        return found

    def texts(self, items: Sequence[Item], draws: Sequence[np.random.Generator]) -> list[str]:
        """Return the drawn captions, those of one image together."""
        return [text for item, draw in zip(items, draws, strict=True) for text in self.drawn(item, draw)]

    def drawn(self, item: Item, draw: np.random.Generator) -> list[str]:
        """Return the K captions of one image."""
        return draw_captions(
            self.captions_of(item), draw, original=self.original, count=self.texts_per_image,
            keep_original=self.keep_original, min_words=self.min_words,
        )  # fmt: skip

    def captions_of(self, item: Item) -> list[str]:
        """Return all texts of an image, its own caption first."""
        further: list[str] = list(self.pools.get(item.key, ())) if self.pools is not None else []
        for name in self.columns:
            if name not in item.columns:
                hint = closest(name, item.columns)
                raise ClipworksError(f"columns must exist in the data. {item.key!r} has none named {name!r}.{hint}")
            value = item.columns[name]
            further += [value] if isinstance(value, str) else list(value or ())
        if self.sentences:
            further = [sentence for text in further for sentence in split_sentences(text)]
        return [item.caption or "", *(text for text in further if text.strip())]

    def encode(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return rows; several texts per image have the shape (n, K, dim)."""
        text = encoder.encode_text(batch["tokens"].flatten(0, -2))
        if batch["tokens"].ndim == 3:
            text = text.unflatten(0, batch["tokens"].shape[:2])
        return {"image": encoder.encode_image(batch["pixels"]), "text": text}

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the mean over the K texts; texts of other slots are no negatives of each other."""
        if features["text"].ndim == 2:
            return super().losses(features)
        slots = [
            contrast(self.loss, self.loss_name, {**features, "text": text}, **self.options)
            for text in features["text"].unbind(1)
        ]
        return {name: torch.stack([slot[name] for slot in slots]).mean() for name in slots[0]}


def draw_captions(
    captions: Sequence[str],
    draw: np.random.Generator,
    *,
    original: float | None = None,
    count: int = 1,
    keep_original: bool = False,
    min_words: int = 2,
) -> list[str]:
    """Draw texts of one image.

    Parameters
    ----------
    captions : the image's own caption, then the further ones
    draw : generator of this sample
    original : probability of the own caption; None for the same as any other
    count : how many; without repetition as far as there are enough
    keep_original : begin with the own caption and draw the rest from the further ones
    min_words : shorter texts give way to the own caption
    """
    own, further = captions[0], list(captions[1:])
    if keep_original:
        chosen = [own, *_several(further or [own], count - 1, draw)]
    elif original is None:
        chosen = _several([own, *further], count, draw)
    else:
        from_own = draw.random(count) < (original if further else 1.0)
        others = iter(_several(further, int((~from_own).sum()), draw))
        chosen = [own if mine else next(others) for mine in from_own]
    return [text if len(text.split()) >= min_words else own for text in chosen]


def _several(texts: list[str], count: int, draw: np.random.Generator) -> list[str]:
    """Draw without replacement while there is something left, then anew."""
    chosen: list[str] = []
    while len(chosen) < count:
        few = min(count - len(chosen), len(texts))
        chosen += [texts[i] for i in draw.choice(len(texts), few, replace=False)]
    return chosen


def split_sentences(text: str, min_words: int = 2) -> list[str]:
    """Cut a long caption at sentence ends and line ends; decimals, initials and pieces of a word stay joined.

    Parameters
    ----------
    text : one caption
    min_words : a shorter piece is left out, unless nothing else is left
    """
    pieces = [piece.strip() for piece in _STOP.split(text) if piece.strip()]
    return [piece for piece in pieces if len(piece.split()) >= min_words] or pieces[:1]


def read_pools(keys: Sequence[str], *paths: str | Path) -> dict[str, list[str]]:
    """Read files of rewrites, one caption per line in the order of `keys`, into pools by key.

    Raises
    ------
    ClipworksError
        If a file has another number of lines than there are keys, or a key appears twice.
    """
    if len(set(keys)) < len(keys):
        raise ClipworksError(f"keys must be distinct. {len(keys) - len(set(keys))} of {len(keys)} are repeated.")
    pools: dict[str, list[str]] = {key: [] for key in keys}
    for path in paths:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        if len(lines) != len(keys):
            raise ClipworksError(f"{str(path)!r} must have a line per key, {len(keys)} in all. It has {len(lines)}.")
        for key, line in zip(keys, lines, strict=True):
            pools[key].append(line.strip())
    return pools
