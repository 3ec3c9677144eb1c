"""GRAIN: a decoder reads the image tower with region queries, tied to described boxes, and with one image query.

Claim: an image vector that is read beside grounded regions answers prompts with descriptions better than CLIP trained
on the same pairs (its paper: eleven classification sets and retrieval; figures not at hand).

Formula: memory = W tokens, without positions; 5 + 1 learned queries through 6 pre-norm decoder layers; boxes =
sigmoid(MLP(region query)), e_R = unit(P_obj region query), e_I = unit(P_img image query);  L = InfoNCE(e_I, caption) +
boxes + descriptions over the pairs of least cost, see `losses/grain`.

Paper: Halbe et al. 2024, Grounding Descriptions in Images informs Zero-Shot Visual Recognition (WACV 2026).
Differs from the paper: descriptions of all processes are contrasted, and twins are right; boxes with words come with
the data (the paper asks LLaVA and OWLv2 for them); captions are those of the data.
Defaults: queries, layers, heads, width, dropout and weights from the released code; lr 1e-3, weight decay 0.1 and
35 epochs belong to `train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.regions import COLUMN
from ..errors import BadWeights, check_range
from ..losses.regions import centres, corners
from ..registry import get_method, method
from ..training.augment import Augment
from ..training.gather import gather
from .cloc import image_tokens
from .parts import need_vit
from .regions import RegionRecipe

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


class Decoder(nn.Module):
    """Region queries and an image query that read an image's tokens.

    Parameters
    ----------
    channels : of the tokens
    dim : dimensions of the joint space
    queries : for regions; one more is the image's
    width, heads, hidden, layers, dropout : of the decoder
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        queries: int = 5,
        width: int = 512,
        heads: int = 8,
        hidden: int = 2048,
        layers: int = 6,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.memory = nn.Linear(channels, width, bias=False)
        self.queries = nn.Parameter(torch.empty(queries + 1, width).normal_(0, 0.02))
        layer = nn.TransformerDecoderLayer(width, heads, hidden, dropout, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        self.box = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )
        self.region, self.image = nn.Linear(width, dim, bias=False), nn.Linear(width, dim, bias=False)
        for parameter in self.decoder.parameters():
            if parameter.ndim > 1:  # torch copies one layer, so that all of them would begin alike
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (B, N, channels), in any order, to the image's vector (B, dim), not normalised, unit rows of the
        regions (B, Q, dim), and their boxes (B, Q, 4), centre x, centre y, width, height in [0, 1]."""
        found = self.decoder(self.queries.expand(len(tokens), -1, -1).to(tokens.dtype), self.memory(tokens))
        regions = found[:, :-1]
        boxes = self.box(regions).float().sigmoid()
        return self.image(found[:, -1]), F.normalize(self.region(regions).float(), dim=-1), boxes

    @classmethod
    def load(cls, path: str | Path, heads: int = 8) -> Decoder:
        """Read `parts.safetensors` of a run."""
        from safetensors.torch import load_file

        # the recipe's own name once: the decoder inside is called "decoder" too
        state = {name[len("decoder.") :]: value for name, value in load_file(str(path)).items()}
        try:
            width, channels = state["memory.weight"].shape
            hidden = state["decoder.layers.0.linear1.weight"].shape[0]
            layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.layers."))
            made = cls(channels, len(state["region.weight"]), len(state["queries"]) - 1, width, heads, hidden, layers)
            made.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise BadWeights(f"{str(path)!r} holds no decoder: {error}.") from error
        return made.eval().requires_grad_(False)


class Grounded:
    """A trained encoder read through its decoder: has `images` and `texts` as encoders do, and finds regions.

    Parameters
    ----------
    encoder, decoder : as trained together
    """

    def __init__(self, encoder: Encoder, decoder: Decoder):
        self.encoder, self.decoder = encoder, decoder.eval().to(encoder.device)

    def _read(self, images: Sequence[Any], batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        found = []
        with self.encoder._inference():
            for start in range(0, len(images), batch_size):
                pixels = torch.stack([self.encoder.preprocess(image) for image in images[start : start + batch_size]])
                pixels = pixels.to(self.encoder.device, self.encoder.dtype)
                found.append(self.decoder(image_tokens(self.encoder.visual, pixels)[1]))
        return found

    def images(self, images: Sequence[Any], batch_size: int = 32) -> torch.Tensor:
        """Unit rows (N, dim) of the image query."""
        rows = [F.normalize(image.float(), dim=-1).cpu() for image, _, _ in self._read(images, batch_size)]
        return torch.cat(rows) if rows else torch.zeros(0, self.encoder.dim)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit rows (N, dim) of texts."""
        return self.encoder.texts(texts)

    def find(self, image: Any, names: Sequence[str]) -> list[tuple[tuple[float, ...], str, float]]:
        """Return box (left, top, right, bottom, shares of what the preprocessing shows), best name and cosine of every
        region query, the best first; nothing is left out, so a threshold is the caller's."""
        ((_, rows, boxes),) = self._read([image], 1)
        cosines, best = (rows[0].cpu() @ self.texts(list(names)).T).max(1)
        places = corners(boxes[0].cpu()).clamp(0, 1).tolist()
        found = [(tuple(place), names[int(k)], float(c)) for place, k, c in zip(places, best, cosines, strict=True)]
        return sorted(found, key=lambda entry: -entry[2])


@method(card="grain", level="M")
class GrainRecipe(RegionRecipe):
    """A training step on images with captions and described regions, read by a decoder.

    Parameters
    ----------
    queries : region queries, and the most regions of an image; of more the surest are taken
    boxes, descriptions : weights of the two losses of regions
    image_query : whether the image's vector is the image query's (the paper), or the tower's own
    layers, heads, width, hidden, dropout : of the decoder
    column : column of the data that holds the regions, see `data.regions`
    least : share of a region that must be left in the view
    augment : how views are drawn; None takes what the encoder's own preprocessing shows
    loss : registered contrastive loss of images and captions; the paper's is "infonce"
    seed : of the decoder's start

    Raises
    ------
    ClipworksError
        If a number is out of range or the image tower is not a transformer.

    Inputs
    ------
    image-text pairs with described regions: boxes and words in a column

    Relations
    ---------
    With image_query=False and both weights 0 it is plain contrastive training. `cloc` is asked about boxes;
    `zeroshot/classify_by_description` writes the prompts that its paper tests with. `losses/grain` is its loss.

    References
    ----------
    Halbe et al. 2024, Grounding Descriptions in Images informs Zero-Shot Visual Recognition

    Examples
    --------
    >>> image, regions, boxes = Decoder(16, 8, width=32, layers=1).eval()(torch.randn(2, 5, 16))
    >>> image.shape, regions.shape, boxes.shape
    (torch.Size([2, 8]), torch.Size([2, 5, 8]), torch.Size([2, 5, 4]))
    """

    def __init__(
        self,
        queries: int = 5,
        boxes: float = 1.0,
        descriptions: float = 1.0,
        image_query: bool = True,
        layers: int = 6,
        heads: int = 8,
        width: int = 512,
        hidden: int = 2048,
        dropout: float = 0.1,
        column: str = COLUMN,
        least: float = 0.5,
        augment: Augment | None = None,
        loss: str = "infonce",
        seed: int = 0,
    ):
        super().__init__(queries, surest=True, column=column, least=least, augment=augment, loss=loss, seed=seed)
        self.queries, self.image_query = queries, image_query
        self.boxes = check_range("boxes", boxes, 0.0)
        self.descriptions = check_range("descriptions", descriptions, 0.0)
        self.layers, self.heads, self.width, self.hidden, self.dropout = layers, heads, width, hidden, dropout

    def build(self, encoder: Encoder) -> None:
        need_vit(encoder, "GRAIN")
        used = self.image_query or self.boxes or self.descriptions
        self.decoder = Decoder(
            encoder.config.vision.width, encoder.dim, self.queries, self.width, self.heads, self.hidden, self.layers,
            self.dropout,
        ) if used else None  # fmt: skip

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return rows of images and captions, of region queries and described regions, boxes found and true."""
        if self.decoder is None:
            return self.plain.features(encoder, batch)
        output, tokens = image_tokens(encoder.visual, batch["pixels"])
        image, region, predicted = self.decoder(tokens)
        found = self.plain.features(encoder, {**batch, "pooled": image if self.image_query else output.pooled})
        found |= {"region": region, "predicted": predicted, "target": centres(batch["boxes"].float())}
        return {**found, "description": self.words_of(encoder, batch), "labels": batch["labels"]}

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the contrast of images and captions and the two weighted losses of regions."""
        found = self.contrast(features)
        if self.decoder is None or not (self.boxes or self.descriptions):
            return found
        names = ("image", "text", "region", "predicted", "description", "target", "labels")
        rows = {name: gather(features[name]) for name in names}
        parts = get_method("grain", "losses")(
            **rows, scale=features["scale"], boxes=self.boxes, descriptions=self.descriptions
        )
        return found | {name: parts[name] for name in ("boxes", "descriptions")}
