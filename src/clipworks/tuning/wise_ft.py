"""WiSE-FT: full fine-tuning from the class words, then averaged with where it began.

Claim: a straight line between zero-shot and fine-tuned weights holds models better than both ends; ImageNet
fine-tuning gains 1.6 points in distribution and 4 to 6 points on shifted test sets over earlier work.

Formula: logits = scale * v f(x), the rows of v beginning as the class words; (v, f) by cross-entropy; then
theta = (1 - alpha) * theta_0 + alpha * theta_1 for towers and head alike (`training/wise_ft`).

Paper: Wortsman et al. 2022, Robust fine-tuning of zero-shot models (CVPR); soups: Wortsman et al. 2022, Model soups.
Differs from the paper: the text tower is part of the model and stays as it is. Several runs that differ in their seed
can be averaged before (`runs`, a uniform soup), which the first paper does not.
Defaults: alpha 0.5, to be used where no validation set says otherwise; lr 1e-5, weight decay 0.1, 10 epochs, batch 128:
those of the preset "wise-ft" of `training/finetune.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..encoders.encoder import Encoder
from ..errors import check_range
from ..registry import method
from ..training.soups import uniform_soup
from .common import TEMPLATE, Tuned, Tuner, run_head
from .shots import Shots


@method(card="distillation-foundations", level="MR")
class WiseFT(Tuner):
    """Fine-tune the image tower with a head, and keep a share of the change.

    Parameters
    ----------
    names : class names; labels are these or their numbers (default: the labels are the names)
    encoder : encoder, or its name or path; default: the bundled one
    templates : sentences around the names, for the start of the head
    alpha : share of the change that is kept, head included; None: chosen on `validation`
    runs : fine-tuned models that are averaged first, each with a seed of its own
    lr, weight_decay : of AdamW
    epochs : passes over the images
    batch_size : images per step
    augment : views: "light", "crop" (8 % and more, flip), "none", "standard", "strong"
    seed : of order and views; further runs take the seeds that follow

    Attributes
    ----------
    encoder_, classes_, classifier_, alpha_, losses_ : see `common.Tuner`; the rows of `classifier_` are the head

    Inputs
    ------
    labelled images; the text tower makes the first head and stays as it is

    Relations
    ---------
    `training/wise_ft` is the average, `training/soups` that of several runs. With alpha 1 it is full fine-tuning, with
    alpha 0 zero-shot CLIP. `lp_ft` fits the head first.

    References
    ----------
    Wortsman et al. 2022, Robust fine-tuning of zero-shot models

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> tuner = WiseFT(encoder=toy_encoder(tokenizer=CLIPTokenizer()), epochs=1)
    >>> tuner.fit(pixels, ["cat", "cat", "dog", "dog"]).predict(pixels).shape
    (4,)
    """

    frozen = ("text.*", "log_scale")

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        templates: str | Sequence[str] = TEMPLATE,
        alpha: float | None = 0.5,
        runs: int = 1,
        lr: float = 1e-5,
        weight_decay: float = 0.1,
        epochs: int = 10,
        batch_size: int = 128,
        augment: str = "light",
        seed: int = 0,
    ):
        self.names, self.encoder, self.templates, self.alpha, self.runs = names, encoder, templates, alpha, runs
        self.lr, self.weight_decay, self.epochs, self.batch_size = lr, weight_decay, epochs, batch_size
        self.augment, self.seed = augment, seed

    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        check_range("runs", self.runs, 1)
        words: torch.Tensor = self._words(start)  # type: ignore[assignment]
        members = [
            run_head(
                start, shots.items, shots.table or {}, words, self.augment, freeze=self.frozen, lr=self.lr,
                weight_decay=self.weight_decay, epochs=self.epochs, batch_size=self.batch_size, seed=self.seed + k,
                clip=1.0, progress=progress,
            )
            for k in range(self.runs)
        ]  # fmt: skip
        if self.runs == 1:
            return members[0]
        soup = uniform_soup([{**m.encoder.state_dict(), "head": m.head} for m in members])  # type: ignore[dict-item]
        head, last = soup.pop("head"), members[-1]
        last.encoder.load_state_dict(soup)
        return Tuned(last.encoder, last.losses, {"head.weight": head})
