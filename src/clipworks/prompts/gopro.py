"""GOPro: a context moved by the style and content of every layer of the image tower, steadied by views of an image.

Claim: base / new / HM 84.21 / 77.32 / 80.62 against MaPLe's 82.28 / 75.14 / 78.55 (ViT-B/16, mean of 11 data sets). The
released trainer keeps the epoch with the best TEST accuracy, so these numbers may be optimistic.

Formula: with tokens F_l after block l:  s_l = S_l (mean + deviation) / 2,  c_l = C_l mean  (linear maps, statistics
over tokens);  b(x) = combine over l of (s_l + c_l) / 2;  v_m(x) = v_m + b(x);  logits = scale * <x, t_c(x)>.
L = L_ce + MSE(T, T') + MSE(T, T'') + 0.1 L_v, T the class vectors of an image and of its two further views, L_v the
SimCLR loss (temperature 0.1) of z = BN(Z x) between image and first view.

Paper: Singha, Pal, Jha and Banerjee 2023, GOPro: Generate and Optimize Prompts in CLIP using Self-Supervised Learning
(BMVC).
Differs from the paper: a reduced form as to views: both further ones are random crops with mirroring, colour, grey and
blur (of pixels crops and mirroring alone), there is no AugMix. Views are drawn per image from raw pictures, where the
release takes its AugMix views from the first image of the batch and from normalised tensors; the last epoch is kept.
Statistics are over all tokens, the class token among them. The image tower sees a view once; only the two statistics
per layer are kept. Other defaults are the released code's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import check_range
from ..losses.simclr import simclr
from ..registry import method
from ..training.augment import Augment
from .common import Learned, PromptMethod
from .kept import Kept
from .parts import context_start, layer_statistics, linear_start, need_tokens
from .words import class_sentences

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

TEMPERATURE = 0.1


@method(card="gopro", level="M")
class GOPro(PromptMethod):
    """Learn a context and how style and content of an image move it.

    Parameters
    ----------
    names : C class names in the order of the labels; default: the labels themselves, sorted
    encoder : encoder with a transformer for images, or its name or path; default: the bundled one
    context : number of learned vectors, unless `init` says it
    init : words whose embeddings the context starts from; None: at random
    consistency : weight of the squared distance between the class vectors of an image and of either further view
    contrast : weight of the contrastive loss between image and first further view
    epochs : passes over the images
    lr : highest learning rate, of SGD with momentum 0.9 and weight decay 5e-4; cosine, first epoch at 1e-5
    batch_size : images per step; each has three times class vectors of its own, so memory and time grow with it
    views : of each image, kept from the beginning: the image itself and changed crops, of which a step takes three
    chunk : classes encoded at a time (no effect on the result); default: as many as 0.7 GB hold with ViT-B
    seed : of the start, the order and the views

    Attributes
    ----------
    learned_ : "context" (M, width); "style.l" and "content.l" (width, channels) per block, "combine" (1, blocks),
        "head" (d, d) and "norm" (d,), each ".weight" and ".bias"; the last two serve learning only
    classes_, names_, losses_ : labels, class names, the loss of every step

    Inputs
    ------
    images with labels; vectors are not enough, since all layers of the image tower are looked at

    Relations
    ---------
    With "combine" at zero it is `coop` with the same context. `cocoop` moves the context by the image's vector alone.

    References
    ----------
    Singha et al. 2023, GOPro: Generate and Optimize Prompts in CLIP using Self-Supervised Learning

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> method = GOPro(["cat", "dog"], encoder=toy_encoder(tokenizer=CLIPTokenizer()), epochs=2)
    >>> method.fit(pixels, [0, 0, 0, 1, 1, 1]).predict(pixels).shape
    (6,)
    """

    keeps = "own"
    per_image = True
    crops: ClassVar[Augment] = Augment(
        scale=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, grey=0.2, blur=0.5
    )

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        context: int = 4,
        init: str | None = "a photo of a",
        consistency: float = 1.0,
        contrast: float = 0.1,
        epochs: int = 50,
        lr: float = 0.002,
        batch_size: int = 4,
        views: int = 3,
        chunk: int | None = None,
        seed: int = 0,
    ):
        self.names, self.encoder, self.context, self.init = names, encoder, context, init
        self.consistency, self.contrast = consistency, contrast
        self.epochs, self.lr, self.batch_size, self.views, self.chunk = epochs, lr, batch_size, views, chunk
        self.seed = seed

    def start(self, encoder: Encoder) -> Learned:
        """Context, one style and one content map per block, their combination, and the head of the contrastive loss."""
        need_tokens("GOPro", encoder)
        check_range("consistency", self.consistency, 0)
        check_range("contrast", self.contrast, 0)
        vision, width, dim = encoder.config.vision, encoder.config.text.width, encoder.dim
        p = {"context": context_start(encoder, self.context, self.init, self.seed)}
        for layer in range(vision.depth):
            p |= linear_start(f"style.{layer}", width, vision.width, self.seed + 1 + layer)
            p |= linear_start(f"content.{layer}", width, vision.width, self.seed + 1001 + layer)
        p |= linear_start("combine", 1, vision.depth, self.seed + 2001)
        p |= linear_start("head", dim, dim, self.seed + 2002)
        return p | {"norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim)}

    def ready(self, encoder: Encoder) -> None:
        slots = len(context_start(encoder, self.context, self.init, 0))
        self._sentences = class_sentences(encoder, self.names_, slots)

    def look(self, encoder: Encoder, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The image's vector, and mean and deviation over the tokens after every block, (B, blocks, channels)."""
        need_tokens("GOPro", encoder)
        return layer_statistics(encoder, pixels)

    def draw(self, kept: Kept, rows: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Three views of each image, one after the other: 3B rows; the same one where there are no others."""
        first = rng.integers(kept.views, size=len(rows))
        views = np.concatenate([(first + step) % kept.views for step in range(3)])
        return kept.take(np.tile(rows, 3), views, self.model.device)

    def step_tokens(self, batch: int) -> int:
        return super().step_tokens(3 * batch)

    def shift(self, p: Learned, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """What style and content add to every vector of the context: (B, width)."""
        parts = []
        for layer, (mean, deviation) in enumerate(zip(x["mean"].unbind(1), x["deviation"].unbind(1), strict=True)):
            style = F.linear((mean + deviation) / 2, p[f"style.{layer}.weight"], p[f"style.{layer}.bias"])
            content = F.linear(mean, p[f"content.{layer}.weight"], p[f"content.{layer}.bias"])
            parts.append((style + content) / 2)
        return F.linear(torch.stack(parts, -1), p["combine.weight"], p["combine.bias"])[..., 0]

    def texts(self, p: Learned, x: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """The sentences of these classes around the context of every image: (c, B, dim)."""
        contexts = p["context"] + self.shift(p, x)[:, None]
        return self._sentences.encode(contexts, rows).transpose(0, 1)

    def loss(
        self, p: Learned, x: dict[str, torch.Tensor], y: torch.Tensor, images: torch.Tensor, texts: torch.Tensor
    ) -> torch.Tensor:
        """Cross entropy of the images, agreement of the views' class vectors, contrast of image and first view."""
        image, first, _ = images.chunk(3)
        own, one, two = texts.chunk(3, dim=1)
        value = F.cross_entropy(self.scores(image, own), y)
        value = value + self.consistency * (F.mse_loss(own, one) + F.mse_loss(own, two))
        return value + self.contrast * simclr(projected(p, image), projected(p, first), TEMPERATURE)


def projected(p: Learned, x: torch.Tensor) -> torch.Tensor:
    """Linear map and batch normalisation by the batch's own statistics, (B, d) to the same shape."""
    z = F.linear(x, p["head.weight"], p["head.bias"])
    z = (z - z.mean(0)) * torch.rsqrt(z.var(0, correction=0) + 1e-5)
    return z * p["norm.weight"] + p["norm.bias"]
