"""CLOC: an image tower whose tokens can be asked about a box, trained on captions and regions with words together.

Claim: with a small prompter (tokens, box -> vector) trained along, the tower classifies COCO's boxes above 70 % and
serves language models that must point (1 to 6 points on referring and grounding), where the image-level contrast fails.

Formula: r = unit(W z), z the output at q of one transformer layer over [q; F], q = MLP(Fourier codes of the two corners
+ their types);  boxes from words: q = W' w, then an MLP and a sigmoid.  L = CLIP + a (contrast of
regions + distance of boxes), see `losses/cloc`.

Paper: Chen et al. 2024, Contrastive Localized Language-Image Pre-Training (ICML 2025).
Differs from the paper: no code is public. The prompter's layer is this library's block with one head; its tokens are
read behind the tower's last norm. Boxes with words come with the data; the paper's captioner and detector are not here.
Defaults: 4 regions per image, weights 1, the threshold 0.95 and 4 frequencies are readings, as the paper does not state
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.regions import COLUMN
from ..encoders.layers import Block
from ..errors import BadWeights, check_choice, check_range
from ..registry import get_method, method
from ..segment.regions import roi_align
from ..training.augment import Augment
from .parts import need_vit
from .regions import RegionRecipe, kept_rows

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder

READERS = ("prompter", "roi")


class Prompter(nn.Module):
    """Vectors of boxes, and boxes of words, from an image's tokens.

    Parameters
    ----------
    width : channels of the tokens
    dim : dimensions of the joint space
    heads : of the layer
    frequencies : of the codes of a coordinate: sin and cos of pi 2^k x
    """

    def __init__(self, width: int, dim: int, heads: int = 1, frequencies: int = 4):
        super().__init__()
        self.register_buffer("waves", math.pi * 2.0 ** torch.arange(frequencies), persistent=False)
        codes = 4 * frequencies
        self.corner = nn.Parameter(torch.empty(2, codes).normal_(0, 0.02))
        self.box = nn.Sequential(nn.Linear(2 * codes, width), nn.GELU(), nn.Linear(width, width))
        self.words = nn.Linear(dim, width)
        self.layer = Block(width, heads, 4 * width, "gelu", 1e-5)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, dim)
        self.place = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4)
        )

    def forward(self, tokens: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, width) and boxes (B, M, 4), shares of width and height, to unit rows (B, M, dim)."""
        angles = boxes.unflatten(-1, (2, 2))[..., None] * self.waves
        codes = torch.cat([angles.sin(), angles.cos()], -1).flatten(-2) + self.corner
        found = self.read(self.box(codes.flatten(-2).to(tokens.dtype)), tokens)
        return F.normalize(self.out(found).float(), dim=-1)

    def locate(self, tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, width) and rows of words (B, M, dim) to boxes (B, M, 4), left, top, right, bottom in [0, 1]."""
        shares = self.place(self.read(self.words(words.to(tokens.dtype)), tokens)).float().sigmoid()
        low, extent = shares[..., :2], shares[..., 2:]  # the second is a share of what is left of the image
        return torch.cat([low, low + (1 - low) * extent], -1)

    def read(self, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Let every prompt (B, M, width) look at itself and at the tokens, through the one layer."""
        count, layer = prompts.shape[1], self.layer
        y = layer.norm1(torch.cat([prompts, tokens], 1))
        own = torch.eye(count, dtype=torch.bool, device=y.device)  # prompts do not see each other
        seen = torch.cat([own, own.new_ones(count, tokens.shape[1])], 1)
        x = prompts + layer.attention(y[:, :count], y, mask=seen)[0]
        return self.norm(x + layer.mlp(layer.norm2(x)))

    def regions(self, encoder: Any, pixels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Preprocessed pixels (B, 3, H, W) and boxes (B, M, 4) to unit rows; `segment.regions` asks for it."""
        return self(image_tokens(encoder.visual, pixels)[1], boxes)

    @torch.no_grad()
    def find(self, encoder: Any, image: Any, texts: Sequence[str]) -> torch.Tensor:
        """Boxes (M, 4) of texts in an image that is seen whole, shares of its width and height."""
        from ..data.decode import decode_pixels
        from ..encoders.preprocess import _resize

        size = encoder.image_size
        whole = encoder.preprocess.normalize(_resize(decode_pixels(image), size, size, "bicubic"))[None]
        words = encoder.texts(list(texts)).to(encoder.device)[None]
        with encoder._inference():
            tokens = image_tokens(encoder.visual, whole.to(encoder.device, encoder.dtype))[1]
            return self.locate(tokens, words)[0].cpu().clone()

    def save(self, path: str | Path) -> Path:
        """Write a .safetensors file."""
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, str(path))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, heads: int = 1) -> Prompter:
        """Read what `save` wrote, or `parts.safetensors` of a run."""
        from safetensors.torch import load_file

        state = {name.removeprefix("prompter."): value for name, value in load_file(str(path)).items()}
        try:
            dim, width = state["out.weight"].shape
            made = cls(width, dim, heads, state["corner"].shape[1] // 4)
            made.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise BadWeights(f"{str(path)!r} holds no prompter: {error}.") from error
        return made.eval().requires_grad_(False)


def image_tokens(visual: Any, pixels: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Run an image tower; return its output, and its tokens behind the last norm, (B, N, width)."""
    output = visual.run(pixels)
    return output, visual.norm_post(output.tokens)


@method(card="cloc", level="M")
class ClocRecipe(RegionRecipe):
    """A training step on images with captions and on regions with words.

    Parameters
    ----------
    regions : regions of an image in a step, drawn of those that it has
    contrast, grounding : weights of the contrast of regions and of the distance of boxes; both 0 is plain CLIP
    ramp : steps over which both weights rise from 0
    threshold : cosine of two texts from which they are no negatives of each other; None compares words alone
    reader : how boxes are read: "prompter", or "roi" for the projected patches pooled over the box
    heads : of the prompter's layer
    column : column of the data that holds the regions, see `data.regions`
    least : share of a region that must be left in the view
    augment : how views are drawn; None takes what the encoder's own preprocessing shows
    loss : registered contrastive loss of images and captions
    seed : of the prompter's start

    Raises
    ------
    ClipworksError
        If a number is out of range, reader is unknown, or the image tower is not a transformer.

    Inputs
    ------
    image-text pairs with regions: boxes and words in a column; pairs without any count for the captions alone

    Relations
    ---------
    With contrast=0 and grounding=0 it is plain contrastive training. `grain` finds regions instead of being asked;
    `farslip` cuts them out. `losses/cloc` is its loss.

    References
    ----------
    Chen et al. 2024, Contrastive Localized Language-Image Pre-Training

    Examples
    --------
    >>> tokens, boxes = torch.randn(2, 5, 16), torch.rand(2, 3, 4)
    >>> Prompter(16, 8)(tokens, boxes).shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        regions: int = 4,
        contrast: float = 1.0,
        grounding: float = 1.0,
        ramp: int = 0,
        threshold: float | None = 0.95,
        reader: str = "prompter",
        heads: int = 1,
        column: str = COLUMN,
        least: float = 0.5,
        augment: Augment | None = None,
        loss: str = "infonce",
        seed: int = 0,
    ):
        super().__init__(regions, column=column, least=least, augment=augment, loss=loss, seed=seed)
        self.weight = check_range("contrast", contrast, 0.0)
        self.grounding, self.ramp = check_range("grounding", grounding, 0.0), int(check_range("ramp", ramp, 0))
        self.threshold, self.heads = threshold, heads
        self.reader = check_choice("reader", reader, READERS)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "contrast": self.weight}

    def build(self, encoder: Encoder) -> None:
        need_vit(encoder, "CLOC")
        width = encoder.config.vision.width
        self.prompter = Prompter(width, encoder.dim, self.heads) if self.weight or self.grounding else None

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return pixels, tokens, boxes, words, labels as `RegionRecipe` does, and the share of the ramp."""
        share = min(1.0, step / self.ramp) if self.ramp else 1.0
        return {**super().batch(items, step, rng), "share": torch.tensor(share)}

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return rows of images and captions, rows of regions and words, boxes found and true."""
        if self.prompter is None:
            return self.plain.features(encoder, batch)
        output, tokens = image_tokens(encoder.visual, batch["pixels"])
        found = self.plain.features(encoder, {**batch, "pooled": output.pooled})
        words = self.words_of(encoder, batch)
        if self.reader == "roi":
            maps = encoder.visual.project(output.patches).unflatten(1, output.grid)
            region = F.normalize(roi_align(maps.float(), batch["boxes"].float())[:, :, 0, 0], dim=-1)
        else:
            region = self.prompter(tokens, batch["boxes"])
        own = {"region": region, "words": words, "predicted": self.prompter.locate(tokens, words)}
        return {**found, **own, **{name: batch[name] for name in ("boxes", "labels", "share")}}

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the contrast of images and captions and the two weighted losses of regions."""
        found = self.contrast(features)
        if self.prompter is None:
            return found
        kept = kept_rows(features, "region", "words", "predicted", "boxes")
        parts = get_method("cloc", "losses")(
            kept["region"], kept["words"], features["scale"], kept["predicted"], kept["boxes"], labels=kept["labels"],
            threshold=self.threshold, contrast=self.weight, grounding=self.grounding,
        )  # fmt: skip
        return {**found, **{name: features["share"] * value for name, value in parts.items()}}
