"""GenCLIP: learned words for "good" and "damaged" that hold for any thing, enriched by what each image shows.

Claim: general query prompts learned on the defects of some things serve for others; visual features of several layers
as further prompts, and a branch without them or the name, steady them where CLIP does not know the name.

Formula: query-only branch  t^q = text([g_s] state "object");  vision branch  t^v = text([g_s, A_1 x_1 ... A_L x_L]
state name), x_l the mean patch of layer l;  M_l = softmax(<z_l, t> / 0.07)_bad;  map = mean over layers and branches;
score = (mean of both branches for the image vector + max of the map) / 2;
loss per layer focal + Dice(bad) + Dice(good), and CE of the image; both branches are supervised.
Name filter: "object" stands for a name where <image, "a photo of a name"> <= <image, "a photo of an object">.

Paper: Kim et al. 2025, GenCLIP: Generalizing CLIP Prompts for Zero-shot Anomaly Detection.
Differs from the paper: this is a reading of it. No code is public; wording of the prompts, injection by concatenation,
the filter's rule and all numbers are the conventions of the code bases that it names, not confirmed.
Defaults: 12 tokens, 15 epochs, batches of 8, Adam at 1e-3 (AnomalyCLIP's).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..encoders.layers import layer_index
from ..errors import ClipworksError, check_range
from ..registry import method
from .adapters import StatePrompts, check_training, map_loss, spread_layers, states, train
from .detector import AnomalyDetector

STATES, OBJECT = ("good {}", "damaged {}"), "object"


@method(card="genclip", level="M")
class GenCLIP(AnomalyDetector):
    """Find defects by words that were learned on other things.

    Parameters
    ----------
    encoder : an `Encoder` with an image transformer, a model's name or path; None for the bundled one
    name : what the images show, in words
    layers : blocks whose patches are compared with the words (default: four at equal steps)
    tokens : learned words of each state
    vision : share of the vision branch in maps and scores, in [0, 1]
    keep_names : True uses the name always, False never, None where the image is closer to it than to "object"
    epochs, batch_size, lr : of the training
    image_size : side in pixels to which images are squeezed (default: the encoder's)
    rate : share of good images that may be called defective, where good ones are given
    seed : of start values and order

    Attributes
    ----------
    prompts_ : after `train`, the learned prompts

    Inputs
    ------
    `train`: images and masks of other things; `fit`: none; good images, where given, set the thresholds

    Relations
    ---------
    `AdaptCLIP` learns words without images in them, and adapts the images too. With `vision=0` the texts are the same
    for all images and names.

    References
    ----------
    Kim et al. 2025, GenCLIP: Generalizing CLIP Prompts for Zero-shot Anomaly Detection

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> images = torch.arange(16.0).expand(4, 3, 16, 16) * torch.linspace(0.9, 1.1, 4)[:, None, None, None]
    >>> detector = GenCLIP(toy_encoder(), tokens=2).fit(images)
    >>> detector.score_map(images[0]).heat.shape
    (16, 16)
    """

    needs_images = False
    prompts_: Prompts

    def __init__(
        self,
        encoder: Any = None,
        *,
        name: str = OBJECT,
        layers: Sequence[int] | None = None,
        tokens: int = 12,
        vision: float = 0.5,
        keep_names: bool | None = None,
        epochs: int = 15,
        batch_size: int = 8,
        lr: float = 1e-3,
        image_size: int | None = None,
        rate: float = 0.05,
        seed: int = 0,
    ):
        self.encoder = encoder
        self.name = name
        self.layers = layers
        self.tokens = tokens
        self.vision = vision
        self.keep_names = keep_names
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.image_size = image_size
        self.rate = rate
        self.seed = seed

    def train(self, images: Any, masks: Any) -> GenCLIP:
        """Learn the prompts on good and defective images of other things (under `name`), then call `fit`.

        Parameters
        ----------
        images : as for `fit`
        masks : (n, H, W), not zero where there is a defect
        """
        self._open()
        self._prepare()
        described = self._many(images)
        masks = check_training(len(described["image"]), masks)
        label = masks.flatten(1).amax(1)
        small = F.adaptive_max_pool2d(masks[:, None], described["layer0"].shape[1:3])[:, 0]
        found = self._fresh()

        def loss(rows: torch.Tensor) -> torch.Tensor:
            part = {name: value[rows] for name, value in described.items()}
            total = torch.zeros(())
            for text in (self._query(found), self._vision(found, part)):
                total = total + F.binary_cross_entropy(states(part["image"], text), label[rows])
                for layer in range(len(self._chosen)):
                    total = total + map_loss(states(part[f"layer{layer}"], text), small[rows])
            return total

        self.history_ = train(found, loss, len(label), epochs=self.epochs, batch_size=self.batch_size, lr=self.lr,
                              seed=self.seed)  # fmt: skip
        self.prompts_ = found
        return self

    def _prepare(self) -> None:
        check_range("vision", self.vision, 0, 1)
        if not isinstance(self.name, str) or not self.name.strip():
            raise ClipworksError(f"name must be the object in words. Got {self.name!r}.")
        blocks = getattr(self._model.visual, "blocks", None)
        if blocks is None:
            raise ClipworksError("encoder must have an image transformer. Got a ResNet.")
        chosen = spread_layers(len(blocks)) if self.layers is None else self.layers
        self._chosen = [layer_index("layers", layer, len(blocks)) for layer in chosen]

    def _fresh(self) -> Prompts:
        return Prompts(self._model, self.tokens, len(self._chosen), self.seed)

    def _begin(self) -> None:
        self._prepare()
        if not hasattr(self, "prompts_"):
            self.prompts_ = self._fresh().eval()

    def _describe(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        tower = self._model.visual
        embedded = tower.stem(pixels)
        output = tower.run(embeddings=embedded, output_layers=self._chosen)
        cells = embedded.flatten(2).transpose(1, 2)
        found = {"image": F.normalize(output.pooled.float(), dim=-1)}
        for number, layer in enumerate(self._chosen):
            patches = tower.project(output.layers[layer][:, output.prefix :], cells)
            found[f"layer{number}"] = F.normalize(patches.float(), dim=-1).unflatten(1, output.grid)
        names = [f"a photo of a {self.name}", f"a photo of an {OBJECT}"]
        closer = found["image"] @ self._model.texts(names).to(found["image"]).T
        named = closer[:, 0] > closer[:, 1] if self.keep_names is None else torch.full((len(pixels),), self.keep_names)
        return found | {"named": named}

    def _query(self, prompts: Prompts) -> torch.Tensor:
        """Texts (2, dim) of the query-only branch."""
        return prompts.states(self._model, [s.replace("{}", OBJECT) for s in STATES])

    def _vision(self, prompts: Prompts, described: dict[str, torch.Tensor]) -> torch.Tensor:
        """Texts (n, 2, dim) of the vision branch; images whose name is filtered out get "object"."""
        extra = prompts.seen([described[f"layer{i}"].mean((1, 2)) for i in range(len(self._chosen))])
        named = described["named"]
        texts = [prompts.states(self._model, [s.replace("{}", name) for s in STATES], extra)
                 for name in (OBJECT, self.name)]  # fmt: skip
        return torch.where(named[:, None, None], texts[1], texts[0])

    def _judge(self, described: dict[str, torch.Tensor], without: int | None) -> tuple[torch.Tensor, Any]:
        with torch.no_grad():
            branches = [(1 - self.vision, self._query(self.prompts_)),
                        (self.vision, self._vision(self.prompts_, described))]  # fmt: skip
            layers = [described[f"layer{i}"] for i in range(len(self._chosen))]
            heats = [share * torch.stack([states(z, text) for z in layers]).mean(0) for share, text in branches]
            heat = torch.stack(heats).sum(0)
            whole = torch.stack([share * states(described["image"], text) for share, text in branches]).sum(0)
            return heat, ((whole + heat.amax((1, 2))) / 2).numpy()


class Prompts(nn.Module):
    """The learned words of both states, and a linear map per layer from image features to words.

    Parameters
    ----------
    encoder : says the widths
    tokens : learned words of each state
    layers : how many layers give a word
    seed : of the start values
    """

    def __init__(self, encoder: Any, tokens: int, layers: int, seed: int):
        super().__init__()
        self.states = StatePrompts(encoder, tokens, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.maps = nn.ModuleList(nn.Linear(encoder.dim, encoder.config.text.width) for _ in range(layers))

    def seen(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Image features (n, dim) of every layer as words (n, layers, width)."""
        return torch.stack([0.02 * m(x) for m, x in zip(self.maps, features, strict=True)], 1)
