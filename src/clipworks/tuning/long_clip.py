"""Long-CLIP: texts of 248 tokens by stretched positions, learned on long captions without losing the short ones.

Claim: CLIP reads 77 tokens and uses about 20; stretched and briefly fine-tuned it finds images by long captions
(ShareGPT4V, ViT-L/14: text to image 84.0 to 95.6 %) and is better on short ones too (COCO 35.4 to 46.3 %), where plain
fine-tuning on long captions loses 17 points of zero-shot ImageNet and this loses 2.

Formula: rows 0 to keep - 1 of the position table stay; behind them new[keep + 4 i + j] = (1 - j/4) old[keep + i] +
(j/4) old[keep + i + 1], linearly continued at the end.  L = ITC(F, long) + ITC(F_pc, short), F unit image rows of the
batch with mean mu, F_pc = (F - mu) V V^T + mu with the top 32 right singular vectors V of F - mu; ITC is InfoNCE with
label smoothing 0.1, the short text the first sentence of the long one.

Paper: Zhang et al. 2024, Long-CLIP: Unlocking the Long-Text Capability of CLIP (ECCV).
Differs from the paper: V is computed without gradient (its derivative is unstable where singular values are near one
another; the release lets it pass). As in the release, the components are those of one process's rows.
Defaults: keep 20, 248 tokens, 32 components, smoothing 0.1, AdamW (0.9, 0.999), lr 1e-6, weight decay 0.01, 200 steps
of warm-up, cosine, 6 epochs, batch 2048: released code and its notes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..encoders.encoder import Encoder
from ..errors import ClipworksError, check_range
from ..losses.infonce import infonce
from ..pretraining.parts import ModuleRecipe
from ..registry import method
from ..training.augment import Augment, resolve_augment
from ..training.recipe import ContrastiveRecipe, contrast
from .common import TEMPLATE, Tuned, Tuner, run
from .shots import Shots


@method(card="long-clip", level="M")
class LongCLIP(Tuner):
    """Stretch the context of a text tower and fine-tune both towers on long captions.

    Parameters
    ----------
    names : class names; what is predicted, and what labels may be given as
    encoder : encoder, or its name or path; default: the bundled one
    length : tokens that texts may have afterwards
    keep : positions at the start that stay as they are, start token included
    components : principal components of the image rows that short texts are compared with
    smoothing : share of the target that is spread evenly over the batch
    templates : sentences around the names
    lr, weight_decay : of AdamW
    warmup : steps of warm-up, or below 1 their share of the run
    epochs : passes over the pairs
    batch_size : pairs per step; up to `components` + 1 of them, short texts are compared with whole rows
    augment : views: "none", "light", "crop" (8 % and more, flip), "standard", "strong"
    seed : of order and views

    Attributes
    ----------
    encoder_, classes_, classifier_, alpha_, losses_ : see `common.Tuner`

    Inputs
    ------
    images with long captions, of which the first sentence says what matters most

    Relations
    ---------
    Without training it is `Encoder.resize(context_length=...)`. With no more pairs than components and one sentence per
    caption it is contrastive fine-tuning with the loss counted twice.

    References
    ----------
    Zhang et al. 2024, Long-CLIP: Unlocking the Long-Text Capability of CLIP

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> tuner = LongCLIP(["cat", "dog"], encoder=toy_encoder(tokenizer=CLIPTokenizer()), epochs=1)
    >>> tuner.fit(pixels, ["A cat. It sleeps.", "a cat", "a dog", "Two dogs. They run."]).encoder_.context_length
    248
    """

    pairs = True
    frozen = ("text.positions",)  # those that learn are the recipe's, so that the first rows have no gradient at all
    also_changed = frozenset({"text.positions"})

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        length: int = 248,
        keep: int = 20,
        components: int = 32,
        smoothing: float = 0.1,
        templates: str | Sequence[str] = TEMPLATE,
        lr: float = 1e-6,
        weight_decay: float = 0.01,
        warmup: float = 200,
        epochs: int = 6,
        batch_size: int = 2048,
        augment: str = "none",
        seed: int = 0,
    ):
        self.names, self.encoder, self.length, self.keep, self.components = names, encoder, length, keep, components
        self.smoothing, self.templates, self.lr, self.weight_decay = smoothing, templates, lr, weight_decay
        self.warmup, self.epochs, self.batch_size, self.augment, self.seed = warmup, epochs, batch_size, augment, seed

    def _shape(self, encoder: Encoder) -> None:
        if encoder.config.text.pool == "last":
            raise ClipworksError("encoder must not read its texts at the last position of the context, which moves.")
        encoder.resize(context_length=self.length, keep=self.keep)

    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        check_range("components", self.components, 1)
        check_range("smoothing", self.smoothing, 0, 1)
        recipe = LongRecipe(self.keep, self.components, self.smoothing, resolve_augment(self.augment))
        tuned = run(
            start, shots.captioned(self.templates, self.seed), recipe, freeze=self.frozen, lr=self.lr,
            weight_decay=self.weight_decay, betas=(0.9, 0.999), eps=1e-8, warmup=self.warmup, epochs=self.epochs,
            batch_size=self.batch_size, seed=self.seed, progress=progress,
        )  # fmt: skip
        with torch.no_grad():
            tuned.encoder.text.positions[self.keep :] = tuned.parts["rest"]
        return tuned


class LongRecipe(ModuleRecipe):
    """A step of Long-CLIP: whole image rows against long texts, their principal components against short ones.

    Parameters
    ----------
    keep : rows of the position table that do not learn
    components : of the image rows of a batch
    smoothing : of the labels
    augment : how views are drawn
    """

    def __init__(self, keep: int, components: int, smoothing: float, augment: Augment | None = None):
        super().__init__(ContrastiveRecipe("infonce", augment))
        self.keep, self.components, self.smoothing = keep, components, smoothing

    def build(self, encoder: Encoder) -> None:
        self.rest = nn.Parameter(encoder.text.positions.detach()[self.keep :].clone())

    def batch(self, items: Sequence[Any], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return pixels, and tokens of the long and the short texts."""
        draws = rng.spawn(len(items))
        texts = self.plain.texts(items, draws)
        tokenize = self.plain.bound.tokenize
        short = tokenize([first_sentence(text) for text in texts])
        return {"pixels": self.plain.pixels(items, draws), "tokens": tokenize(texts), "short": short}

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return image rows, rows of long and of short texts, and the scale."""
        table = torch.cat([encoder.text.positions[: self.keep], self.rest])
        found = {"image": encoder.encode_image(batch["pixels"]), "scale": encoder.log_scale.exp().reshape(())}
        for name, tokens in (("text", batch["tokens"]), ("short", batch["short"])):
            found[name] = encoder.encode_text(tokens, positions=table)
        return found

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the losses on long and on short texts."""
        image, scale = features["image"], features["scale"]
        main = principal_part(image, self.components)
        pairs = {"long": (image, features["text"]), "short": (main, features["short"])}
        found: dict[str, torch.Tensor] = {}
        for name, (rows, text) in pairs.items():
            found |= contrast(infonce, name, {"image": rows, "text": text, "scale": scale}, smoothing=self.smoothing)
        return found


def principal_part(rows: torch.Tensor, components: int) -> torch.Tensor:
    """Return rows (n, dim) with all but their first principal components set to the mean, not normalised.

    The directions carry no gradient. With n - 1 <= components nothing is left out, and the rows come back.

    >>> rows = torch.tensor([[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]]) + torch.tensor([[0.1, -0.1]])
    >>> torch.allclose(principal_part(rows, 1), rows)  # all on one line
    True
    """
    if len(rows) - 1 <= components or rows.shape[1] <= components:
        return rows
    mean = rows.mean(0, keepdim=True)
    directions = torch.linalg.svd((rows - mean).detach(), full_matrices=False)[2][:components]
    return (rows - mean) @ directions.T @ directions + mean


def first_sentence(text: str) -> str:
    """Return the text before the first ". ", which is also what a text of one sentence is without its end.

    >>> first_sentence("A red boat. Two people row it.")
    'A red boat.'
    """
    head, stop, _ = text.strip().partition(". ")
    return f"{head}." if stop else head
