"""LLM2CLIP: a frozen language model and an adapter in the place of the text tower, the image tower aligned with them.

Claim: a language model that was first taught to tell captions apart is a better text tower than CLIP's own: long texts,
other languages, dense captions (EVA02-L/14-336: COCO 64.2 / 47.9 to 72.4 / 58.8, Urban1k text to image 70.0 to 97.3).

Formula: 1. captions: L_1 = -log exp(50 cos(q_i, p_i)) / (sum_j exp(50 cos(q_i, p_j)) + sum_j exp(50 cos(q_i, n_j))),
q and p two captions of an image, n another image's, with low-rank additions to the language model.
2. x_0 = e / |e|, e the mean of the words' states; x <- x + W_2 GELU(W_1 LN(x)) four times; text = W LN(x) + b. InfoNCE
of images, through a new projection, and these; e is computed once per text.

Paper: Huang et al. 2024, LLM2CLIP: Powerful Language Model Unlocks Richer Visual Representation (AAAI 2026).
Differs from the paper: the two captions of an image are the first sentence and what follows (for the second stage: the
whole). No general sentence pairs are mixed in, and no masked-word stage precedes (of little effect, as the release
says). Vectors are normalised in both ways, cached and not. Any sentence encoder can be the language model, and without
one the encoder's own text tower is: its vectors then go through the adapter.
Defaults: 4 blocks, twice as wide inside, lr 1e-5, weight decay 0.05, no warm-up, layer decay 0.85, 20 epochs, batch
4096, gradient norm 5, scale from 1/0.07; captions: rank 16, lr 2e-4, batch 64, 300 steps of warm-up: released code.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.item import Item
from ..encoders.config import TextConfig
from ..encoders.encoder import Encoder
from ..encoders.language import FILL, LanguageModel, LanguageTower, digest
from ..encoders.layers import swap
from ..errors import ClipworksError, check_choice, check_range
from ..losses.common import similarities, unit
from ..pretraining.parts import need_vit
from ..progress import Progress
from ..registry import method
from ..training.augment import Augment, resolve_augment
from ..training.recipe import ContrastiveRecipe
from ..zeroshot.templates import resolve_templates
from .common import TEMPLATE, Tuned, Tuner, only, run
from .long_clip import first_sentence
from .shots import Shots

T = TypeVar("T", bound="LLM2CLIP")
SCALE = 50.0  # of the similarities of captions


@method(card="llm2clip", level="M")
class LLM2CLIP(Tuner):
    """Read texts with a frozen language model and an adapter, and align the image tower with them.

    Parameters
    ----------
    names : class names; what is predicted, and what labels may be given as
    encoder : encoder, or its name or path; default: the bundled one
    language_model : folder or hub name of a model of transformers (needs the extra `teachers`), or a `LanguageModel`;
        default: the encoder's own text tower, frozen
    pool : vector of a text: "mean" of its words, or the state of the "first" or "last" one
    bidirectional : let the words of a causal model see those behind them
    context_length : most tokens of a text, where the language model takes as many
    dim : dimensions of the joint space; None: those of the encoder
    projection : "new", or "kept" with the encoder's own joint space
    vision : False leaves the image tower as it is, but for a new projection
    blocks : residual blocks of the adapter
    caption_epochs : passes of the caption stage before; sentence encoders need none, plain language models do. It needs
        the extra `adapt`
    rank : of the additions to the language model in that stage
    caption_lr, caption_batch : learning rate and pairs per step of that stage
    templates : sentences around the names; training draws one per image and step
    lr, weight_decay, layer_decay : AdamW, and its factor per layer of the image tower
    epochs : passes over the pairs
    batch_size : pairs per step
    augment : views: "light", "crop" (8 % and more, flip), "none", "standard", "strong"
    seed : of the adapter, order, views and choice of texts

    Attributes
    ----------
    encoder_, classes_, classifier_, alpha_, losses_ : see `common.Tuner`

    Inputs
    ------
    images with captions, the first sentence saying what matters most; or labelled images

    Relations
    ---------
    `long_clip` stretches the text tower that is there. `lora` on both towers keeps CLIP's own space.

    References
    ----------
    Huang et al. 2024, LLM2CLIP: Powerful Language Model Unlocks Richer Visual Representation

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> tuner = LLM2CLIP(["cat", "dog"], encoder=toy_encoder(tokenizer=CLIPTokenizer()), epochs=1)
    >>> tuner.fit(pixels, ["a cat on a mat", "a cat", "a dog", "two dogs"]).predict(pixels).shape
    (4,)
    """

    pairs, neutral, merges = True, False, False
    frozen = ("text.model.*",)
    also_written = frozenset({"text.digest"})

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        language_model: str | Any | None = None,
        pool: str = "mean",
        bidirectional: bool = True,
        context_length: int = 512,
        dim: int | None = None,
        projection: str = "new",
        vision: bool = True,
        blocks: int = 4,
        caption_epochs: int = 0,
        rank: int = 16,
        caption_lr: float = 2e-4,
        caption_batch: int = 64,
        templates: str | Sequence[str] = TEMPLATE,
        lr: float = 1e-5,
        weight_decay: float = 0.05,
        layer_decay: float | None = 0.85,
        epochs: int = 20,
        batch_size: int = 4096,
        augment: str = "light",
        seed: int = 0,
    ):
        self.names, self.encoder, self.language_model, self.pool = names, encoder, language_model, pool
        self.bidirectional, self.context_length, self.dim = bidirectional, context_length, dim
        self.projection, self.vision, self.blocks = projection, vision, blocks
        self.caption_epochs, self.rank = caption_epochs, rank
        self.caption_lr, self.caption_batch, self.templates = caption_lr, caption_batch, templates
        self.lr, self.weight_decay, self.layer_decay, self.epochs = lr, weight_decay, layer_decay, epochs
        self.batch_size, self.augment, self.seed = batch_size, augment, seed

    @classmethod
    def load(cls: type[T], path: str | os.PathLike, *, encoder: Any = None, **modules: Any) -> T:
        made = super().load(path, encoder=encoder, **modules)
        tower: Any = made.encoder_.text
        if made.language_model is not None and not torch.equal(tower.digest.cpu(), digest(tower.model)):
            raise ClipworksError(f"language_model must be the one that {str(path)!r} was fitted with. "
                                 f"Got other weights in {made.language_model!r:.60}.")  # fmt: skip
        return made

    def _shape(self, encoder: Encoder) -> None:
        new = check_choice("projection", self.projection, ("new", "kept")) == "new"
        dim = int(check_range("dim", encoder.dim if self.dim is None else self.dim, 1))
        if not new and dim != encoder.dim:
            raise ClipworksError(f"dim must be the encoder's ({encoder.dim}) where its projection is kept. Got {dim}.")
        width, config = encoder.dim, replace(encoder.config.text, projection=True)
        model: Any = encoder.text
        mark = torch.zeros(32, dtype=torch.uint8)  # the encoder's fingerprint covers its own text tower
        if self.language_model is not None:
            model = copy.deepcopy(self._opened())
            mark = digest(model)
            width, encoder.tokenizer = model.width, model.tokenizer
            config = TextConfig(
                model.vocab_size, model.context_length, width, heads=1, causal=False, pool="mean", pad_id=FILL,
                eot_id=FILL, mask_padding=True, tokenizer="language model",
            )  # fmt: skip
        if self.caption_epochs:
            if self.language_model is None:
                raise ClipworksError("caption_epochs needs a language_model. Got None.")
            model.add_lora(self.rank)
        dtype = encoder.dtype
        swap(encoder, "text", LanguageTower(model, Adapter(width, dim, self.blocks).to(dtype), mark))
        vision = encoder.config.vision
        if new:
            need_vit(encoder, "projection='new'")
            swap(encoder, "visual.projection", nn.Linear(vision.width, dim, bias=False, dtype=dtype))
            vision = replace(vision, projection=True)
            if encoder.visual.memory is not None:  # what it knows has no vectors in the new space yet
                pairs = encoder.visual.memory.values.in_features
                swap(encoder, "visual.memory.values", nn.Linear(pairs, dim, bias=False, dtype=dtype))
                nn.init.zeros_(encoder.visual.memory.values.weight)
        encoder.config = replace(encoder.config, dim=dim, text=config, vision=vision)
        with torch.no_grad():
            encoder.log_scale.fill_(math.log(1 / 0.07))

    def _opened(self) -> LanguageModel:
        """The language model, read once."""
        if isinstance(self.language_model, LanguageModel):
            return self.language_model
        key = (self.language_model, self.pool, self.bidirectional, self.context_length)
        if getattr(self, "_language", (None, None))[0] != key:
            made = LanguageModel(self.language_model, pool=self.pool, bidirectional=self.bidirectional,
                                 context_length=self.context_length)  # fmt: skip
            self._language = (key, made)
        return self._language[1]

    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        common: dict[str, Any] = {"seed": self.seed, "progress": progress}
        if self.caption_epochs:
            items = [item for item in shots.items if item.caption and rest(item.caption)]
            if len(items) < 2:
                raise ClipworksError(f"caption_epochs needs captions of several sentences. {len(items)} have them.")
            start = run(
                start, items, CaptionRecipe([str(item.caption) for item in items]), freeze=only("text.model.*lora_*"),
                lr=self.caption_lr, weight_decay=0.0, warmup=300, epochs=self.caption_epochs,
                batch_size=self.caption_batch, clip=1.0, **common,
            ).encoder  # fmt: skip
        texts = texts_of(shots, self.templates)
        listed = list(dict.fromkeys(text for own in texts.values() for text in own))
        vectors = text_vectors(start, listed, progress=progress)
        place = {text: i for i, text in enumerate(listed)}
        rows = {key: [place[text] for text in own] for key, own in texts.items()}
        frozen = list(self.frozen)
        if not self.vision:
            frozen += ["visual.*"]
            frozen += ["!visual.projection.*"] if self.projection == "new" else []
        return run(
            start, shots.items, CachedRecipe(rows, vectors, resolve_augment(self.augment)), freeze=frozen, lr=self.lr,
            weight_decay=self.weight_decay, layer_decay=self.layer_decay, warmup=0, epochs=self.epochs,
            batch_size=self.batch_size, clip=5.0, **common,
        )  # fmt: skip


class Adapter(nn.Module):
    """Residual blocks on unit vectors, then a linear map into the joint space.

    Parameters
    ----------
    width, dim : channels of the vectors and of the joint space
    blocks : residual blocks, twice as wide inside

    Examples
    --------
    >>> vectors = torch.randn(2, 6)
    >>> adapter = Adapter(6, 3)
    >>> torch.allclose(adapter(5 * vectors), adapter(vectors), atol=1e-5)
    True
    """

    def __init__(self, width: int, dim: int, blocks: int = 4):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(int(check_range("blocks", blocks, 0)))
        )
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, dim)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """(B, width), of any length, to (B, dim), not normalised."""
        x = F.normalize(vectors, dim=-1)
        for block in self.blocks:
            x = x + block(x)
        return self.out(self.norm(x))


class CaptionRecipe(ContrastiveRecipe):
    """Teach a language model to tell captions apart: first sentences find what follows them, and back.

    Parameters
    ----------
    texts : all captions, of several sentences each
    """

    split = False

    def __init__(self, texts: Sequence[str]):
        super().__init__("infonce")
        self.two = [(first_sentence(text), rest(text)) for text in texts]

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return tokens of queries, their partners, and as many captions of other images, of the partner's kind."""
        queries, positives, negatives = [], [], []
        for item, draw in zip(items, rng.spawn(len(items)), strict=True):
            own = (first_sentence(str(item.caption)), rest(str(item.caption)))
            side, other = int(draw.integers(2)), int(draw.integers(len(self.two)))
            if self.two[other] == own:
                other = (other + 1) % len(self.two)
            queries.append(own[side])
            positives.append(own[1 - side])
            negatives.append(self.two[other][1 - side])
        tokenize = self.bound.tokenize
        return {"query": tokenize(queries), "positive": tokenize(positives), "negative": tokenize(negatives)}

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the loss of the captions."""
        tower: Any = encoder.text
        return {"captions": caption_loss(*(tower.vectors(batch[k]) for k in ("query", "positive", "negative")))}


class CachedRecipe(ContrastiveRecipe):
    """InfoNCE of images and adapted vectors, of which each image has one or more; one is drawn in every step.

    Parameters
    ----------
    rows : key of an item -> its rows of `vectors`
    vectors : of all texts, (T, width)
    augment : how views are drawn
    """

    captions = False

    def __init__(self, rows: Mapping[str, Sequence[int]], vectors: torch.Tensor, augment: Augment | None = None):
        super().__init__("infonce", augment)
        self.rows, self.vectors = rows, vectors

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        draws = rng.spawn(len(items))
        own = [self.rows[item.key] for item in items]
        chosen = [rows[int(draw.integers(len(rows)))] for rows, draw in zip(own, draws, strict=True)]
        return {"pixels": self.pixels(items, draws), "vectors": self.vectors[chosen]}

    def encode(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        image, text = encoder.encode_image(batch["pixels"]), encoder.encode_text(vectors=batch["vectors"])
        return {"image": image, "text": text}


def caption_loss(
    query: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor | None = None, scale: float = SCALE
) -> torch.Tensor:
    """Return the mean cross-entropy of each query (B, dim) finding its partner among all partners and negatives.

    >>> one = torch.tensor([[1.0, 0.0]])
    >>> caption_loss(one, one, one)  # log 2
    tensor(0.6931)
    """
    columns = positive if negative is None else torch.cat([positive, negative])
    logits = similarities(unit(query), unit(columns), scale)
    return F.cross_entropy(logits, torch.arange(len(query), device=logits.device))


def text_vectors(
    encoder: Encoder, texts: Sequence[str], *, batch_size: int = 64, progress: bool | None = None
) -> torch.Tensor:
    """Return the frozen model's vectors (T, width) of texts, in their order; batches hold texts of like length."""
    tower: Any = encoder.text
    tokens = encoder.tokenize(list(texts))
    order = tower.lengths(tokens).argsort(stable=True)
    found: list[torch.Tensor] = []
    encoder.eval()
    with torch.no_grad():
        for part in Progress(order.split(batch_size), len(order), "encoding texts", unit=len, enabled=progress):
            longest = int(tower.lengths(tokens[part]).max())
            found.append(tower.vectors(tokens[part, :longest].to(encoder.device)).cpu())
    rows = torch.empty(len(tokens), found[0].shape[1], dtype=found[0].dtype)
    rows[order] = torch.cat(found)
    return rows


def texts_of(shots: Shots, templates: str | Sequence[str]) -> dict[str, list[str]]:
    """Return the texts of every image by its key: the first sentence and the whole, or all sentences of its class."""
    if shots.table is None:
        both = {item.key: (first_sentence(str(item.caption)), str(item.caption)) for item in shots.items}
        return {key: list(dict.fromkeys(texts)) for key, texts in both.items()}
    sentences = resolve_templates(templates)
    return {i.key: [s.replace("{}", shots.table[str(i.label)]) for s in sentences] for i in shots.items}


def rest(text: str) -> str:
    """Return what follows the first sentence.

    >>> rest("A red boat. Two people row it.")
    'Two people row it.'
    """
    return text.strip().partition(". ")[2].strip()
