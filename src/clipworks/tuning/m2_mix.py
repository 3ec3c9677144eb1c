"""Geodesic mixup fine-tuning: contrastive fine-tuning with negatives that lie between image and text of a pair.

Claim: as `losses/m2_mix`: features better aligned and more uniform after fine-tuning on pairs, retrieval better than
with the contrastive loss alone (Flickr30k, COCO).

Formula: L = InfoNCE(I, T) + w [CE(Z_I) + CE(Z_T)], negatives m_l(I_i, T_i) on the great circle, l ~ Beta(b, b) once a
step, w = c / (1 + epoch) (`pretraining/m2_mix`).

Paper: Oh et al. 2023, Geodesic Multi-Modal Mixup for Robust Fine-Tuning (NeurIPS).
Differs from the paper: the logit scale is the encoder's own and stays (the paper: 100, CLIP's own).
Defaults: c 0.05, tau2 0.07, b 0.5, lr 1e-5, weight decay 0.2, batch 128, 9 epochs, 10 % warm-up: released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..encoders.encoder import Encoder
from ..pretraining.m2_mix import M2MixRecipe
from ..registry import method
from ..training.augment import resolve_augment
from .common import TEMPLATE, Tuned, Tuner, run
from .shots import Shots


@method(card="m2-mix", level="M")
class M2Mix(Tuner):
    """Fine-tune both towers on pairs with geodesic mixup.

    Parameters
    ----------
    names : class names; what is predicted, and what labels may be given as
    encoder : encoder, or its name or path; default: the bundled one
    weight : c, of the term with mixed negatives
    beta : of the Beta distribution that the share of a mix comes from
    temperature : divides the similarities of that term
    images, texts, both : weights of the unimodal mixes (m3; the paper's: 0.05, 0.05 and 0.1, and weight 0.01)
    fading : whether the weights fall as 1 / (1 + epoch)
    templates : sentences around the names
    lr, weight_decay : of AdamW
    epochs : passes over the pairs
    batch_size : pairs per step
    augment : views: "light", "crop" (8 % and more, flip), "none", "standard", "strong"
    alpha : share of the change that is kept; None: chosen on `validation`
    seed : of order, views and shares

    Attributes
    ----------
    encoder_, classes_, classifier_, alpha_, losses_ : see `common.Tuner`

    Inputs
    ------
    images with captions; or labelled images, each with a sentence about its class that is drawn once

    Relations
    ---------
    With all weights 0 it is `flyp` on captions. `clip_refine` and `wise_ft` aim at the same.

    References
    ----------
    Oh et al. 2023, Geodesic Multi-Modal Mixup for Robust Fine-Tuning

    Examples
    --------
    >>> import torch
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> tuner = M2Mix(["cat", "dog"], encoder=toy_encoder(tokenizer=CLIPTokenizer()), epochs=1)
    >>> tuner.fit(pixels, ["a cat on a mat", "a cat", "a dog", "two dogs"]).predict(pixels).shape
    (4,)
    """

    pairs = True

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        weight: float = 0.05,
        beta: float = 0.5,
        temperature: float = 0.07,
        images: float = 0.0,
        texts: float = 0.0,
        both: float = 0.0,
        fading: bool = True,
        templates: str | Sequence[str] = TEMPLATE,
        lr: float = 1e-5,
        weight_decay: float = 0.2,
        epochs: int = 9,
        batch_size: int = 128,
        augment: str = "light",
        alpha: float | None = 1.0,
        seed: int = 0,
    ):
        self.names, self.encoder, self.weight, self.beta, self.temperature = names, encoder, weight, beta, temperature
        self.images, self.texts, self.both, self.fading, self.templates = images, texts, both, fading, templates
        self.lr, self.weight_decay, self.epochs, self.batch_size = lr, weight_decay, epochs, batch_size
        self.augment, self.alpha, self.seed = augment, alpha, seed

    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        items = shots.captioned(self.templates, self.seed)
        epoch = max(1, len(items) // min(max(1, self.batch_size), len(items)))
        recipe = M2MixRecipe(
            self.weight, self.beta, self.beta, self.temperature, self.images, self.texts, self.both,
            epoch if self.fading else None, resolve_augment(self.augment),
        )  # fmt: skip
        return run(
            start, items, recipe, freeze=self.frozen, lr=self.lr, weight_decay=self.weight_decay, clip=1.0,
            epochs=self.epochs, batch_size=self.batch_size, seed=self.seed, progress=progress,
        )  # fmt: skip
