"""CoCoOp: a learned context that a small network moves for every image.

Claim: a context that depends on the image is less tied to the classes it was learned on than CoOp's: base / new / HM
80.47 / 71.69 / 75.83 against 82.69 / 63.22 / 71.66 (ViT-B/16, mean of 11 data sets).

Formula: pi(x) = W2 relu(W1 x + b1) + b2, W1: d -> d/16;  v_m(x) = v_m + pi(x);  t_c(x) = norm(text([start] v_1(x) ..
v_M(x) [name c] . [end]));  logits = scale * <x, t_c(x)>;  cross entropy.

Paper: Zhou, Yang, Loy and Liu 2022, Conditional Prompt Learning for Vision-Language Models (CVPR).
Differs from the paper: nothing in the arithmetic. The sentences of an image share their beginning, so that a class
costs the tokens of its name alone with towers that look backwards (see `words`); image vectors are computed once.
Defaults are the released code's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..registry import method
from .common import Learned, PromptMethod
from .parts import context_start, linear_start
from .words import class_sentences

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


@method(card="coop", level="M")
class CoCoOp(PromptMethod):
    """Learn a context and a small network that moves it for every image.

    Parameters
    ----------
    names : C class names in the order of the labels; default: the labels themselves, sorted
    encoder : encoder, or its name or path; default: the bundled one
    context : number of learned vectors, unless `init` says it
    init : words whose embeddings the context starts from; None: at random
    epochs : passes over the images
    lr : highest learning rate, of SGD with momentum 0.9 and weight decay 5e-4; cosine, first epoch at 1e-5
    batch_size : images per step; each has class vectors of its own, so memory and time grow with it
    views : of each image, kept from the beginning: the image itself and random crops, of which a step takes one
    chunk : classes encoded at a time (no effect on the result); default: as many as 0.7 GB hold with ViT-B
    seed : of the start, the order and the views

    Attributes
    ----------
    learned_ : "context" (M, width); "down.weight" (d/16, d), "up.weight" (width, d/16) and their biases
    classes_, names_, losses_ : labels, class names, the loss of every step

    Inputs
    ------
    images with labels, or their vectors from the same encoder: the image tower runs once

    Relations
    ---------
    With "up" at zero it is `coop`. `gopro` and IP-CLIP feed the network with more than the image's vector.

    References
    ----------
    Zhou et al. 2022, Conditional Prompt Learning for Vision-Language Models

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> method = CoCoOp(["cat", "dog"], encoder=toy_encoder(tokenizer=CLIPTokenizer()), epochs=2)
    >>> method.fit(pixels, [0, 0, 0, 1, 1, 1]).predict(pixels).shape
    (6,)
    """

    per_image = True

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        context: int = 4,
        init: str | None = "a photo of a",
        epochs: int = 10,
        lr: float = 0.002,
        batch_size: int = 1,
        views: int = 1,
        chunk: int | None = None,
        seed: int = 0,
    ):
        self.encoder, self.names, self.context, self.init = encoder, names, context, init
        self.epochs, self.lr, self.batch_size, self.views, self.chunk = epochs, lr, batch_size, views, chunk
        self.seed = seed

    def start(self, encoder: Encoder) -> Learned:
        """Context and network."""
        dim, width = encoder.dim, encoder.config.text.width
        hidden = max(1, dim // 16)
        return {
            "context": context_start(encoder, self.context, self.init, self.seed),
            **linear_start("down", hidden, dim, self.seed + 1),
            **linear_start("up", width, hidden, self.seed + 2),
        }

    def ready(self, encoder: Encoder) -> None:
        slots = len(context_start(encoder, self.context, self.init, 0))
        self._sentences = class_sentences(encoder, self.names_, slots)

    def shift(self, p: Learned, images: torch.Tensor) -> torch.Tensor:
        """What the network adds to every vector of the context: (B, dim) to (B, width)."""
        hidden = F.relu(F.linear(images, p["down.weight"], p["down.bias"]))
        return F.linear(hidden, p["up.weight"], p["up.bias"])

    def texts(self, p: Learned, x: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """The sentences of these classes around the context of every image: (c, B, dim)."""
        contexts = p["context"] + self.shift(p, x["image"])[:, None]
        return self._sentences.encode(contexts, rows).transpose(0, 1)
