"""The two small heads of CLIP-DINOiser, and how they learn from a teacher on unlabelled images, by the one loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.decode import decode
from ..errors import BadWeights, check_range
from .affinity import SIDE, Provider, features_of, provider
from .background import found_objects
from .common import Hidden, enter, similarities

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder

Objects = Callable[[Hidden], torch.Tensor]

SPEED = 200.0  # the objectness head learns at 1e-2, the affinity head at 5e-5 (release)


class Heads(nn.Module):
    """Affinity and objectness from one map of CLIP's.

    Parameters
    ----------
    width : channels of the map
    channels : of the affinity's features (release: 256)
    """

    def __init__(self, width: int, channels: int = 256):
        super().__init__()
        self.affinity = nn.Conv2d(width, channels, 3, padding=1, padding_mode="replicate")
        self.objectness = nn.Conv2d(width, 1, 1)

    def patches(self, maps: torch.Tensor) -> torch.Tensor:
        """Features (B, h, w, channels) whose cosines are the affinity, from maps (B, width, h, w)."""
        return self.affinity(maps).permute(0, 2, 3, 1)

    def objects(self, maps: torch.Tensor) -> torch.Tensor:
        """Logits (B, h, w) that a patch belongs to an object."""
        # AdamW moves every weight by the learning rate, so a factor behind the weights is a factor of the rate
        return SPEED * self.objectness(F.normalize(maps, dim=1))[:, 0]

    def save(self, path: str | Path) -> Path:
        """Write a .safetensors file."""
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, str(path))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Heads:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        state = load_file(str(path))
        try:
            channels, width = state["affinity.weight"].shape[:2]
            heads = cls(width, channels)
            heads.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise BadWeights(f"{str(path)!r} holds no heads of CLIP-DINOiser: {error}.") from error
        return heads.eval().requires_grad_(False)


def early(hidden: Hidden) -> torch.Tensor:
    """Output of the second norm in the first of the blocks at hand, as a map (B, width, h, w)."""
    x, block = hidden.inputs[0], hidden.visual.blocks[-len(hidden.inputs)]
    x = block.norm2(x + block.attention(block.norm1(x))[0])
    return x[:, hidden.prefix :].transpose(1, 2).unflatten(2, hidden.grid)


def head_losses(
    heads: Heads, maps: torch.Tensor, target: torch.Tensor, objects: torch.Tensor, threshold: float = 0.2
) -> dict[str, torch.Tensor]:
    """Binary cross-entropies: of pairs that the teacher finds alike, and of patches that it finds an object.

    Parameters
    ----------
    heads : the heads
    maps : (B, width, h, w)
    target : (B, N, N), cosines of the teacher's features
    objects : (B, N), in [0, 1]
    threshold : teacher's cosines above it are pairs (release: 0.2)
    """
    near = similarities(heads.patches(maps)).clamp(min=0)
    pairs = F.binary_cross_entropy_with_logits(near, (target > threshold).to(near))
    logits = heads.objects(maps).flatten(1)
    return {"affinity": pairs, "objects": F.binary_cross_entropy_with_logits(logits, (objects > 0.5).to(logits))}


class HeadsRecipe(nn.Module):
    """A step of the heads' training: square crops, the frozen tower's early map, the teachers' answers.

    Parameters
    ----------
    heads : that learn
    teacher, objects, side, threshold : as for `learn`
    """

    captions = False

    def __init__(
        self, heads: Heads, teacher: str | Provider = "own", side: int = 448, threshold: float = 0.2,
        objects: Objects = found_objects,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.teacher, self.side, self.threshold = heads, provider(teacher), side, threshold
        self.objects, self.pool = objects, None

    @property
    def settings(self) -> dict[str, Any]:
        return {"side": self.side, "threshold": self.threshold}

    def bind(self, encoder: Encoder, pool: Any) -> None:
        self.pool = pool

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Random crops of the shorter side, flipped half of the time, RGB in [0, 1]."""

        def view(item: Item, draw: np.random.Generator) -> torch.Tensor:
            image = decode(item.source(), key=item.key)
            length = min(image.size)
            left, top = (int(draw.integers(n - length + 1)) for n in image.size)
            crop = image.resize((self.side, self.side), box=(left, top, left + length, top + length))
            pixels = np.asarray(crop)[:, :: 1 if draw.random() < 0.5 else -1]
            return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255

        run: Any = map if self.pool is None else self.pool.map
        return {"images": torch.stack(list(run(view, items, rng.spawn(len(items)))))}

    def enter(self, encoder: Encoder, images: torch.Tensor) -> Hidden:
        """Images (B, 3, side, side) on their way through the frozen tower."""
        return enter(encoder.eval(), images, blocks=3, sides=(SIDE,))

    def lesson(self, hidden: Hidden) -> dict[str, torch.Tensor]:
        """What `head_losses` is given: maps (B, width, h, w), target (B, N, N) and objects (B, N)."""
        features = features_of(self.teacher, hidden).permute(0, 3, 1, 2)
        target = similarities(F.adaptive_avg_pool2d(features, hidden.grid).permute(0, 2, 3, 1))
        return {"maps": early(hidden), "target": target, "objects": self.objects(hidden).flatten(1)}

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Both losses; nothing of the tower has a gradient."""
        with torch.no_grad():
            lesson = self.lesson(self.enter(encoder, batch["images"]))
        return head_losses(self.heads, **lesson, threshold=self.threshold)


def learn(
    images: Any,
    encoder: Encoder,
    *,
    teacher: str | Provider = "own",
    objects: Objects = found_objects,
    out: str | Path | None = None,
    steps: int = 6200,
    batch_size: int = 16,
    side: int | None = None,
    lr: float = 5e-5,
    threshold: float = 0.2,
    seed: int = 0,
    progress: bool | None = None,
) -> Heads:
    """Train the heads on unlabelled images; the encoder stays as it is.

    Parameters
    ----------
    images : anything `open_source` takes (release: 1,000 photos)
    encoder : its image tower is read
    teacher : whose affinity is imitated, see `segment.affinity` (paper: DINO ViT-B/16)
    objects : whose objects are imitated, a function of `common.Hidden` to (B, h, w), True for an object: FOUND's rule
        on the tower itself, or `background.long_objects` for a convolutional stem
    out : folder of the run, as for `training.loop.train`; None writes nothing
    steps, batch_size, lr : of AdamW (release: 6200, 16, 5e-5; the objectness head learns 200 times as fast)
    side : of the crops in pixels (default: twice the encoder's image size; release: 448)
    threshold : teacher's cosines above it are pairs (release: 0.2)
    seed : of the heads' start, the order and the crops
    progress : show a bar

    Returns
    -------
    Heads, without gradients
    """
    recipe = HeadsRecipe(fresh(encoder, seed), teacher, side or 2 * encoder.image_size, threshold, objects)
    return train_heads(recipe, images, encoder, out=out, steps=steps, batch_size=batch_size, lr=lr, seed=seed,
                       progress=progress)  # fmt: skip


def fresh(encoder: Encoder, seed: int) -> Heads:
    """Heads for an encoder's image tower, as a seed draws them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Heads(encoder.config.vision.width)


def train_heads(recipe: HeadsRecipe, images: Any, encoder: Encoder, *, steps: int, **settings: Any) -> Heads:
    """Train a recipe's heads by the one loop, at a constant rate and without weight decay.

    Parameters
    ----------
    recipe : with the heads
    images : anything `open_source` takes
    encoder : stays as it is
    steps : of AdamW
    **settings : out, batch_size, lr, seed and progress, as for `training.loop.train`

    Returns
    -------
    Heads, without gradients
    """
    import copy

    from ..training.loop import train

    check_range("steps", steps, 1)
    report = train(
        images, copy.deepcopy(encoder), recipe=recipe, steps=steps, weight_decay=0.0, warmup=0, schedule="constant",
        freeze=["*", "!recipe.*"], augment="none", device="cpu", **settings,
    )  # fmt: skip
    recipe.heads.load_state_dict({name.removeprefix("heads."): value for name, value in report.parts.items()})
    return recipe.heads.eval().requires_grad_(False)
