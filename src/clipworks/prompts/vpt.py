"""VPT: learned tokens among the patches of a frozen image tower, at its input or before every block.

Claim: few learned tokens adapt a frozen transformer better than training all of it in 20 of 24 tasks, with less than
1 % of its parameters (paper); in CLIP, vision prompts alone give base / new / HM 80.24 / 73.43 / 76.68 (ViT-B/16, mean
of 11 data sets, MaPLe's ablation).

Formula: tokens = [class; Q_0 (n x width); patches] before the first norm; before block j < depth the n tokens are
replaced by Q_j;  logits = scale * <x, t_c>, t_c from fixed sentences;  cross entropy; only the Q learn.

Paper: Jia, Tang, Chen, Cardie, Belongie, Hariharan and Lim 2022, Visual Prompt Tuning (ECCV).
Differs from the paper: the classifier is the words', not a learned linear layer; start N(0, 0.02^2), placement before
the first norm, and learning rate, epochs and batch are those of the vision-only variant in MaPLe's released code. The
class words are encoded once, and what comes before the first block is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import check_range
from ..registry import method
from ..zeroshot.classifier import class_vectors
from .common import Learned, PromptMethod
from .parts import need_tokens, prompted_images, random_vectors

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


@method(card="maple", level="M")
class VPT(PromptMethod):
    """Learn tokens among the patches.

    Parameters
    ----------
    names : C class names in the order of the labels; default: the labels themselves, sorted
    encoder : encoder with a transformer for images, or its name or path; default: the bundled one
    tokens : number of learned tokens per layer
    depth : layers that have their own: 1 is the shallow form, the number of blocks (at most) the deep one, 0 none
    templates : sentences around the class names, see `zeroshot.classifier`
    epochs : passes over the images
    lr : highest learning rate, of SGD with momentum 0.9 and weight decay 5e-4; cosine, first epoch at 1e-5
    batch_size : images per step
    views : of each image, kept from the beginning: the image itself and random crops, of which a step takes one
    chunk : classes scored at a time; has no use here, since their vectors do not change
    seed : of the start, the order and the views

    Attributes
    ----------
    learned_ : "tokens.0", "tokens.1" ... (n, width), one per layer
    classes_, names_, losses_ : labels, class names, the loss of every step

    Inputs
    ------
    images with labels; vectors are not enough, since the image tower changes what it says

    Relations
    ---------
    With depth=0 it is zero-shot CLIP. `maple` makes such tokens from learned words and prompts both towers.

    References
    ----------
    Jia et al. 2022, Visual Prompt Tuning

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> method = VPT(["cat", "dog"], encoder=toy_encoder(tokenizer=CLIPTokenizer()), epochs=2)
    >>> method.fit(pixels, [0, 0, 0, 1, 1, 1]).predict(pixels).shape
    (6,)
    """

    keeps = "stem"

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        tokens: int = 8,
        depth: int = 9,
        templates: str | Sequence[str] = "a photo of a {}.",
        epochs: int = 5,
        lr: float = 0.0035,
        batch_size: int = 4,
        views: int = 1,
        chunk: int | None = None,
        seed: int = 0,
    ):
        self.encoder, self.names = encoder, names
        self.tokens, self.depth, self.templates = tokens, depth, templates
        self.epochs, self.lr, self.batch_size, self.views, self.chunk = epochs, lr, batch_size, views, chunk
        self.seed = seed

    def start(self, encoder: Encoder) -> Learned:
        """The tokens of every layer."""
        need_tokens("VPT", encoder)
        check_range("tokens", self.tokens, 1)
        check_range("depth", self.depth, 0)
        depth, width = min(self.depth, encoder.config.vision.depth), encoder.config.vision.width
        return {f"tokens.{j}": random_vectors(self.tokens, width, seed=self.seed + j) for j in range(depth)}

    def ready(self, encoder: Encoder) -> None:
        need_tokens("VPT", encoder)
        names = [name.replace("_", " ") for name in self.names_]
        self._words = class_vectors(names, encoder, templates=self.templates).to(encoder.device)

    def texts(self, p: Learned, x: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """The class words, which do not learn."""
        return self._words[rows]

    def images(self, p: Learned, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """The image tower with the tokens at their layers."""
        return prompted_images(self.model, x["stem"], {int(k.split(".")[1]): value for k, value in p.items()})
