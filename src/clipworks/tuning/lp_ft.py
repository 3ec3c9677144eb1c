"""LP-FT: first a linear probe, then full fine-tuning from it, so that features are not bent towards a random head.

Claim: fine-tuning from a fitted head keeps features better: on ten data sets with shifts it is on average 1 point above
full fine-tuning in distribution and 10 points out of it.

Formula: v_1 = argmin_v CE(v f_0(x)); then (v, f) by gradient from (v_1, f_0);  logits = scale * v f(x), rows of v
beginning as the class words.

Paper: Kumar et al. 2022, Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution (ICLR).
Differs from the paper: the probe begins as the words of the classes instead of at random, as FLYP's comparison has it,
so that step 0 is zero-shot CLIP; it takes gradient steps on views. `alpha` (WiSE-FT) may follow; 1 leaves it out.
Defaults: 10 epochs each, lr 1e-5 for all and a hundred times that for the head, weight decay 0.1 and 0, batch 128:
those of the preset "lp-ft" of `training/finetune.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..encoders.encoder import Encoder
from ..errors import check_range
from ..registry import method
from .common import TEMPLATE, Tuned, Tuner, only, run_head
from .shots import Shots


@method(card="few-shot-foundations", level="M")
class LPFT(Tuner):
    """Fit a linear head, then fine-tune the image tower and the head from there.

    Parameters
    ----------
    names : class names; labels are these or their numbers (default: the labels are the names)
    encoder : encoder, or its name or path; default: the bundled one
    templates : sentences around the names, for the start of the head
    lr, weight_decay : of AdamW in the second stage
    head_lr : in the first stage; default: a hundred times `lr`
    head_epochs, epochs : passes over the images in each stage; without the first it is plain full fine-tuning
    batch_size : images per step
    augment : views: "light", "crop" (8 % and more, flip), "none", "standard", "strong"
    alpha : share of the change that is kept, head included; None: chosen on `validation`
    seed : of order and views

    Attributes
    ----------
    encoder_, classes_, classifier_, alpha_, losses_ : see `common.Tuner`; the rows of `classifier_` are the head

    Inputs
    ------
    labelled images; the text tower makes the first head and stays as it is

    Relations
    ---------
    `wise_ft` is the second stage alone, averaged with the start; `flyp` fine-tunes without a head. On cached features
    the first stage is `heads/linear_probe`.

    References
    ----------
    Kumar et al. 2022, Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution

    Examples
    --------
    >>> import torch
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> tuner = LPFT(encoder=toy_encoder(tokenizer=CLIPTokenizer()), epochs=1, head_epochs=1)
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
        lr: float = 1e-5,
        weight_decay: float = 0.1,
        head_lr: float | None = None,
        head_epochs: int = 10,
        epochs: int = 10,
        batch_size: int = 128,
        augment: str = "light",
        alpha: float | None = 1.0,
        seed: int = 0,
    ):
        self.names, self.encoder, self.templates = names, encoder, templates
        self.lr, self.weight_decay = lr, weight_decay
        self.head_lr, self.head_epochs, self.epochs, self.batch_size = head_lr, head_epochs, epochs, batch_size
        self.augment, self.alpha, self.seed = augment, alpha, seed

    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        check_range("head_epochs", self.head_epochs, 0)
        head: Any = self._words(start)
        common: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed, "clip": 1.0, "progress": progress}
        if self.head_epochs:
            head = run_head(
                start, shots.items, shots.table or {}, head, self.augment, freeze=only("recipe.head.weight"),
                lr=100 * self.lr if self.head_lr is None else self.head_lr, weight_decay=0.0, epochs=self.head_epochs,
                **common,
            ).head  # fmt: skip
        return run_head(
            start, shots.items, shots.table or {}, head, self.augment, freeze=self.frozen, lr=self.lr,
            weight_decay=self.weight_decay, epochs=self.epochs, **common,
        )  # fmt: skip
