"""CLIP-SCGI: captions lead the features of identities: a pseudo-word from the image, and its sentence fused with it.

Claim: captions written by a model, needed only in training, and one stage of it, give better features to find the same
person in other cameras than CLIP-ReID's two stages (the abstract: on four benchmarks; no figures at hand).

Formula: v image tokens in the joint space (pooled, then patches), t the caption's vector, v~ = v * t elementwise;
S* = f_g(v~_pooled) + f_l(mean P), P two learned queries that attended to v~;  T^, t^ tokens and vector of "a photo of a
[S*] person";  Z = T^ + CrossAttn(LN T^, LN v~), two blocks, f = Z where the vector is read.
L = CE of BN(f) + batch-hard triplet on f + contrast of v~_pooled and t^ in which one identity's pairs are all right.

Paper: Han et al. 2024, CLIP-SCGI: Synthesized Caption-Guided Inversion for Person Re-Identification (arXiv 2410.09382).
Differs from the paper: no code was released; details are those of a re-implementation and of CLIP-ReID (Li et al. 2023,
AAAI), weights of the losses are 1. Two readings at test time are possible and both are here: "fused", f with the plain
sentence "a photo of a person" and unmodulated tokens, and "visual", the image tower alone. Views have no random
erasing. Images come in the encoder's own shape, or as pixels of any (256 x 128: the positions are interpolated).
Without captions all images have one and the same, which names nobody.
Defaults: 2 queries, 8 heads, 2 blocks, smoothing 0.1, margin 0.3, tau 1, Adam's rate 5e-6 for the tower, 16 x 4 images
a step, 60 epochs: CLIP-ReID's; the new modules learn a hundred times faster, a sensible choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ..encoders.encoder import Encoder
from ..encoders.layers import MLP, Attention, Block
from ..errors import ClipworksError, check_choice, check_range
from ..metrics.retrieval import ImageRetrieval, image_retrieval
from ..pretraining.parts import ModuleRecipe, need_vit
from ..registry import method
from ..training.augment import Augment, resolve_augment
from ..training.recipe import ContrastiveRecipe
from .common import TEMPLATE, Tuned, Tuner, run
from .identity import batch_hard_triplet, identity_contrast, identity_rows, same_camera
from .shots import Shots, as_given, listed_captions
from .slots import slotted

READINGS = ("fused", "visual")
T = TypeVar("T", bound="CLIPSCGI")


@method(card="clip-scgi", level="M")
class CLIPSCGI(Tuner):
    """Fine-tune the image tower for finding the same person or thing, led by captions.

    Parameters
    ----------
    names : names of the identities; labels are these or their numbers (default: the labels are the names)
    encoder : encoder, or its name or path; default: the bundled one
    subject : what an identity is, in the sentence "a photo of a [S*] person"
    reading : what images are searched by: "fused" (f with the plain sentence) or "visual" (the image tower alone)
    queries, heads, blocks : learned queries of the inversion, heads of every attention, blocks of the fusion
    smoothing : share of the target that is spread evenly over the identities
    margin : of the triplets
    temperature : of the contrast
    templates : sentences around the names, for prediction by words
    lr, weight_decay : of AdamW
    module_rate : learning rate of the new modules, as a multiple of `lr`
    epochs : passes over the images
    batch_size, per_identity : images per step, and how many of an identity
    augment : views: "standard", "light", "crop" (8 % and more, flip), "none", "strong"
    seed : of the modules, order and views

    Attributes
    ----------
    encoder_, classes_, classifier_, alpha_, losses_ : see `common.Tuner`; `encoder_.inversion`, `encoder_.fusion`

    Inputs
    ------
    images labelled by identity, two or more of each; captions in training

    Relations
    ---------
    `retrieval_finetuning` separates classes by a margin instead and keeps the words. Prediction by the words of the
    classes is zero-shot CLIP before the first step.

    References
    ----------
    Han et al. 2024, CLIP-SCGI: Synthesized Caption-Guided Inversion for Person Re-Identification

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> tuner = CLIPSCGI(encoder=toy_encoder(tokenizer=CLIPTokenizer()), heads=2, epochs=1)
    >>> tuner.fit(pixels, ["ann", "ann", "bob", "bob"]).vectors(pixels).shape
    torch.Size([4, 8])
    """

    frozen = ("text.*", "log_scale")

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        subject: str = "person",
        reading: str = "fused",
        queries: int = 2,
        heads: int = 8,
        blocks: int = 2,
        smoothing: float = 0.1,
        margin: float = 0.3,
        temperature: float = 1.0,
        templates: str | Sequence[str] = TEMPLATE,
        lr: float = 5e-6,
        weight_decay: float = 1e-4,
        module_rate: float = 100.0,
        epochs: int = 60,
        batch_size: int = 64,
        per_identity: int = 4,
        augment: str = "standard",
        seed: int = 0,
    ):
        self.names, self.encoder, self.subject, self.reading = names, encoder, subject, reading
        self.queries, self.heads, self.blocks, self.smoothing = queries, heads, blocks, smoothing
        self.margin, self.temperature, self.templates, self.lr = margin, temperature, templates, lr
        self.weight_decay, self.module_rate, self.epochs = weight_decay, module_rate, epochs
        self.batch_size, self.per_identity, self.augment, self.seed = batch_size, per_identity, augment, seed

    def fit(
        self: T, images: Any, y: Any, *, captions: Any = None, validation: Any = None, progress: bool | None = None
    ) -> T:
        """Learn from images with identities.

        Parameters
        ----------
        images, y, validation, progress : as in `common.Tuner.fit`
        captions : a text, or the same number of texts, for every image, which say how it looks and not who it is;
            default: "a photo of a person" for all
        """
        self._captions = captions
        try:
            return super().fit(images, y, validation=validation, progress=progress)
        finally:
            del self._captions

    @torch.no_grad()
    def vectors(self, images: Any, *, reading: str | None = None, batch_size: int = 32) -> torch.Tensor:
        """Return what images are searched by, unit rows (n, dim); no caption is read."""
        check_is_fitted(self, "encoder_")
        encoder: Any = self.encoder_
        if check_choice("reading", self.reading if reading is None else reading, READINGS) == "visual":
            return encoder.images(as_given(images), batch_size=batch_size)
        sentence = Sentence(encoder, f"a photo of a {self.subject}")
        words = sentence.project(encoder, sentence.run(encoder))
        x, found = as_given(images), []
        if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
            x = torch.stack([encoder.preprocess(image, key=str(i)) for i, image in enumerate(x)])
        for part in x.split(batch_size):
            tokens = joint_tokens(encoder.visual, part.to(encoder.device, encoder.dtype))
            fused = encoder.fusion(words.expand(len(tokens), -1, -1), tokens)
            found.append(F.normalize(sentence.read(fused).float(), dim=-1).cpu())
        return torch.cat(found)

    def retrieval(self, images: Any, labels: Any, cameras: Any = None, **options: Any) -> ImageRetrieval:
        """Search every image among the others; with cameras, those of its identity by its own camera do not count.

        `options` as in `metrics.retrieval.image_retrieval`; recall at 1 is the CMC at rank 1.
        """
        ignore = None if cameras is None else same_camera(labels, cameras)
        return image_retrieval(self.vectors(images), np.asarray(labels), ignore=ignore, **options)

    def _shape(self, encoder: Encoder) -> None:
        need_vit(encoder, "CLIPSCGI")
        for name in ("queries", "heads", "blocks"):
            check_range(name, getattr(self, name), int(name != "blocks"))
        if encoder.dim % self.heads:
            raise ClipworksError(f"heads must divide the {encoder.dim} dimensions. Got {self.heads}.")
        width = encoder.config.text.width
        inversion = Inversion(encoder.dim, width, self.queries, self.heads)
        encoder.add_module("inversion", inversion.to(encoder.dtype))
        encoder.add_module("fusion", Fusion(encoder.dim, self.heads, self.blocks).to(encoder.dtype))

    def _merge(self, encoder: Encoder) -> None:
        del encoder.inversion, encoder.fusion

    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        check_range("smoothing", self.smoothing, 0, 1)
        check_range("per_identity", self.per_identity, 1)
        # not the names: a caption that tells who it is would make the image needless
        given = [f"a photo of a {self.subject}."] * len(shots.items) if self._captions is None else self._captions
        texts = listed_captions(given, shots)
        flat = start.texts([text for own in texts for text in own], normalize=False)
        sentence = Sentence(start, "a photo of a", self.subject)
        recipe = IdentityRecipe(
            shots, flat.unflatten(0, (len(texts), -1)), sentence, self.per_identity, self.smoothing, self.margin,
            self.temperature, resolve_augment(self.augment), self.seed,
        )  # fmt: skip
        fast = ("inversion.*", "fusion.*", "recipe.*")
        return Tuned(*run(
            start, shots.items, recipe, freeze=self.frozen, lr=self.lr, weight_decay=self.weight_decay,
            betas=(0.9, 0.999), eps=1e-8, rates=dict.fromkeys(fast, self.module_rate), epochs=self.epochs,
            batch_size=self.batch_size, clip=1.0, seed=self.seed, progress=progress,
        )[:2])  # fmt: skip


class Inversion(nn.Module):
    """From modulated image tokens to a pseudo-word: one part from the pooled token, one from queries to all.

    Parameters
    ----------
    dim : of the tokens
    width : of the text tower's words
    queries, heads : learned queries, heads of their attention
    """

    def __init__(self, dim: int, width: int, queries: int, heads: int):
        super().__init__()
        self.whole, self.local = network(dim, width), network(dim, width)
        self.queries = nn.Parameter(torch.empty(queries, dim).normal_(0, dim**-0.5))
        self.norm_queries, self.norm_tokens, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = Attention(dim, heads), MLP(dim, 4 * dim, "gelu")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, 1 + M, dim), the pooled one first, to (B, width)."""
        queries = self.queries.expand(len(tokens), -1, -1)
        asked = queries + self.attention(self.norm_queries(queries), self.norm_tokens(tokens))[0]
        asked = asked + self.mlp(self.norm(asked))
        return self.whole(tokens[:, 0]) + self.local(asked.mean(1))


class Fusion(nn.Module):
    """Words that attend to image tokens, then blocks among themselves.

    Parameters
    ----------
    dim, heads : of all attention
    blocks : how many
    """

    def __init__(self, dim: int, heads: int, blocks: int):
        super().__init__()
        self.norm_words, self.norm_tokens = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.blocks = nn.ModuleList(Block(dim, heads, 4 * dim, "gelu", 1e-5) for _ in range(blocks))

    def forward(self, words: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Words (B, L, dim) and image tokens (B, N, dim) to (B, L, dim)."""
        z = words + self.attention(self.norm_words(words), self.norm_tokens(tokens))[0]
        for block in self.blocks:
            z = block(z)[0]
        return z


class Sentence:
    """One sentence, whole or with a slot for a pseudo-word.

    Parameters
    ----------
    encoder : whose text tower reads it
    before : words in front of the slot
    after : words behind it; None: there is no slot, and `before` is the sentence
    """

    def __init__(self, encoder: Encoder, before: str, after: str | None = None):
        self.ids, slot, self.end = slotted(encoder, before, int(after is not None), after or "")
        self.slot, self.pool = None if after is None else slot, encoder.config.text.pool

    def run(self, encoder: Encoder, word: torch.Tensor | None = None) -> Any:
        """The text tower's output, of one sentence, or of one per pseudo-word (B, width)."""
        words = encoder.text.tokens(self.ids.to(encoder.device))
        if word is not None:
            words = words.repeat(len(word), 1, 1)
            words[:, self.slot] = word.to(words.dtype)
        eot = torch.full((len(words),), self.end, device=words.device)
        return encoder.text.run(embeddings=words, eot=eot if self.pool == "eot" else None)

    def project(self, encoder: Encoder, output: Any) -> torch.Tensor:
        """Its tokens in the joint space, (B, L, dim)."""
        return encoder.text.project(output.tokens)

    def read(self, words: torch.Tensor) -> torch.Tensor:
        """The vector of tokens (B, L, dim), where the text tower reads its own."""
        if self.pool == "mean":
            return words.mean(1)
        return words[:, {"eot": self.end, "first": 0, "last": -1}[self.pool]]


class IdentityRecipe(ModuleRecipe):
    """A step of CLIP-SCGI, on several images each of some identities.

    Parameters
    ----------
    shots : images with labels
    known : vectors of K captions of every image, (n, K, dim), in the order of the items' keys
    sentence : with the slot
    per_identity : images of an identity in a step
    smoothing, margin, temperature : of the three losses
    augment : how views are drawn
    seed : of the classifier
    """

    split, captions = False, False

    def __init__(
        self, shots: Shots, known: torch.Tensor, sentence: Sentence, per_identity: int, smoothing: float,
        margin: float, temperature: float, augment: Augment | None = None, seed: int = 0,
    ):  # fmt: skip
        super().__init__(ContrastiveRecipe("infonce", augment), seed)
        self.items, self.labels = shots.items, [str(item.label) for item in shots.items]
        self.place = {label: i for i, label in enumerate(shots.table or {})}
        self.known, self.sentence, self.per_identity = known, sentence, per_identity
        self.smoothing, self.margin, self.temperature = smoothing, margin, temperature

    @property
    def settings(self) -> dict[str, Any]:
        numbers = ("per_identity", "smoothing", "margin", "temperature")
        return {**self.plain.settings, **{name: getattr(self, name) for name in numbers}}

    def build(self, encoder: Encoder) -> None:
        self.neck = nn.BatchNorm1d(encoder.dim, dtype=encoder.log_scale.dtype)
        self.classifier = nn.Linear(encoder.dim, len(self.place), bias=False, dtype=encoder.log_scale.dtype)

    def batch(self, items: Sequence[Any], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return pixels, labels and a caption's vector each, of identities drawn anew."""
        rows = identity_rows(self.labels, len(items), self.per_identity, rng)
        own = [self.items[i] for i in rows]
        spoken = self.known[torch.from_numpy(rows), torch.from_numpy(rng.integers(self.known.shape[1], size=len(rows)))]
        labels = torch.tensor([self.place[str(item.label)] for item in own])
        return {"pixels": self.plain.pixels(own, rng.spawn(len(own))), "labels": labels, "known": spoken}

    def forward(self, encoder: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the losses of identities, triplets and the contrast."""
        labels = batch["labels"]
        tokens = joint_tokens(encoder.visual, batch["pixels"]) * batch["known"][:, None]
        said = self.sentence.run(encoder, encoder.inversion(tokens))
        fused = self.sentence.read(encoder.fusion(self.sentence.project(encoder, said), tokens))
        logits = self.classifier(self.neck(fused))
        return {
            "identities": F.cross_entropy(logits, labels, label_smoothing=self.smoothing),
            "triplets": batch_hard_triplet(fused, labels, self.margin),
            "contrast": identity_contrast(tokens[:, 0], said.pooled, labels, self.temperature),
        }


def joint_tokens(visual: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The pooled vector and every patch in the joint space, (B, 1 + M, dim), not normalised."""
    out = visual.run(pixels)
    return torch.cat([out.pooled[:, None], visual.project(out.patches)], dim=1)


def network(width: int, out: int) -> nn.Sequential:
    """Three linear maps with ReLU between, all but the last as wide as the input."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))
