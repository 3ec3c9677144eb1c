"""VR-LwF: continual fine-tuning that replays random words, so that what the model could read is not lost.

Claim: fine-tuning on a new task loses zero-shot ability; distilling the similarities to random sentences, which stand
for all possible class names, keeps it, without old images (text-to-video, ten tasks, MSR-VTT: recall 24.5, LwF 23.9).

Formula: q = softmax(s f_0(x) R^T / T), p = softmax(s f(x) R^T / T), R = g_0(random sentences), f_0 and g_0 the teacher;
L = CE(s f(x) g(class words)) + a T^2 KL(q || p) + b T^2 KL(q' || p'), q' and p' the softmax over the images of the
batch for every sentence, of f_0(x) R^T and of f(x) g(sentences)^T.

Paper: Ding et al. 2022, Don't Stop Learning: Towards Continual Learning for the CLIP Model (arXiv 2207.09248); its
forms and settings here are those of the re-implementation in ZSCL (Zheng et al. 2023).
Differs from the paper: KL in place of the cross-entropy, which has the same gradient and is 0 where nothing was
forgotten. A step distils on `per_step` of the sentences, drawn anew, instead of on all. `sentences` given as texts are
LwF with these (old class names, a word list); weights 0 are plain fine-tuning. Which image rows the second direction
has is not confirmed: here the student's own.
Defaults: 1000 sentences of 10 tokens, T 2, a = b = 1, label smoothing 0.2, lr 1e-5, 1000 steps: ZSCL's code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..encoders.encoder import Encoder
from ..encoders.loading import resolve
from ..errors import ClipworksError, check_range
from ..losses.relation_distillation import divergence
from ..registry import method
from ..training.augment import resolve_augment
from .class_words import ClassRecipe
from .common import TEMPLATE, Tuned, Tuner, run
from .shots import Shots


@method(card="vr-lwf", level="M")
class VRLwF(Tuner):
    """Fine-tune both towers on labels, and keep the similarities to random sentences.

    Parameters
    ----------
    names : class names; labels are these or their numbers (default: the labels are the names)
    encoder : encoder, or its name or path: the model before this task; default: the bundled one
    teacher : encoder whose similarities are kept, for example the one before all tasks; default: `encoder`
    image_weight, text_weight : of the two directions of the distillation; 0 and 0: plain fine-tuning
    temperature : T, of the distillation
    sentences : how many random ones, or texts in their place (old class names: LwF)
    words : tokens of a random sentence
    per_step : sentences that a step distils on; None: all
    smoothing : share of the target that is spread evenly over the classes
    templates : sentence around the names
    lr, weight_decay : of AdamW
    steps : optimizer steps
    batch_size : images per step
    augment : views: "light", "crop" (8 % and more, flip), "none", "standard", "strong"
    alpha : share of the change that is kept; None: chosen on `validation`
    seed : of sentences, order and views

    Attributes
    ----------
    encoder_, classes_, classifier_, alpha_, losses_ : see `common.Tuner`

    Inputs
    ------
    labelled images of one task; nothing of earlier ones

    Relations
    ---------
    `continual` runs any method over several tasks and reports what is forgotten. `wise_ft` (here `alpha`) keeps old
    skill by averaging. The distillation is that of `losses/relation_distillation`, on words instead of pairs.

    References
    ----------
    Ding et al. 2022, Don't Stop Learning: Towards Continual Learning for the CLIP Model

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> tuner = VRLwF(encoder=toy_encoder(tokenizer=CLIPTokenizer()), steps=1, sentences=6)
    >>> tuner.fit(pixels, ["cat", "cat", "dog", "dog"]).predict(pixels).shape
    (4,)
    """

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        teacher: Any = None,
        image_weight: float = 1.0,
        text_weight: float = 1.0,
        temperature: float = 2.0,
        sentences: int | Sequence[str] = 1000,
        words: int = 10,
        per_step: int | None = 100,
        smoothing: float = 0.2,
        templates: str | Sequence[str] = TEMPLATE,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        steps: int = 1000,
        batch_size: int = 64,
        augment: str = "light",
        alpha: float | None = 1.0,
        seed: int = 0,
    ):
        self.names, self.encoder, self.teacher = names, encoder, teacher
        self.image_weight, self.text_weight, self.temperature = image_weight, text_weight, temperature
        self.sentences, self.words, self.per_step, self.smoothing = sentences, words, per_step, smoothing
        self.templates, self.lr, self.weight_decay, self.steps = templates, lr, weight_decay, steps
        self.batch_size, self.augment, self.alpha, self.seed = batch_size, augment, alpha, seed

    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        for name in ("image_weight", "text_weight"):
            check_range(name, getattr(self, name), 0)
        if not self.temperature > 0:
            raise ClipworksError(f"temperature must be above 0. Got {self.temperature}.")
        if isinstance(self.sentences, int):
            tokens = random_sentences(start, self.sentences, self.words, self.seed)
        else:
            tokens = start.tokenize(list(self.sentences))
        teacher = start if self.teacher is None else resolve(self.teacher)
        recipe = ReplayRecipe(
            shots.table or {}, self.templates, resolve_augment(self.augment), self.smoothing, teacher=teacher,
            tokens=tokens, weights=(self.image_weight, self.text_weight), temperature=self.temperature,
            per_step=self.per_step,
        )  # fmt: skip
        return run(
            start, shots.items, recipe, freeze=self.frozen, lr=self.lr, weight_decay=self.weight_decay,
            betas=(0.9, 0.999), eps=1e-8, steps=self.steps, batch_size=self.batch_size, clip=1.0, seed=self.seed,
            progress=progress,
        )  # fmt: skip


class ReplayRecipe(ClassRecipe):
    """Cross-entropy over the classes, and the teacher's similarities to sentences.

    Parameters
    ----------
    table, templates, augment, smoothing : as in `ClassRecipe`
    teacher : encoder whose similarities are kept; a frozen copy is made
    tokens : of the sentences, (V, L)
    weights : of the distillation over sentences and over images
    temperature : of both
    per_step : sentences per step, None for all
    """

    def __init__(
        self, *arguments: Any, teacher: Encoder, tokens: torch.Tensor, weights: tuple[float, float],
        temperature: float, per_step: int | None,
    ):  # fmt: skip
        super().__init__(*arguments)
        self.teacher = copy.deepcopy(teacher).requires_grad_(False).eval()
        self.replay, self.weights, self.temperature = tokens, weights, temperature
        self.per_step = len(tokens) if per_step is None else min(int(check_range("per_step", per_step, 1)), len(tokens))
        with torch.no_grad():
            parts = tokens.to(teacher.device).split(256)
            self.known = torch.cat([self.teacher.encode_text(part) for part in parts])

    def batch(self, items: Sequence[Any], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return pixels, labels, and the numbers of this step's sentences."""
        chosen = torch.from_numpy(rng.choice(len(self.replay), self.per_step, replace=False))
        return {**super().batch(items, step, rng), "chosen": chosen}

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the cross-entropy and the two distillations."""
        scale, image = encoder.log_scale.exp().reshape(()), encoder.encode_image(batch["pixels"])
        logits = scale * image @ self.classes(encoder).T
        found = {"cross_entropy": F.cross_entropy(logits, batch["labels"], label_smoothing=self.smoothing)}
        if not any(self.weights):
            return found
        self.teacher.to(image.device)
        known = self.known.to(image.device)[batch["chosen"]]
        with torch.no_grad():
            old = self.teacher.encode_image(batch["pixels"]) @ known.T * self.teacher.log_scale.exp() / self.temperature
        factor = self.temperature**2
        if self.weights[0]:
            new = scale * image @ known.T / self.temperature
            found["images"] = self.weights[0] * factor * divergence(old.log_softmax(1), new)
        if self.weights[1]:
            texts = encoder.encode_text(self.replay.to(image.device)[batch["chosen"]])
            new = scale * texts @ image.T / self.temperature
            found["texts"] = self.weights[1] * factor * divergence(old.T.log_softmax(1), new)
        return found


def random_sentences(encoder: Encoder, count: int, words: int = 10, seed: int = 0) -> torch.Tensor:
    """Return token ids (count, context) of random tokens between start and end token, padded behind; no special one
    among them."""
    check_range("sentences", count, 1)
    tokenizer: Any = encoder.tokenizer
    if tokenizer is None:
        raise ClipworksError("encoder must have a tokenizer, whose start and end tokens frame the sentences.")
    prefix = list(getattr(tokenizer, "prefix", ())) or [tokenizer.start_id]
    suffix = list(getattr(tokenizer, "suffix", ())) or [tokenizer.eot_id]
    text = encoder.config.text
    check_range("words", words, 1, text.context_length - len(prefix) - len(suffix))
    special = {*prefix, *suffix, tokenizer.eot_id, tokenizer.pad_id}
    plain = np.array([i for i in range(min(tokenizer.vocab_size, text.vocab_size)) if i not in special])
    inner = torch.from_numpy(np.random.default_rng(seed).choice(plain, (count, words)))
    rows = torch.cat([torch.tensor(prefix).expand(count, -1), inner, torch.tensor(suffix).expand(count, -1)], dim=1)
    return F.pad(rows, (0, text.context_length - rows.shape[1]), value=text.pad_id)
