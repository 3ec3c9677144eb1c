"""A-CLIP: training on the patches that a slow copy of the tower attends to, with two self-supervised losses.

Claim: dropping the half of the patches that the class token looks at least keeps what the caption speaks of; two such
views and their extra losses cost about as much as one whole image (YFCC15M, ViT-B/16, ImageNet zero-shot: CLIP 37.6,
SLIP 42.8, this 43.9; time 1.00, 2.67, 1.16; one view: random half 35.0, attentive half 39.5).

Formula: s_p = mean over layers and heads of the slow tower's attention [class -> p] on a crop that encloses both views;
per view: the map cut out at the view's box, averaged over 2 x 2 blocks, best int(cells * keep) + 1 blocks kept whole.
L = (InfoNCE(v1, t) + InfoNCE(v2, t)) / 2 + SimCLR(v1, v2) + 2 BYOL;  BYOL = mean over views of 2 - 2 cos(q(h(v)),
h_slow(v_slow));  slow <- m slow + (1 - m) fast, m from 0.996 to 1 on a cosine.

Paper: Yang et al. 2023, Attentive Mask CLIP (ICCV).
Differs from the paper: views are not solarised; only the slow image tower and projector exist, since no loss reads a
slow text tower. SimCLR contrasts the two views as the paper says (the released code pairs the first with itself:
`first_view_twice`). Freezing the patch embedding is `train(freeze=["visual.stem.*"])`.
Defaults: keep 0.5, momentum, weights 1, 1, 2, heads of 4096 and 256 from the released code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ClipworksError, check_range
from ..registry import get_method, method
from ..training.augment import Augment, open_image
from ..training.gather import gather
from ..training.recipe import ContrastiveRecipe
from .parts import ModuleRecipe, follow, head, need_vit, unprojected

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder

CROP = Augment(scale=(0.5, 1.0))
# applied to a crop that is cut already, so its own crop is the whole
COLOUR = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, grey=0.2, blur=0.1)


@method(card="a-clip", level="M")
class AttentiveRecipe(ModuleRecipe):
    """A training step on two attentively masked views.

    Parameters
    ----------
    keep : share of the blocks of patches that stay, in (0, 1]
    steps : length of the run, over which the momentum rises to 1; None keeps it where it starts
    momentum : of the slow tower at the start
    simclr, byol : weights of the two self-supervised losses; 0 leaves one out
    hidden, out : channels of their heads
    cell : side of a block in patches; must divide the grid
    slow_size : side in pixels of what the slow tower sees; None is the tower's own (half of it: "A-CLIP-eff")
    crop : how the two views are cut
    colour : how their colours change; None leaves them
    first_view_twice : pair the first view with itself in SimCLR, as the released code does
    loss : registered contrastive loss
    seed : of the heads' start

    Raises
    ------
    ClipworksError
        If keep or momentum is out of range, or the image tower has no patches, no class token or no whole blocks.

    Inputs
    ------
    image-text pairs

    Relations
    ---------
    With keep=1, simclr=0, byol=0 and equal views the loss is plain CLIP's. `flip` drops patches at random; `slip` adds
    the SimCLR term alone.

    References
    ----------
    Yang et al. 2023, Attentive Mask CLIP

    Examples
    --------
    >>> scores = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0))
    >>> attentive_patches(scores, keep=0.5).shape
    torch.Size([3, 100])
    """

    split = False  # the slow tower moves once per step

    def __init__(
        self,
        keep: float = 0.5,
        steps: int | None = None,
        momentum: float = 0.996,
        simclr: float = 1.0,
        byol: float = 2.0,
        hidden: int = 4096,
        out: int = 256,
        cell: int = 2,
        slow_size: int | None = None,
        crop: Augment = CROP,
        colour: Augment | None = COLOUR,
        first_view_twice: bool = False,
        loss: str = "infonce",
        seed: int = 0,
    ):
        super().__init__(ContrastiveRecipe(loss), seed)
        self.keep, self.steps, self.cell = check_range("keep", keep, 0.0, 1.0), steps, cell
        self.momentum = check_range("momentum", momentum, 0.0, 1.0)
        self.simclr, self.byol = check_range("simclr", simclr, 0.0), check_range("byol", byol, 0.0)
        self.hidden, self.out, self.slow_size = hidden, out, slow_size
        self.crop, self.colour, self.first_view_twice = crop, colour, first_view_twice

    def build(self, encoder: Encoder) -> None:
        need_vit(encoder, "A-CLIP", class_token=True)
        check_blocks(encoder.config.vision.grid, self.cell)
        width = encoder.config.vision.width
        self.slow = copy.deepcopy(encoder.visual).requires_grad_(False)
        self.simclr_head = head(width, self.hidden, self.out, 3) if self.simclr else None
        if self.byol:
            self.projector = head(width, self.hidden, self.out, 2)
            self.slow_projector = copy.deepcopy(self.projector).requires_grad_(False)
            self.predictor = head(self.out, self.hidden, self.out, 2)

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return the two views, the enclosing crop, and the boxes of all three as (left, top, width, height)."""
        draws = rng.spawn(len(items))
        run = map if self.plain.pool is None else self.plain.pool.map
        made = list(run(self._crops, items, draws))
        first, second, whole = (torch.stack([m[0][i] for m in made]) for i in range(3))
        boxes = torch.tensor([m[1] for m in made], dtype=torch.float32)
        tokens = self.plain.bound.tokenize(self.plain.texts(items, draws))
        return {"first": first, "second": second, "whole": whole, "boxes": boxes, "tokens": tokens, "step": step}

    def _crops(self, item: Item, draw: np.random.Generator) -> tuple[list[torch.Tensor], list[tuple[int, ...]]]:
        preprocess = self.plain.bound.preprocess
        size, rule = preprocess.config.size, preprocess.config.interpolation
        image = open_image(item, preprocess)
        one, two = (self.crop.box(image.width, image.height, draw) for _ in range(2))
        both = (min(one[0], two[0]), min(one[1], two[1]), max(one[2], two[2]), max(one[3], two[3]))
        coloured = self.colour or Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))
        unchanged = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))
        kinds = ((one, size, coloured), (two, size, coloured), (both, self.slow_size or size, unchanged))
        views = []
        for box, side, change in kinds:
            cut = image.resize((side, side), _resample(rule), box=box)
            views.append(preprocess.normalize(np.asarray(change(cut, side, draw, rule))))
        return views, [(x, y, right - x, low - y) for x, y, right, low in (one, two, both)]

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Move the slow tower, choose the patches, encode both views and return the three losses."""
        self.follow(encoder, batch["step"])
        scores, target = self.look(batch["whole"])
        grid = encoder.config.vision.grid
        text = encoder.encode_text(batch["tokens"])
        scale = encoder.log_scale.exp().reshape(())
        views, contrasts = [], []
        for number, name in enumerate(("first", "second")):
            here = cut_scores(scores, batch["boxes"][:, number], batch["boxes"][:, 2], grid)
            kept = attentive_patches(here, self.keep, self.cell)
            output = encoder.visual.run(batch[name], keep=kept)
            views.append(unprojected(encoder.visual, output))
            image = F.normalize(output.pooled.float(), dim=-1)
            contrasts.append(self.plain.losses({"image": image, "text": text, "scale": scale})[self.plain.loss_name])
        found = {"clip": (contrasts[0] + contrasts[1]) / 2}
        if self.simclr_head is not None:
            one, two = (gather(self.simclr_head(v)) for v in (views[0], views[0 if self.first_view_twice else 1]))
            found["simclr"] = self.simclr * get_method("simclr", "losses")(one, two)
        if target is not None:
            guesses = [self.predictor(self.projector(v)) for v in views]
            found["byol"] = self.byol * torch.stack([far(guess, target) for guess in guesses]).mean()
        return found

    @torch.no_grad()
    def follow(self, encoder: Encoder, step: int) -> None:
        """Move the slow weights towards the fast ones; at step 0 they are equal still."""
        decay = rising(self.momentum, step, self.steps)
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.slow, encoder.visual)]
        if self.byol:
            pairs.append((self.slow_projector, self.projector))
        for slow, fast in pairs:
            follow(slow, fast, decay)

    @torch.no_grad()
    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the slow tower's scores per patch, (B, rows, columns), and the target of BYOL."""
        output = self.slow.run(pixels, output_attention=range(self.slow.config.depth))
        target = self.slow_projector(unprojected(self.slow, output)) if self.byol else None
        layers = [output.class_attention(i).mean(1) for i in output.attentions]
        side = math.isqrt(output.patches.shape[1])
        return torch.stack(layers).mean(0).float().unflatten(1, (side, side)), target


def _resample(name: str) -> Any:
    from PIL import Image

    return Image.Resampling[name.upper()]


def rising(start: float, step: int, steps: int | None) -> float:
    """Return the momentum at a step: from `start` to 1 on a half cosine, or `start` throughout."""
    if steps is None:
        return start
    return 1 - (1 - start) * (math.cos(math.pi * min(step, steps) / steps) + 1) / 2


def far(guess: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean of 2 - 2 cos over rows, in [0, 4]; no gradient reaches the target."""
    return (2 - 2 * F.cosine_similarity(guess, target.detach(), dim=-1)).mean()


def check_blocks(grid: tuple[int, int], cell: int) -> None:
    """Raise unless the grid of patches consists of whole blocks."""
    if cell < 1 or grid[0] % cell or grid[1] % cell:
        raise ClipworksError(f"cell must divide the grid of patches, {grid[0]} x {grid[1]}. Got {cell}.")


def attentive_patches(scores: torch.Tensor, keep: float = 0.5, cell: int = 2) -> torch.Tensor:
    """Return the patches of the best blocks.

    Parameters
    ----------
    scores : (B, rows, columns), one number per patch
    keep : share of the blocks; int(blocks * keep) + 1 of them stay, at most all
    cell : side of a block in patches

    Returns
    -------
    int64 tensor of shape (B, kept blocks * cell * cell), ascending, numbered row by row
    """
    rows, columns = scores.shape[1:]
    check_blocks((rows, columns), cell)
    blocks = F.avg_pool2d(scores[:, None], cell).flatten(1)
    count = min(int(blocks.shape[1] * keep) + 1, blocks.shape[1])
    chosen = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, blocks.topk(count, dim=1).indices, True)
    chosen = chosen.unflatten(1, (rows // cell, columns // cell))
    patches = chosen.repeat_interleave(cell, 1).repeat_interleave(cell, 2).flatten(1)
    return patches.nonzero()[:, 1].unflatten(0, (len(scores), -1))


def cut_scores(scores: torch.Tensor, boxes: torch.Tensor, whole: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return the scores as a view sees them: blown up to the enclosing crop's pixels, cut, brought to the grid.

    Both resizings are bilinear without smoothing and act on rows and columns apart, so each sample needs one small
    matrix per axis and no map of pixels is ever made.

    Parameters
    ----------
    scores : (B, rows, columns) on the enclosing crop
    boxes, whole : (B, 4), left, top, width and height of the view and of the enclosing crop, in whole pixels
    grid : rows and columns of the result
    """
    inside = boxes[:, :2] - whole[:, :2]
    across = _axis(scores.shape[2], grid[1], inside[:, 0], boxes[:, 2], whole[:, 2])
    down = _axis(scores.shape[1], grid[0], inside[:, 1], boxes[:, 3], whole[:, 3])
    return down @ scores @ across.transpose(1, 2)


def _axis(old: int, new: int, start: torch.Tensor, length: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return the matrices (B, new, old) of one axis: cell -> two pixels of the view -> two cells of the map each."""
    centre = (torch.arange(new, device=start.device) + 0.5) * length[:, None] / new - 0.5
    centre = centre.clamp(min=0)
    low = centre.floor()
    share = centre - low
    found = torch.zeros(len(start), new, old, device=start.device)
    for pixel, weight in ((low, 1 - share), (torch.minimum(low + 1, length[:, None] - 1), share)):
        place = ((pixel + start[:, None] + 0.5) * old / total[:, None] - 0.5).clamp(min=0)
        below = place.floor()
        part = place - below
        for cell, amount in ((below, 1 - part), (below + 1, part)):
            index = cell.long().clamp(max=old - 1)[..., None]
            found.scatter_add_(2, index, (weight * amount)[..., None])
    return found
