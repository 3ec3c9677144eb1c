"""What dense methods share: images on their way through a tower, the parts of its last block, cosines with words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from ..encoders.layers import Rule
from ..errors import ClipworksError
from ..zeroshot.classifier import class_vectors

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


@dataclass
class Hidden:
    """A batch of images on their way through an image tower, before its last blocks.

    Attributes
    ----------
    visual : the tower
    images : (B, 3, H, W), RGB in [0, 1]
    inputs : what the last blocks are given, (B, N, width) each, in their order; for a ResNet its last map's cells
    grid : rows and columns of the patches
    prefix : tokens before the patches (class token)
    embedded : (B, patches, width), what the stem gave, for `VisionTransformer.project`; None leaves a memory unread
    maps : size of cells in pixels -> earlier, finer map of a convolutional stem
    """

    visual: Any
    images: torch.Tensor
    inputs: list[torch.Tensor]
    grid: tuple[int, int]
    prefix: int = 0
    embedded: torch.Tensor | None = None
    maps: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def block(self) -> Any:
        """The last block."""
        if not hasattr(self.visual, "blocks"):
            raise ClipworksError("a ResNet has no transformer block that this method could change; use 'maskclip'.")
        return self.visual.blocks[-1]

    def attend(self, rule: Rule | None) -> torch.Tensor:
        """What the attention of the last block gives under a rule, (B, N, width): no residual sum, no feed-forward."""
        return self.block.attention(self.block.norm1(self.inputs[-1]), rule=rule)[0]

    def finish(self, attended: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """The rest of the last block: sum with its input (or `x`), then the feed-forward part with its own."""
        x = (self.inputs[-1] if x is None else x) + attended
        return x + self.block.mlp(self.block.norm2(x))

    def heads(self, name: str) -> torch.Tensor:
        """Queries "q", keys "k" or values "v" of the last block: (B, heads, N, channels)."""
        attention = self.block.attention
        return attention.split(getattr(attention, name)(self.block.norm1(self.inputs[-1])))

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, width), class token included, to a map (B, h, w, dim) in the joint space, not normalised."""
        recall = () if self.embedded is None else (self.embedded,)
        return self.visual.project(tokens[:, self.prefix :], *recall).unflatten(1, self.grid)


def enter(
    encoder: Any, images: torch.Tensor, *, blocks: int = 1, sides: Sequence[int] = (), memory: bool = True
) -> Hidden:
    """Run images (B, 3, H, W), RGB in [0, 1], up to the last blocks.

    Parameters
    ----------
    encoder : with an image tower
    images : sides are multiples of the patch size
    blocks : how many of the last blocks are left to do (at most all)
    sides : cells of the finer maps to keep, in pixels, where the stem has such maps
    memory : whether a tower that has a memory recalls every patch

    Returns
    -------
    `Hidden`
    """
    visual, config = encoder.visual, encoder.config.preprocess
    mean, std = (torch.tensor(v, device=encoder.device)[:, None, None] for v in (config.mean, config.std))
    pixels = ((images.to(encoder.device) - mean) / std).to(encoder.dtype)
    if not hasattr(visual, "blocks"):
        output = visual.run(pixels)
        return Hidden(visual, images, [output.tokens], output.grid)
    depth = len(visual.blocks)
    blocks = min(blocks, depth)
    fine = [side for side in sides if side in getattr(visual.stem, "ends", ())]
    embedded, maps = visual.stem.maps(pixels, fine) if fine else (visual.stem(pixels), {})
    output = visual.run(embeddings=embedded, stop=depth - blocks)
    inputs = [output.tokens]
    for block in visual.blocks[depth - blocks : -1]:
        inputs.append(block(inputs[-1])[0])
    patches = embedded.flatten(2).transpose(1, 2) if memory else None
    return Hidden(visual, images, inputs, output.grid, output.prefix, patches, maps)


class Dense(ABC):
    """Base of the dense methods: from the input of the last blocks to a score for every patch and word.

    Attributes
    ----------
    blocks : how many of the last blocks a method does itself
    sides : finer maps of a convolutional stem that it reads, if there are any
    """

    blocks: int = 1
    sides: ClassVar[tuple[int, ...]] = ()

    @abstractmethod
    def features(self, hidden: Hidden) -> torch.Tensor:
        """A map (B, h, w, dim) in the joint space, not normalised."""

    def words(self, words: torch.Tensor) -> torch.Tensor:
        """Unit rows of the class words (K, dim), as this method wants them."""
        return words

    def encoder_for(self, encoder: str | Encoder | None) -> Encoder:
        """The encoder that images and words go through: the one asked for, by default the bundled one."""
        from ..encoders.loading import resolve

        return resolve(encoder)

    def class_words(self, names: Sequence[str], encoder: Encoder, templates: str | Sequence[str]) -> torch.Tensor:
        """What `local` is given for names: a row for each."""
        return self.words(class_vectors(names, encoder, templates=templates))

    def probabilities(self, scores: torch.Tensor, scale: float) -> torch.Tensor:
        """Probabilities of scores (K, h, w), by default cosines."""
        return (scale * scores).softmax(0)

    def local(self, hidden: Hidden, words: torch.Tensor) -> torch.Tensor:
        """What is averaged where windows overlap: (B, channels, h, w), by default the cosines with the words."""
        return cosines(self.features(hidden), words)

    def whole(self, average: torch.Tensor, image: torch.Tensor, encoder: Any, words: torch.Tensor) -> torch.Tensor:
        """From the average over all windows (channels, h, w) of an image (3, H, W) to cosines (K, h, w)."""
        return average

    def objects(self, hidden: Hidden) -> torch.Tensor:
        """Whether a patch belongs to an object, (B, 1, h, w) in [0, 1]: FOUND's rule on the tower's last block."""
        from .background import found_objects

        return found_objects(hidden).float()[:, None]


def cosines(features: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Cosines of a map (B, h, w, dim) with unit rows (K, dim), as (B, K, h, w)."""
    unit = F.normalize(features.float(), dim=-1)
    return (unit @ words.to(unit).T).movedim(-1, 1)


def pool(affinity: torch.Tensor, features: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Mean of features (B, N, dim) weighted by the rows of an affinity (B, M, N) that is not negative.

    >>> pool(torch.ones(1, 2, 2), torch.tensor([[[1.0], [3.0]]])).flatten()
    tensor([2.0000, 2.0000])
    """
    return affinity @ features / (affinity.sum(-1, keepdim=True) + eps)


def similarities(features: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs of a map's cells: (B, h, w, C) or (B, N, C) to (B, N, N)."""
    unit = F.normalize(features.flatten(1, -2).float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def interpolation(size: int, cells: int, span: float | None = None) -> torch.Tensor:
    """Matrix (size, cells) of linear interpolation from `cells` to `size` points, half-pixel centres, clamped ends.

    Parameters
    ----------
    size, cells : points of the result and of what is interpolated
    span : how many of the cells the result covers, from the first on (default: all; the rest was padding)

    >>> interpolation(4, 2)
    tensor([[1.0000, 0.0000],
            [0.7500, 0.2500],
            [0.2500, 0.7500],
            [0.0000, 1.0000]])
    """
    at = (torch.arange(size, dtype=torch.float64) + 0.5) * ((cells if span is None else span) / size) - 0.5
    at = at.clamp(0, cells - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=cells - 1)
    share = at - low
    matrix = torch.zeros(size, cells, dtype=torch.float64)
    rows = torch.arange(size)
    matrix[rows, low] += 1 - share
    matrix[rows, high] += share
    return matrix.float()


def resample(maps: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Maps (..., h, w) interpolated by matrices (H, h) and (W, w) to (..., H, W)."""
    return rows.to(maps) @ maps @ columns.to(maps).T
