"""MaPLe: learned tokens in both towers, those among the patches made from those among the words.

Claim: prompting both towers together, layer by layer, generalises better than prompting one: base / new / HM
82.28 / 75.14 / 78.55 against CoCoOp's 80.47 / 71.69 / 75.83 (ViT-B/16, mean of 11 data sets).

Formula: the first n words of "a photo of a <name>." are P_0; before text block j < J the context is replaced by P_j;
the image tower has Q_j = P_j A_j^T + a_j among its patches, Q_0 before its first norm, Q_j in the place of the earlier
ones before block j;  logits = scale * <x, t_c>;  cross entropy; P, A, a learn: J (d_t d_v + d_v) + J n d_t numbers.

Paper: Khattak, Rasheed, Maaz, Khan and Khan 2023, MaPLe: Multi-modal Prompt Learning (CVPR).
Differs from the paper: nothing in the arithmetic. J is at most the number of blocks of either tower. Numbers are
learned in float32. What comes before the first image block is kept, and sentences share their beginning (see `words`).
Defaults are the released code's for base-to-new; for transfer to other sets it takes depth 3, lr 0.0026, 2 epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_choice, check_range
from ..registry import method
from .common import Learned, PromptMethod
from .parts import linear_start, need_tokens, prompted_images, random_vectors
from .words import class_sentences, phrase, word_vectors

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

BRANCHES = ("coupled", "independent", "text")


@method(card="maple", level="M")
class MaPLe(PromptMethod):
    """Learn tokens in both towers.

    Parameters
    ----------
    names : C class names in the order of the labels; default: the labels themselves, sorted
    encoder : encoder with a transformer for images, or its name or path; default: the bundled one
    tokens : n, learned tokens per layer
    depth : J, layers that have their own, at most those that both towers have; 0 learns nothing
    init : words before the name; the first n are learned, the others stay
    branches : "coupled" (MaPLe), "independent" (both towers, no map between them), "text" (that tower alone)
    epochs : passes over the images
    lr : highest learning rate, of SGD with momentum 0.9 and weight decay 5e-4; cosine, first epoch at 1e-5
    batch_size : images per step
    views : of each image, kept from the beginning: the image itself and random crops, of which a step takes one
    chunk : classes encoded at a time (no effect on the result); default: as many as 0.7 GB hold with ViT-B
    seed : of the start, the order and the views

    Attributes
    ----------
    learned_ : "words.j" (n, d_t); "map.j.weight" (d_v, d_t) and "map.j.bias", or "patches.j" (n, d_v)
    classes_, names_, losses_ : labels, class names, the loss of every step

    Inputs
    ------
    images with labels; vectors are not enough, since the image tower changes what it says

    Relations
    ---------
    With depth=0, or branches="text" and no step taken at depth=1, it is zero-shot CLIP with the words of `init`. Vision
    alone is `vpt`, text at the input alone `coop`.

    References
    ----------
    Khattak et al. 2023, MaPLe: Multi-modal Prompt Learning

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> method = MaPLe(["cat", "dog"], encoder=toy_encoder(tokenizer=CLIPTokenizer()), epochs=2)
    >>> method.fit(pixels, [0, 0, 0, 1, 1, 1]).predict(pixels).shape
    (6,)
    """

    keeps = "stem"

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        tokens: int = 2,
        depth: int = 9,
        init: str = "a photo of a",
        branches: str = "coupled",
        epochs: int = 5,
        lr: float = 0.0035,
        batch_size: int = 4,
        views: int = 1,
        chunk: int | None = None,
        seed: int = 0,
    ):
        self.encoder, self.names = encoder, names
        self.tokens, self.depth, self.init, self.branches = tokens, depth, init, branches
        self.epochs, self.lr, self.batch_size, self.views, self.chunk = epochs, lr, batch_size, views, chunk
        self.seed = seed

    def start(self, encoder: Encoder) -> Learned:
        """Words from `init` at the first layer, random ones at the others; maps as torch draws them."""
        depth, spoken = self._depth(encoder), self._spoken(encoder)
        text, vision = encoder.config.text.width, encoder.config.vision.width
        p: Learned = {}
        for j in range(depth):
            first = word_vectors(encoder, spoken[: self.tokens])
            p[f"words.{j}"] = random_vectors(self.tokens, text, seed=self.seed + j) if j else first
            if self.branches == "coupled":
                p |= linear_start(f"map.{j}", vision, text, self.seed + 1000 + j)
            elif self.branches == "independent":
                p[f"patches.{j}"] = random_vectors(self.tokens, vision, seed=self.seed + 2000 + j)
        return p

    def ready(self, encoder: Encoder) -> None:
        spoken = self._spoken(encoder)
        slots = self.tokens if self._depth(encoder) else 0
        self._sentences = class_sentences(encoder, self.names_, slots, words=spoken[slots:])
        if self._sentences.shared != 1 + len(spoken):
            raise ClipworksError(
                "MaPLe needs a text tower whose sentences begin with a start token. This one's do not."
            )

    def texts(self, p: Learned, x: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """The sentences of these classes, with the learned words of every layer."""
        words = self._layers(p, "words")
        context = words.pop(0, torch.empty(0, self.model.config.text.width, device=rows.device))
        return self._sentences.encode(context[None], rows, words)[0]

    def images(self, p: Learned, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """The image tower with tokens made from the learned words, or with its own."""
        if self.branches == "coupled":
            words = self._layers(p, "words").items()
            tokens = {j: F.linear(value, p[f"map.{j}.weight"], p[f"map.{j}.bias"]) for j, value in words}
        else:
            tokens = self._layers(p, "patches")
        return prompted_images(self.model, x["stem"], tokens)

    @staticmethod
    def _layers(p: Learned, kind: str) -> dict[int, torch.Tensor]:
        return {int(k.split(".")[1]): value for k, value in p.items() if k.startswith(f"{kind}.")}

    def _depth(self, encoder: Encoder) -> int:
        need_tokens("MaPLe", encoder)
        check_choice("branches", self.branches, BRANCHES)
        check_range("depth", self.depth, 0)
        return min(self.depth, encoder.config.text.layers, encoder.config.vision.depth)

    def _spoken(self, encoder: Encoder) -> list[int]:
        """Token ids of `init`, at least as many as are learned."""
        ids = phrase(encoder, self.init)
        if not 1 <= self.tokens <= len(ids):
            raise ClipworksError(f"tokens must lie in [1, {len(ids)}], the tokens of init. Got {self.tokens}.")
        return ids
