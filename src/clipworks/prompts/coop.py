"""CoOp: the words around the class names are replaced by learned vectors.

Claim: with 16 labelled images per class a learned context of 16 vectors is about 15 points better than hand-made
prompts (mean of 11 data sets, ResNet-50).

Formula: t_c = norm(text([start] v_1 .. v_M [name c] . [end]));  logits = scale * <x, t_c>;  cross entropy; only the
vectors v learn, through the frozen text tower. One context for all classes, or one for each.

Paper: Zhou, Yang, Loy and Liu 2022, Learning to Prompt for Vision-Language Models (IJCV).
Differs from the paper: nothing in the arithmetic. Image vectors are computed once (`views` of each image in the place
of a fresh crop per epoch), sentences are cut at their end token and share their beginning (see `words`), many classes
are taken a few at a time. Defaults are the released code's but for the epochs, which are 50 there for 1 shot and for
ImageNet, 100 for 2 and 4 shots, 200 for 8 and 16; the last epoch is what is kept, here and there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ClipworksError
from ..registry import method
from .common import Learned, PromptMethod
from .parts import context_start
from .words import class_sentences

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


@method(card="coop", level="MR")
class CoOp(PromptMethod):
    """Learn the context of the class names.

    Parameters
    ----------
    names : C class names in the order of the labels; default: the labels themselves, sorted
    encoder : encoder, or its name or path; default: the bundled one
    context : number of learned vectors (16: paper), unless `init` says it
    init : words whose embeddings the context starts from, such as "a photo of a"; default: at random
    position : of the name in the context, "end", "middle" or "front"
    class_specific : whether every class has a context of its own (better with many shots, useless for new classes)
    epochs : passes over the images
    lr : highest learning rate, of SGD with momentum 0.9 and weight decay 5e-4; cosine, first epoch at 1e-5
    batch_size : images per step
    views : of each image, kept from the beginning: the image itself and random crops, of which a step takes one
    chunk : classes encoded at a time (no effect on the result); default: as many as 0.7 GB hold with ViT-B
    seed : of the start, the order and the views

    Attributes
    ----------
    learned_ : "context" (M, width), or (C, M, width)
    classes_, names_, losses_ : labels, class names, the loss of every step

    Inputs
    ------
    images with labels, or their vectors from the same encoder: the image tower runs once

    Relations
    ---------
    With `init` and no step taken it is zero-shot CLIP with these words. `cocoop` makes the context depend on the image,
    `maple` prompts both towers, `tpt` learns a context for each test image.

    References
    ----------
    Zhou et al. 2022, Learning to Prompt for Vision-Language Models

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> method = CoOp(["cat", "dog"], encoder=toy_encoder(tokenizer=CLIPTokenizer()), context=4, epochs=2)
    >>> method.fit(pixels, [0, 0, 0, 1, 1, 1]).predict(pixels).shape
    (6,)
    """

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        context: int = 16,
        init: str | None = None,
        position: str = "end",
        class_specific: bool = False,
        epochs: int = 50,
        lr: float = 0.002,
        batch_size: int = 32,
        views: int = 1,
        chunk: int | None = None,
        seed: int = 0,
    ):
        self.encoder, self.names = encoder, names
        self.context, self.init, self.position, self.class_specific = context, init, position, class_specific
        self.epochs, self.lr, self.batch_size, self.views, self.chunk = epochs, lr, batch_size, views, chunk
        self.seed = seed

    def start(self, encoder: Encoder) -> Learned:
        """The context, the same for every class at first if it starts from words."""
        if not self.class_specific:
            return {"context": context_start(encoder, self.context, self.init, self.seed)}
        if self.init is not None:
            return {"context": context_start(encoder, 0, self.init, self.seed).repeat(len(self.names_), 1, 1)}
        many = context_start(encoder, self.context * len(self.names_), None, self.seed)
        return {"context": many.unflatten(0, (len(self.names_), -1))}

    def ready(self, encoder: Encoder) -> None:
        slots = len(context_start(encoder, self.context, self.init, 0))
        self._sentences = class_sentences(encoder, self.names_, slots, self.position)

    def texts(self, p: Learned, x: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """The sentences of these classes around the context."""
        if self.class_specific:
            return self._sentences.encode_own(p["context"][rows], rows)
        return self._sentences.encode(p["context"][None], rows)[0]

    def to_new(self, names: Sequence[str]) -> CoOp:
        """Return the same context with other class names; not for class-specific contexts."""
        if self.class_specific:
            raise ClipworksError("class_specific contexts belong to their classes and have none for new ones.")
        return super().to_new(names)
