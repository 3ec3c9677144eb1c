"""GM-DF: a detector of fakes over several sources: experts and norms of the domains in CLIP, and a meta step.

Claim: one detector trained on several sets of forgeries mixes their domains up and gets worse; experts, domain norms,
masked reconstruction and meta-learning over the domains avoid that (effective on five sets; no figures at hand).

Formula: block F(x) + dF(x), dF = sum_i w_i E_i(x), w = softmax of attention among the experts' answers;  last norm
(x - mu) / sigma (g + W_g e_d) + b + W_b e_d, e_d the domain's embedding;  L = L_cls + 0.5 L_mim + 0.3 L_sis, L_cls
cross-entropy of a head that begins as the class words, L_mim squared error of the pixels of hidden patches, L_sis
cross-entropy of the image with the sentences "A [domain][class] face showing forgery clues" of all classes and domains,
temperature 0.07 + 0.01 |e_d|.  Meta step, domains A and B drawn: th' = th - b grad L_cls(A; th) for the experts; the
gradient is that of L(A; th) + L(B; th') + 0.1 W(A, B), W the squared 2-Wasserstein distance of their features.

Paper: Lai et al. 2024, GM-DF: Generalized Multi-Scenario Deepfake Detection (arXiv 2406.20078).
Differs from the paper: no code was released, formulas and numbers are those of a re-implementation. A reduced form: the
second-order aggregation of layers 8 to 10 is left out, as its form is not known; experts are in the last blocks only.
Covariances are diagonal by default. An image of an unknown source has the mean of the domains' embeddings, which is
also how all images are classified. Patches are hidden behind the stem, whose convolutions may see their neighbours.
Defaults: 3 experts, embeddings of 64, half of the patches, weights 0.5, 0.3, 0.1, inner rate 1e-4, outer 3e-6, batch
32, 40 epochs: re-implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..encoders.encoder import Encoder
from ..encoders.layers import swap
from ..errors import ClipworksError, check_range
from ..heads.common import class_numbers
from ..pretraining.parts import ModuleRecipe, need_vit
from ..prompts.words import Sentences, phrase, word_vectors
from ..registry import method
from ..training.augment import Augment, resolve_augment
from ..training.recipe import ContrastiveRecipe
from .common import TEMPLATE, Tuned, Tuner, only, run
from .domains import DomainNorm, ExpertAdapter, PatchDecoder, hidden_error, in_domains, patch_pixels
from .meta import gaussian_distance, inner_step, with_parameters
from .shots import Shots
from .slots import slotted

T = TypeVar("T", bound="GMDF")


@method(card="gm-df", level="M")
class GMDF(Tuner):
    """Train experts and norms of the domains in a frozen image tower, to classify images of sources never seen.

    Parameters
    ----------
    names : class names ("a real face", "a fake face"); labels are these or their numbers (default: the labels)
    encoder : encoder, or its name or path; default: the bundled one
    domains : names of the sources that `fit` is told of; none: all images are of one
    sentence : words before and behind the learned tokens of domain and class
    experts, hidden : how many beside the feed-forward part of a block, and how wide
    blocks : last blocks that have experts
    domain_size : numbers in a domain's embedding
    mask_ratio : share of the patches that is hidden for the reconstruction
    pixel_weight, sentence_weight, alignment_weight : of L_mim, L_sis and the distance of the domains
    diagonal : variances alone in the distance
    inner_lr : b, of the step that the experts take on the first domain; 0 is joint training
    second_order : differentiate that step; False takes its gradient for a constant
    templates : sentence around the names, for the start of the head
    lr, weight_decay : of AdamW
    epochs : passes over the images
    batch_size : images per step, half of them of each domain
    augment : views: "light", "crop" (8 % and more, flip), "none", "standard", "strong"
    seed : of all that is new, order and views

    Attributes
    ----------
    encoder_, classes_, classifier_, alpha_, losses_ : see `common.Tuner`; the rows of `classifier_` are the head

    Inputs
    ------
    labelled images of several sources (faces, cut out the same way everywhere; split by video or person)

    Relations
    ---------
    With one domain, `inner_lr` 0 and the weights 0 it trains adapters with cross-entropy. `clip_moe` has experts that
    are whole feed-forward parts; `heads/clip_adapter` adapts cached vectors.

    References
    ----------
    Lai et al. 2024, GM-DF: Generalized Multi-Scenario Deepfake Detection

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> tuner = GMDF(encoder=toy_encoder(tokenizer=CLIPTokenizer()), epochs=1)
    >>> tuner.fit(pixels, ["real face", "real face", "fake face", "fake face"]).predict(pixels).shape
    (4,)
    """

    frozen = only("visual.blocks.*.mlp.experts.*", "visual.blocks.*.mlp.router.*", "visual.norm_post.domain.*")
    merges = False

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        domains: Sequence[str] = (),
        sentence: Sequence[str] = ("a", "face showing forgery clues"),
        experts: int = 3,
        hidden: int = 64,
        blocks: int = 3,
        domain_size: int = 64,
        mask_ratio: float = 0.5,
        pixel_weight: float = 0.5,
        sentence_weight: float = 0.3,
        alignment_weight: float = 0.1,
        diagonal: bool = True,
        inner_lr: float = 1e-4,
        second_order: bool = True,
        templates: str | Sequence[str] = TEMPLATE,
        lr: float = 3e-6,
        weight_decay: float = 0.01,
        epochs: int = 40,
        batch_size: int = 32,
        augment: str = "light",
        seed: int = 0,
    ):
        self.names, self.encoder, self.domains, self.sentence = names, encoder, domains, sentence
        self.experts, self.hidden, self.blocks, self.domain_size = experts, hidden, blocks, domain_size
        self.mask_ratio, self.pixel_weight, self.sentence_weight = mask_ratio, pixel_weight, sentence_weight
        self.alignment_weight, self.diagonal, self.inner_lr = alignment_weight, diagonal, inner_lr
        self.second_order, self.templates, self.lr, self.weight_decay = second_order, templates, lr, weight_decay
        self.epochs, self.batch_size, self.augment, self.seed = epochs, batch_size, augment, seed

    def fit(
        self: T, images: Any, y: Any, *, domains: Any = None, validation: Any = None, progress: bool | None = None
    ) -> T:
        """Learn from labelled images.

        Parameters
        ----------
        images, y, validation, progress : as in `common.Tuner.fit`
        domains : source of every image, one of `domains`
        """
        self._sources = domains
        try:
            return super().fit(images, y, validation=validation, progress=progress)
        finally:
            del self._sources

    def _shape(self, encoder: Encoder) -> None:
        need_vit(encoder, "GMDF")
        for name in ("experts", "hidden", "blocks", "domain_size"):
            check_range(name, getattr(self, name), 1)
        if not isinstance(encoder.visual.norm_post, nn.LayerNorm):
            raise ClipworksError("encoder must have a norm behind its blocks, which the domains change. This one "
                                 "has none.")  # fmt: skip
        depth = len(encoder.visual.blocks)
        for i in range(max(0, depth - self.blocks), depth):
            plain = encoder.visual.blocks[i].mlp
            swap(encoder, f"visual.blocks.{i}.mlp", ExpertAdapter(plain, self.experts, self.hidden).to(encoder.dtype))
        norm = DomainNorm(encoder.visual.norm_post, max(1, len(self.domains)), self.domain_size)
        swap(encoder, "visual.norm_post", norm.to(encoder.dtype))

    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        for name in ("pixel_weight", "sentence_weight", "alignment_weight", "inner_lr"):
            check_range(name, getattr(self, name), 0)
        check_range("mask_ratio", self.mask_ratio, 0, 0.95)
        if isinstance(self.sentence, str) or len(self.sentence) != 2:
            raise ClipworksError(f"sentence must be the words before and behind. Got {self.sentence!r}.")
        head: Any = self._words(start)
        recipe = MetaRecipe(
            shots, self._codes(len(shots.items)), head, self.sentence, mask_ratio=self.mask_ratio,
            weights=(self.pixel_weight, self.sentence_weight, self.alignment_weight), diagonal=self.diagonal,
            inner_lr=self.inner_lr, second_order=self.second_order, augment=resolve_augment(self.augment),
            seed=self.seed,
        )  # fmt: skip
        return run(
            start, shots.items, recipe, freeze=(*self.frozen, "!recipe.*"), lr=self.lr, weight_decay=self.weight_decay,
            epochs=self.epochs, batch_size=self.batch_size, clip=1.0, seed=self.seed, progress=progress,
        )  # fmt: skip

    def _codes(self, count: int) -> np.ndarray:
        """Number of every image's domain."""
        if self._sources is None:
            return np.zeros(count, int)
        given = np.asarray(self._sources)
        if given.shape != (count,):
            raise ClipworksError(f"domains must name a source for every image ({count}). Got shape {given.shape}.")
        return class_numbers("domains", given, np.asarray(list(self.domains)), of="domains")


class MetaRecipe(ModuleRecipe):
    """A step on two domains: the experts adapt to the first, and what they then say of the second is judged.

    Parameters
    ----------
    shots : images with labels
    codes : number of every image's domain
    vectors : start of the head, unit rows (C, dim)
    sentence : words before and behind the learned tokens
    mask_ratio, weights, diagonal, inner_lr, second_order : see `GMDF`; weights of pixels, sentences and alignment
    augment : how views are drawn
    seed : of the decoder and the tokens
    """

    split, captions = False, False

    def __init__(
        self, shots: Shots, codes: np.ndarray, vectors: torch.Tensor, sentence: Sequence[str], *, mask_ratio: float,
        weights: tuple[float, float, float], diagonal: bool, inner_lr: float, second_order: bool,
        augment: Augment | None = None, seed: int = 0,
    ):  # fmt: skip
        super().__init__(ContrastiveRecipe("infonce", augment), seed)
        self.shots, self.codes, self.vectors, self.words = shots, codes, vectors, sentence
        self.place = {label: i for i, label in enumerate(shots.table or {})}
        self.mask_ratio, self.weights, self.diagonal = mask_ratio, weights, diagonal
        self.inner_lr, self.second_order = inner_lr, second_order

    @property
    def settings(self) -> dict[str, Any]:
        names = ("mask_ratio", "weights", "diagonal", "inner_lr", "second_order")
        return {**self.plain.settings, **{name: repr(getattr(self, name)) for name in names}}

    def build(self, encoder: Encoder) -> None:
        vision, text = encoder.config.vision, encoder.config.text
        self.head = nn.Linear(encoder.dim, len(self.vectors), bias=False)
        with torch.no_grad():
            self.head.weight.copy_(self.vectors)
        if self.weights[0]:
            patches = encoder.visual.grid[0] * encoder.visual.grid[1]
            size = 3 * encoder.image_size**2 // patches
            self.decoder = PatchDecoder(vision.width, vision.heads, patches, size)
        if self.weights[1]:
            count = len(encoder.visual.norm_post.domain.table)
            self.domain_tokens = nn.Parameter(torch.empty(count, text.width).normal_(0, 0.02))
            names = (self.shots.table or {}).values()
            means = [word_vectors(encoder, phrase(encoder, name)).mean(0) for name in names]
            self.class_tokens = nn.Parameter(torch.stack(means))
            before, after = self.words
            ids, place, end = slotted(encoder, before, 2, after)
            slots = torch.full_like(ids, -1)
            slots[0, place : place + 2] = torch.arange(2)
            ended = encoder.tokenizer.eot_id in ids
            self.spoken = (ids, slots, torch.tensor([end + ended]))
        self.to(encoder.log_scale.dtype)

    def batch(self, items: Sequence[Any], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return images of two domains, half of each (of one alone: two halves), with the patches that are seen."""
        half, known = max(1, len(items) // 2), np.unique(self.codes)
        if len(known) > 1:
            pools = [np.flatnonzero(self.codes == d) for d in rng.choice(known, 2, replace=False)]
        else:
            order = rng.permutation(len(self.codes))
            pools = [order[::2], order[1::2] if len(order) > 1 else order]
        rows = np.concatenate([rng.choice(pool, half, replace=len(pool) < half) for pool in pools])
        own = [self.shots.items[i] for i in rows]
        patches = int(np.prod(self.plain.bound.visual.grid))
        seen = [rng.permutation(patches)[int(self.mask_ratio * patches) :] for _ in own]
        return {
            "pixels": self.plain.pixels(own, rng.spawn(len(own))), "seen": torch.from_numpy(np.stack(seen)),
            "labels": torch.tensor([self.place[str(item.label)] for item in own]),
            "domains": torch.from_numpy(self.codes[rows]),
        }  # fmt: skip

    def forward(self, encoder: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the losses of both domains together and, weighted, their distance."""
        half = len(batch["pixels"]) // 2
        first, second = ({k: v[part] for k, v in batch.items()} for part in (slice(half), slice(half, None)))
        # fused attention has no second derivative
        plain = sdpa_kernel(SDPBackend.MATH) if self.second_order and self.inner_lr else nullcontext()
        with plain:
            image, one = self.judge(encoder, first)
            experts = {name: p for name, p in encoder.named_parameters() if ".mlp.experts." in name or
                       ".mlp.router." in name}  # fmt: skip
            adapted = experts
            if self.inner_lr:
                adapted = inner_step(one["classes"], experts, self.inner_lr, self.second_order)
            other, two = with_parameters(encoder, adapted, self.judge, second)
        found = {name: one[name] + two[name] for name in one}
        if self.weights[2]:
            found["alignment"] = self.weights[2] * gaussian_distance(image, other, diagonal=self.diagonal)
        return found

    def judge(self, encoder: Any, part: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return image rows and weighted losses of one domain's images."""
        labels, domains = part["labels"], part["domains"]
        with in_domains(encoder, domains):
            image = encoder.encode_image(part["pixels"])
        found = {"classes": F.cross_entropy(encoder.log_scale.exp() * self.head(image), labels)}
        if self.weights[0]:
            tokens = encoder.visual.run(part["pixels"], keep=part["seen"]).tokens
            truth = patch_pixels(part["pixels"], encoder.visual.grid)
            found["pixels"] = self.weights[0] * hidden_error(self.decoder(tokens), truth, part["seen"])
        if self.weights[1]:
            table = encoder.visual.norm_post.domain.table
            heat = 0.07 + 0.01 * table[domains].norm(dim=1, keepdim=True)
            right = labels * len(table) + domains
            found["sentences"] = self.weights[1] * F.cross_entropy(image @ self.sentences(encoder).T / heat, right)
        return image, found

    def sentences(self, encoder: Any) -> torch.Tensor:
        """Unit rows of the sentences of all classes and domains, (classes * domains, dim), all domains of a class
        together."""
        classes, domains = len(self.class_tokens), len(self.domain_tokens)
        pairs = torch.stack([self.domain_tokens.repeat(classes, 1), self.class_tokens.repeat_interleave(domains, 0)], 1)
        ids, slots, lengths = (part.to(encoder.device) for part in self.spoken)
        return Sentences(encoder, ids, slots, lengths, 0).encode_own(pairs, torch.zeros_like(pairs[:, 0, 0]).long())
