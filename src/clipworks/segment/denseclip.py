"""DenseCLIP: dense fine-tuning guided by scores of pixels and class words, which are prompted by the image itself.

Claim: a map of cosines with class words, supervised and handed to an ordinary decoder, makes better use of CLIP than
fine-tuning its image tower alone: 43.5 against 39.6 mIoU on ADE20K with ResNet-50 and Semantic FPN (its repository).

Formula: t = text([start, p_1 .. p_8, name, end]), p learned; V = LN(Linear(LN([global z; dense z])));
t' = t + gamma d(t, V), d three pre-norm layers (self-attention, cross-attention to V, feed-forward), gamma = 1e-4 at
first;  s = cos(z, t');  logits = head([last map; s], finer maps);  L = CE(logits) + 0.4 CE(s / 0.07).
Before the text tower ("pre"): p = d(queries, V) of each image in the place of p.

Paper: Rao et al. 2022, DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting (CVPR).
Differs from the paper: segmentation alone, without the detectors; the head's pyramid reads the last map and the finer
maps of a convolutional stem (a plain ViT has only the first); names are not cut at five tokens; z of a ViT is its last
block's output through the projection, with what a memory recalls. Defaults are the official code's, but for the
number of steps, batch and width of the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..encoders.layers import MLP, Attention
from ..encoders.positions import resize_positions
from ..errors import check_choice
from ..metrics.segmentation import IGNORE
from ..prompts.parts import STD
from ..registry import method
from .common import Hidden, enter
from .mask_decoder import PixelDecoder, last_tokens, map_channels, tower_maps
from .trained import TrainedDense

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

GAMMA = 1e-4  # of the image's part in the words, at first
INNER, LAYERS, HEADS, DROPOUT = 256, 3, 4, 0.1  # of the context decoder


class ContextDecoder(nn.Module):
    """Words look at an image: (B, K, width) and a memory (B, N, dim) to (B, K, width).

    Parameters
    ----------
    width : channels of the words
    dim : channels of the memory
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.memory = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, INNER), nn.LayerNorm(INNER))
        self.words = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, INNER))
        self.layers = nn.ModuleList(ContextLayer() for _ in range(LAYERS))
        self.out = nn.Sequential(nn.LayerNorm(INNER), nn.Linear(INNER, width))

    def forward(self, words: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        memory, x = self.memory(memory), self.words(words)
        for layer in self.layers:
            x = layer(x, memory)
        return self.out(x)


class ContextLayer(nn.Module):
    """Self-attention among words, cross-attention to the memory, feed-forward; a norm before each."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = Attention(INNER, HEADS), Attention(INNER, HEADS)
        self.mlp = MLP(INNER, 4 * INNER, "gelu")
        self.norms, self.dropout = nn.ModuleList(nn.LayerNorm(INNER) for _ in range(3)), nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.own(self.norms[0](x))[0])
        x = x + self.dropout(self.cross(self.norms[1](x), memory)[0])
        return x + self.dropout(self.mlp(self.norms[2](x)))


class DenseParts(nn.Module):
    """What DenseCLIP learns beside the image tower: the context, the context decoder with gamma, the head."""

    def __init__(self, encoder: Encoder, names: int, context: int, prompting: str, width: int, channels: Sequence[int]):
        super().__init__()
        inner = encoder.config.text.width
        self.context = nn.Parameter(STD * torch.randn(context, inner))
        self.decoder = ContextDecoder(encoder.dim if prompting == "post" else inner, encoder.dim)
        self.gamma = nn.Parameter(torch.full((encoder.dim,), GAMMA)) if prompting == "post" else None
        self.head = PixelDecoder([channels[0] + names, *channels[1:]], width)
        self.classify = nn.Conv2d(width, names, 1)


@method(card="denseclip", level="M")
class DenseCLIP(TrainedDense):
    """Fine-tune for the pixels of a fixed list of names.

    Parameters
    ----------
    encoder : a name, a path or an encoder (default: the bundled one)
    prompting : "post": the image moves the words' vectors; "pre": it writes the context before the text tower reads it,
        which takes a pass of the text tower for every image
    context : learned vectors before a name (8)
    auxiliary : weight of the score map's loss (0.4)
    temperature : of that loss (0.07)
    tower : whether the image tower learns, at a tenth of the rate
    width : channels of the head (Semantic FPN: 256)
    steps, batch_size, lr : of AdamW with warm-up and cosine (paper: 80,000 steps of 32 at 1e-4)
    side : of the training crops in pixels (default: twice the encoder's image size)
    seed : of the start, the order and the crops

    Inputs
    ------
    images and label maps of a fixed list of names

    Relations
    ---------
    Names are fixed at `fit`, unlike those of all other dense methods; the context is CoOp's (`prompts/coop`).

    References
    ----------
    Rao et al. 2022, DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting (CVPR)

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> images, masks = torch.rand(3, 3, 16, 24), torch.zeros(3, 16, 24, dtype=torch.long)
    >>> masks[:, :, 12:] = 1
    >>> model = DenseCLIP(toy_encoder(), steps=2, width=8).fit(images, masks, ["sky", "sea"])
    >>> model.predict(images).shape
    (3, 16, 24)
    """

    def __init__(
        self,
        encoder: Any = None,
        prompting: str = "post",
        context: int = 8,
        auxiliary: float = 0.4,
        temperature: float = 0.07,
        tower: bool = True,
        width: int = 128,
        steps: int = 1000,
        batch_size: int = 8,
        lr: float = 1e-4,
        side: int | None = None,
        seed: int = 0,
    ):
        self.encoder, self.prompting, self.context, self.auxiliary = encoder, prompting, context, auxiliary
        self.temperature, self.width, self.steps, self.batch_size = temperature, width, steps, batch_size
        self.tower, self.lr, self.side, self.seed = tower, lr, side, seed

    # -- what is learned -----------------------------------------------------------------------------------------

    def _bind(self, base: Encoder) -> None:
        self._tokens = base.tokenize(self.names_)

    def _build(self, encoder: Encoder, names: Sequence[str]) -> nn.Module:
        check_choice("prompting", self.prompting, ("post", "pre"))
        channels = map_channels(encoder, self.sides)
        return DenseParts(encoder, len(names), self.context, self.prompting, self.width, channels)

    def _learns(self, encoder: Encoder) -> Sequence[str]:
        if not self.tower:
            return ()
        kept = ["visual.memory.*"] if getattr(encoder.visual, "memory", None) is not None else []
        return ["!visual.*", *kept]

    def _rates(self, encoder: Encoder) -> Mapping[str, float]:
        return {"visual.*": 0.1} if self.tower else {}

    def _no_decay(self, encoder: Encoder) -> Sequence[str]:
        return ["recipe.parts.context", *(["visual.*positions"] if self.tower else [])]

    def _losses(
        self, parts: Any, encoder: Encoder, images: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        hidden = enter(encoder, images, sides=self.sides)
        logits, scores = self._scores(parts, encoder, hidden, self._texts(parts, encoder))
        losses = {"task": pixel_entropy(logits, labels)}
        if self.auxiliary:
            losses["auxiliary"] = self.auxiliary * pixel_entropy(scores / self.temperature, labels)
        return losses

    def _take(self, encoder: Any, parts: nn.Module, losses: dict[str, float]) -> None:
        super()._take(encoder, parts, losses)
        with torch.no_grad():
            self._vectors = self._texts(self.parts_, self.encoder_)

    # -- words and scores ----------------------------------------------------------------------------------------

    def _texts(self, parts: Any, encoder: Encoder, contexts: torch.Tensor | None = None) -> torch.Tensor | None:
        """Unit vectors (B, K, dim) of the names behind contexts (B, M, width).

        Without contexts those behind the learned one, (1, K, dim); None where images write it.
        """
        if contexts is None:
            if self.prompting == "pre":
                return None
            contexts = parts.context[None]
        tokens = self._tokens.to(encoder.device)
        every = contexts.repeat_interleave(len(tokens), 0)
        found = encoder.encode_text(tokens.repeat(len(contexts), 1), prompts={0: every})
        return found.unflatten(0, (len(contexts), len(tokens)))

    def _scores(
        self, parts: Any, encoder: Encoder, hidden: Hidden, texts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's logits (B, K, h, w), and the score map (B, K, h, w) of cosines."""
        tokens = last_tokens(hidden)
        whole, local = projected(hidden, tokens)
        memory = torch.cat([whole[:, None], local.flatten(1, 2)], dim=1)
        if texts is None:
            contexts = parts.decoder(parts.context.expand(len(memory), -1, -1), memory)
            moved: Any = self._texts(parts, encoder, contexts)
        else:
            given = texts.expand(len(memory), -1, -1)
            moved = given + parts.gamma * parts.decoder(given, memory)
        scores = score_map(local, moved)
        last, *finer = tower_maps(hidden, tokens)
        return parts.classify(parts.head([torch.cat([last, scores], dim=1), *finer])[1]), scores

    # -- as a dense method ---------------------------------------------------------------------------------------

    def class_words(self, names: Sequence[str], encoder: Encoder, templates: str | Sequence[str]) -> torch.Tensor:
        """Rows that pick the fitted names asked for, (K, fitted)."""
        places = [self.names_.index(check_choice("names", name, self.names_)) for name in names]
        return torch.eye(len(self.names_))[places]

    def features(self, hidden: Hidden) -> torch.Tensor:
        """A map (B, h, w, dim), not normalised."""
        return projected(hidden, last_tokens(hidden))[1]

    def local(self, hidden: Hidden, words: torch.Tensor) -> torch.Tensor:
        """The head's logits of the names asked for, (B, K, h, w)."""
        logits, _ = self._scores(self.parts_, self.encoder_, hidden, self._vectors)
        return torch.einsum("kn,bnhw->bkhw", words.to(logits), logits)

    def probabilities(self, scores: torch.Tensor, scale: float) -> torch.Tensor:
        """Softmax of the head's logits; `scale` is for cosines."""
        return scores.softmax(0)


def score_map(local: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Cosines (B, K, h, w) of patches (B, h, w, dim) with words (B, K, dim) of their own image."""
    unit = F.normalize(local, dim=-1)
    return torch.einsum("bhwd,bkd->bkhw", unit, F.normalize(texts, dim=-1).to(unit))


def pixel_entropy(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (B, K, h, w), resized, with labels (B, H, W); 0 where no pixel has one."""
    values = F.interpolate(values, labels.shape[-2:], mode="bilinear", align_corners=False)
    kept = (labels != IGNORE).sum().clamp(min=1)
    return F.cross_entropy(values, labels, ignore_index=IGNORE, reduction="sum") / kept


def projected(hidden: Hidden, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An image's vector (B, dim) and its patches' (B, h, w, dim), not normalised.

    Of a ResNet all outputs of the attention pool; of a ViT the class token and the patches, or without a class token
    the mean of the patches.
    """
    visual = hidden.visual
    if not hasattr(visual, "blocks"):
        return attention_pool(visual.pool, tokens, hidden.grid)
    local = hidden.project(tokens)
    if not hidden.prefix:
        return local.mean((1, 2)), local
    recall = () if hidden.embedded is None else (hidden.embedded.mean(1),)
    return visual.project(tokens[:, 0], *recall), local


def attention_pool(pool: Any, tokens: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A ResNet's attention pool with every token as a query: the usual vector (B, dim), and a map (B, h, w, dim)."""
    x = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
    x = x + resize_positions(pool.positions, pool.grid, grid).to(x)
    q, k, v = (f(x).unflatten(-1, (pool.heads, -1)).transpose(1, 2) for f in (pool.q, pool.k, pool.v))
    found = pool.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return found[:, 0], found[:, 1:].unflatten(1, grid)
