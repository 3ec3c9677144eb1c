"""CLIP-LoRA: low-rank adapters in the linear maps of both towers, through the library peft.

Claim: matrices of rank 2 in the attention of both towers, with one set of settings for all data sets, beat prompts and
adapters with few shots (ViT-B/16, mean of 11 sets, 1 to 16 shots: 72.20, 75.41, 77.32, 80.10, 82.89 %).

Formula: y = W x + b + s B A dropout(x), A (r, in) random, B (out, r) zero at the start, s = alpha / r, or alpha /
sqrt(r) with `stabilised`; L = cross-entropy against the class words of one template, encoded anew in every step.
Merged: W' = W + s B A.

Paper: Zanella and Ben Ayed 2024, Low-Rank Few-Shot Adaptation of Vision-Language Models (CVPR workshops); LoRA: Hu et
al. 2022; the factor 1 / sqrt(r): Kalajdzievski 2023.
Differs from the paper: nothing in the arithmetic. The output and feed-forward maps can have adapters too (`parts`).
Defaults: r 2, s = 1 / sqrt(r), dropout 0.25, q, k and v of every block, AdamW (0.9, 0.999), lr 2e-4, weight decay 0.01,
cosine per step to 1e-6, 500 steps per shot, batch 32, crops of 8 % and more with a flip: released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..encoders.encoder import Encoder
from ..encoders.layers import swap
from ..errors import check_range, need
from ..registry import method
from .class_words import few_shot_steps
from .common import TEMPLATE, Tuned, Tuner, linears, only
from .shots import Shots


@method(card="few-shot-foundations", level="M")
class LoRA(Tuner):
    """Fine-tune low-rank additions to the linear maps of both towers. Needs the extra `adapt` (peft).

    Parameters
    ----------
    names : class names; labels are these or their numbers (default: the labels are the names)
    encoder : encoder, or its name or path; default: the bundled one
    rank : rank of the additions
    lora_alpha : factor of the additions before the division
    stabilised : divide by sqrt(rank), as CLIP-LoRA does; False: by the rank, as LoRA
    dropout : share of the inputs of an addition that training leaves out
    parts : maps that get an addition in every block: "q", "k", "v", "o", "up", "down"
    towers : "both", "vision" or "text"
    templates : sentence around the names
    lr, weight_decay : of AdamW
    steps_per_shot : optimizer steps per image of a class (the mean over the classes)
    batch_size : images per step
    augment : views: "crop" (8 % and more, flip), "none", "light", "standard", "strong"
    seed : of A, order, views and dropout

    Attributes
    ----------
    encoder_, classes_, classifier_, alpha_, losses_ : see `common.Tuner`

    Inputs
    ------
    labelled images; both towers run with gradients

    Relations
    ---------
    With B = 0, as it begins, it is zero-shot CLIP. `clip_svd` changes scales of the directions that are there.

    References
    ----------
    Zanella and Ben Ayed 2024, Low-Rank Few-Shot Adaptation of Vision-Language Models

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> tuner = LoRA(encoder=toy_encoder(tokenizer=CLIPTokenizer()), lr=1e-2, steps_per_shot=1)
    >>> tuner.fit(pixels, ["cat", "cat", "dog", "dog"]).predict(pixels).shape
    (4,)
    """

    frozen = only("*.lora_*")

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        rank: int = 2,
        lora_alpha: float = 1.0,
        stabilised: bool = True,
        dropout: float = 0.25,
        parts: Sequence[str] = ("q", "k", "v"),
        towers: str = "both",
        templates: str | Sequence[str] = TEMPLATE,
        lr: float = 2e-4,
        weight_decay: float = 0.01,
        steps_per_shot: float = 500,
        batch_size: int = 32,
        augment: str = "crop",
        seed: int = 0,
    ):
        self.names, self.encoder, self.rank, self.lora_alpha = names, encoder, rank, lora_alpha
        self.stabilised, self.dropout, self.parts, self.towers = stabilised, dropout, parts, towers
        self.templates, self.lr, self.weight_decay, self.steps_per_shot = templates, lr, weight_decay, steps_per_shot
        self.batch_size, self.augment, self.seed = batch_size, augment, seed

    def _shape(self, encoder: Encoder) -> None:
        check_range("rank", self.rank, 1)
        check_range("dropout", self.dropout, 0, 1)
        peft = need("peft", "adapt")
        config = peft.LoraConfig(
            r=self.rank, lora_alpha=self.lora_alpha, use_rslora=self.stabilised, lora_dropout=self.dropout,
            target_modules=linears(encoder, self.parts, self.towers), bias="none",
        )  # fmt: skip
        peft.inject_adapter_in_model(config, encoder)
        encoder.requires_grad_(True)  # peft freezes the rest; the loop is told what learns

    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        return few_shot_steps(self, start, shots, progress)

    def _merge(self, encoder: Encoder) -> None:
        for path, module in list(encoder.named_modules()):
            if hasattr(module, "get_delta_weight"):
                plain: Any = module.get_base_layer()
                with torch.no_grad():
                    plain.weight += module.get_delta_weight(module.active_adapters[0])
                swap(encoder, path, plain)
