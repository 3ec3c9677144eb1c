"""AdaptCLIP: three small adapters, trained once on defects of other things, used without training on new ones.

Claim: adapting words and images in turn, never together, and comparing query with reference by context and residual,
gives one model for defects of all kinds (MVTec AD, zero-shot: image AUROC 93.5, without adapters 91.1 in the release).

Formula: z unit patches by value attention, g the image vector, p(x, t) = softmax(<x, t> / 0.07)_bad
TA: p(z, t), t of two learned contexts;   VA: p(z + W2 relu(BN(W1 z)), t of fixed sentences)
PQ: nearest reference patch p*, f = q + |q - p*|, BN per layer, one decoder for all layers; alignment 1 - <q, p*>
loss of each: CE(image) + focal + Dice(bad) + Dice(good);  zero-shot: map = mean(VA, TA), image = mean(VA, TA, max map)
few-shot: harmonic mean of mean(VA, TA, PQ) and the alignment map (harmonic over layers).

Paper: Gao et al. 2026, AdaptCLIP: Adapting CLIP for Universal Visual Anomaly Detection.
Differs from the paper: written from its description, as the release is GPL; the decoder's inner widths are ours; the
top tokens of the global head are taken channel by channel; towers of fewer blocks use those they have.
Defaults: 12 tokens, temperature 0.07, Adam (0.5, 0.999) at 1e-3, 15 epochs, batches of 8, one reference (release).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ClipworksError
from ..registry import method
from .adapters import StatePrompts, check_training, map_loss, spread_layers, states, train
from .common import Memory
from .detector import FOLDS, AnomalyDetector
from .states import state_vectors
from .value_path import value_layers


@method(card="adaptclip", level="MR")
class AdaptCLIP(AnomalyDetector):
    """Find defects with adapters that learned them on other things.

    Parameters
    ----------
    encoder : an `Encoder` with an image transformer, a model's name or path; None for the bundled one
    text : two vectors (2, dim) of good and defective things in the place of sentences about an "object"
    layers : blocks whose patches the references are compared at (default: four at equal steps)
    blocks : how many of the last blocks have value attention (default: four fifths)
    tokens : learned words of each state
    context : whether the query itself enters beside the residual
    epochs, batch_size, lr : of the training
    image_size : side in pixels to which images are squeezed (default: the encoder's)
    limit : most patches remembered per layer
    rate : share of good images that may be called defective
    seed : of start values and order

    Attributes
    ----------
    adapters_ : after `train`, the three adapters
    memories_ : after `fit` with images, their patches by layer

    Inputs
    ------
    `train`: images and masks of other things; `fit`: none, or a few images of good parts of the thing at hand

    Relations
    ---------
    Untrained and without good images it is the comparison with fixed sentences. `GenCLIP` learns words alone.

    References
    ----------
    Gao et al. 2026, AdaptCLIP: Adapting CLIP for Universal Visual Anomaly Detection

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> images = torch.arange(16.0).expand(4, 3, 16, 16) * torch.linspace(0.9, 1.1, 4)[:, None, None, None]
    >>> detector = AdaptCLIP(toy_encoder(), text=np.eye(2, 8)).fit(images)
    >>> detector.score_map(images[0]).heat.shape
    (16, 16)
    """

    needs_images = False
    text_: np.ndarray
    adapters_: Adapters | None
    memories_: list[Memory]

    def __init__(
        self,
        encoder: Any = None,
        *,
        text: Any = None,
        layers: Sequence[int] | None = None,
        blocks: int | None = None,
        tokens: int = 12,
        context: bool = True,
        epochs: int = 15,
        batch_size: int = 8,
        lr: float = 1e-3,
        image_size: int | None = None,
        limit: int = 4096,
        rate: float = 0.05,
        seed: int = 0,
    ):
        self.encoder = encoder
        self.text = text
        self.layers = layers
        self.blocks = blocks
        self.tokens = tokens
        self.context = context
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.image_size = image_size
        self.limit = limit
        self.rate = rate
        self.seed = seed

    def train(self, images: Any, masks: Any, references: Any = None) -> AdaptCLIP:
        """Train the adapters on defects of other things, then call `fit`.

        Parameters
        ----------
        images : good and defective ones, as for `fit`
        masks : (n, H, W), not zero where there is a defect
        references : one good image of the same thing for every image (default: the good images in turn)
        """
        self._open()
        self._prepare()
        described = self._many(images)
        masks = check_training(len(described["image"]), masks)
        label = masks.flatten(1).amax(1)
        good = (label == 0).nonzero()[:, 0]
        compared = None if references is None else self._many(references, "references")
        if compared is not None and len(compared["image"]) != len(label):
            raise ClipworksError(f"references must be one per image ({len(label)}). Got {len(compared['image'])}.")
        side = described["patches0"].shape[1:3]
        small = F.adaptive_max_pool2d(masks[:, None], side)[:, 0]
        count = len(self._chosen)
        model, found = self._model, Adapters(self._model, self.tokens, count, self.seed)
        text = torch.from_numpy(self.text_)

        def loss(rows: torch.Tensor) -> torch.Tensor:
            z, g, truth, y = described["patches"][rows], described["image"][rows], small[rows], label[rows]
            words = found.words(model, [".", "."])
            total = map_loss(states(z, words), truth) + F.binary_cross_entropy(states(g, words), y)
            total = total + map_loss(states(found.local(z), text), truth)
            total = total + F.binary_cross_entropy(states(found.whole(g), text), y)
            fused = []
            for layer in range(count):
                q = described[f"patches{layer}"][rows]
                if compared is None:  # a good image other than the query itself
                    others = good[(rows + 1) % len(good)] if len(good) > 1 else good.expand(len(rows))
                    others = torch.where(others == rows, good[rows % len(good)], others)
                    p = described[f"patches{layer}"][others]
                else:
                    p = compared[f"patches{layer}"][rows]
                fused.append(fuse(q, p, self.context)[0])
            heat, image = found.query(fused)
            truth = F.interpolate(masks[rows][:, None], heat.shape[1:], mode="nearest")[:, 0]
            return total + map_loss(heat, truth) + F.binary_cross_entropy(image, y)

        self.history_ = train(found, loss, len(label), epochs=self.epochs, batch_size=self.batch_size, lr=self.lr,
                              seed=self.seed)  # fmt: skip
        self.adapters_ = found
        return self

    def _prepare(self) -> None:
        depth = len(getattr(self._model.visual, "blocks", ())) or 1
        self.text_ = state_vectors(self.text, "object", self._model)
        self._chosen = spread_layers(depth) if self.layers is None else list(self.layers)
        self._last = max(1, round(0.8 * depth)) if self.blocks is None else self.blocks

    def _begin(self) -> None:
        self._prepare()
        self.adapters_ = getattr(self, "adapters_", None)
        self.memories_ = []

    def _describe(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        maps, image = value_layers(self._model, pixels, self._last, [*self._chosen, -1])
        return {"image": image, "patches": maps[-1]} | {f"patches{i}": m for i, m in enumerate(maps[:-1])}

    def _learn(self, described: dict[str, torch.Tensor], fold: int) -> None:
        if not self.memories_:
            self.memories_ = [Memory(self.limit, FOLDS) for _ in self._chosen]
        for layer, memory in enumerate(self.memories_):
            memory.add(described[f"patches{layer}"].flatten(0, 2), fold)

    def _judge(self, described: dict[str, torch.Tensor], without: int | None) -> tuple[torch.Tensor, Any]:
        with torch.no_grad():
            return self._combined(described, without)

    def _combined(self, described: dict[str, torch.Tensor], without: int | None) -> tuple[torch.Tensor, Any]:
        z, g, text, own = described["patches"], described["image"], torch.from_numpy(self.text_), self.adapters_
        heats, whole = [states(z, text)], [states(g, text)]
        if own is not None:
            words = own.words(self._model, [".", "."])
            heats = [states(own.local(z), text), states(z, words)]
            whole = [states(own.whole(g), text), states(g, words)]
        if not self.memories_:
            heat = torch.stack(heats).mean(0)
            return heat, torch.stack([*whole, heat.amax((1, 2))]).mean(0).numpy()
        fused, apart = [], []
        for layer, memory in enumerate(self.memories_):
            f, far = fuse(described[f"patches{layer}"], memory.rows(without), self.context)
            fused.append(f)
            apart.append(far)
        if own is not None:
            heat, image = own.query(fused)
            heats.append(F.interpolate(heat[:, None], z.shape[1:3], mode="area")[:, 0])
            whole.append(image)
        aligned = harmonic(apart)
        heat = harmonic([torch.stack(heats).mean(0), aligned])
        score = harmonic([torch.stack(whole).mean(0), aligned.amax((1, 2))])
        return heat, ((score + heat.amax((1, 2))) / 2).numpy()


def fuse(query: torch.Tensor, reference: torch.Tensor, context: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare patches with their nearest reference patches.

    Parameters
    ----------
    query : unit patches (n, h, w, dim)
    reference : unit patches, (m, dim) for all images or (n, h, w, dim) for each
    context : add the query to the residual

    Returns
    -------
    fused features (n, h, w, dim): q + |q - p*|, or |q - p*|; and 1 - cos(q, p*), (n, h, w)
    """
    rows = query.flatten(1, 2)
    parts = []
    for number, q in enumerate(rows):
        memory = reference if reference.ndim == 2 else reference[number].flatten(0, 1)
        parts.append(memory[(q @ memory.T).argmax(1)])
    nearest = torch.stack(parts).view(query.shape)
    residual = (query - nearest).abs()
    apart = (1 - (query * nearest).sum(-1)).clamp(min=0)
    return query + residual if context else residual, apart


def harmonic(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Harmonic mean of maps that are not negative; 0 where one of them is."""
    stack = torch.stack(list(values))
    found = len(stack) / (1 / stack.clamp(min=1e-12)).sum(0)
    return torch.where((stack <= 0).any(0), torch.zeros_like(found), found)


class Residual(nn.Module):
    """x + W2 relu(BN(W1 x)) over a quarter of the width, of unit length again; W2 starts at zero."""

    def __init__(self, dim: int):
        super().__init__()
        self.down, self.norm = nn.Linear(dim, dim // 4, bias=False), nn.BatchNorm1d(dim // 4)
        self.up = nn.Linear(dim // 4, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        changed = self.up(self.norm(self.down(rows)).relu())
        return F.normalize(rows + changed, dim=-1).view(x.shape)


class Adapters(nn.Module):
    """The three adapters: `words` (TA), `local` and `whole` (VA), and the query against references (PQ).

    Parameters
    ----------
    encoder : says the widths
    tokens : learned words of each state
    layers : how many layers are compared with references
    seed : of the start values
    """

    def __init__(self, encoder: Any, tokens: int, layers: int, seed: int):
        super().__init__()
        dim = encoder.dim
        self.words = StatePrompts(encoder, tokens, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.local, self.whole = Residual(dim), Residual(dim)
            self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in range(layers))
            self.decoder = nn.Sequential(  # one for all layers
                nn.Conv2d(dim, 128, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(128, 128, 2, 2), nn.ReLU(),
                nn.ConvTranspose2d(128, 128, 2, 2), nn.ReLU(), nn.Conv2d(128, 2, 1),
            )  # fmt: skip
            self.head = nn.Sequential(nn.Linear(dim, max(1, dim // 4)), nn.ReLU(), nn.Linear(max(1, dim // 4), 2))

    def query(self, fused: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused features (n, h, w, dim) of every layer to maps (n, 4 h, 4 w) and image probabilities (n,)."""
        maps, images = [], []
        for norm, features in zip(self.norms, fused, strict=True):
            x = norm(features.permute(0, 3, 1, 2))
            maps.append(self.decoder(x))
            cells = x.flatten(2)
            top = cells.topk(min(10, cells.shape[2]), dim=2).values.mean(2)
            images.append(self.head((cells.mean(2) + top) / 2))
        heat, image = torch.stack(maps).mean(0).softmax(1)[:, 1], torch.stack(images).mean(0).softmax(1)[:, 1]
        return heat, image
