"""IP-CLIP: prompts made from an image's style and content that serve on authorised domains and fail on others.

Claim: only prompts are learned, and they classify well on the authorised domain and deliberately badly on unauthorised
ones, in a better balance than earlier protections (Office-31, Office-Home, Mini-DomainNet; abstract).

Formula: with mean mu_l and deviation s_l of the tokens after block l:  d_l = U_l D_l (mu_l + s_l) / 2,
e = combine over l of C_l mu_l;  the sentence of class c is [start] d_1 .. d_L d_1 .. d_L e e e e [name c] . [end].
F of authorised images is changed by a fixed random attention A over the class means of the most confident images of
either domain:  F_b = norm(F + post(softmax(q_F k_b^T / 10) v_b)).  With the cross entropies CE of authorised images,
CE_o of others, CE_A of F_A with the prompts of authorised and CE_O of F_O with those of other images, [.] at most 5:
L = CE - [CE_o] - [CE_O] + l0 CE_A - l1 [MSE(d, d_o)] + l2 ENT - l3 KL(softmax_c t_o || softmax_c t).

Paper: Wang, Wang, Fu and Zhang 2025, Vision-Language Model IP Protection via Prompt-based Learning (CVPR).
Differs from the paper: the banks are built by zero-shot CLIP with one sentence; a class with fewer than K entries has
the mean of those it has. The order of the attention's channels is another (they are random). CE_A is bounded only
where l0 is negative. Style changes for unknown domains are colour, grey, blur and crops of each image; the rate follows
CoOp's schedule. Statistics include the class token. Other defaults are the released code's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_choice, check_range
from ..registry import method
from ..training.augment import Augment
from .common import Learned, PromptMethod
from .kept import Kept
from .parts import layer_statistics, linear_start, need_tokens
from .words import class_sentences

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

HIDDEN, CONTENT = 256, 4  # width between the two style maps, and how often the content token stands
LIMIT = 5.0  # of what is maximised, or it would grow without end
SHARPNESS = 0.1  # of the attention


class Weights(NamedTuple):
    """Of the terms besides the cross entropies of either domain."""

    enhanced: float
    style: float
    entropy: float
    text: float


SCENARIOS = {"specified": Weights(-1.0, 0.1, 0.01, 1.0), "free": Weights(1.0, 5.0, 1.0, 5.0)}


@method(card="ip-clip", level="MR")
class IPCLIP(PromptMethod):
    """Learn prompts that work on one domain and fail on another.

    Parameters
    ----------
    names : C class names in the order of the labels; default: the labels themselves, sorted
    encoder : encoder with a transformer for images, or its name or path; default: the bundled one
    scenario : weights of the losses: "specified" for a domain that is known (or marked images, to prove ownership),
        "free" for all domains but one's own; "auto" is the first where `fit` is given other images
    bank_size : most confident images per class and domain that the attention sees
    epochs : passes over the images
    lr : highest learning rate, of Adam with weight decay 5e-4; cosine, first epoch at 1e-5
    batch_size : images per step, and as many of the other domain
    views : of each image where no others are given: the image itself, and changed ones that stand for other domains
    chunk : classes encoded at a time (no effect on the result); default: as many as 0.7 GB hold with ViT-B
    seed : of the start, the attention, the order and the views

    Attributes
    ----------
    learned_ : per block "style.l.down" (256, channels), "style.l.up" (width, 256) and "content.l" (width, channels);
        "combine" (1, blocks); each ".weight" and ".bias"
    classes_, names_, losses_ : labels, class names, the loss of every step

    Inputs
    ------
    images with labels, and images of the same classes from a domain that is not to be served; vectors are not enough,
    since all layers of the image tower are looked at

    Relations
    ---------
    `gopro` makes a shift of a learned context from the same statistics, here they are the context. What is protected
    is the prompt: plain zero-shot CLIP stays as good as it is on every domain.

    References
    ----------
    Wang et al. 2025, Vision-Language Model IP Protection via Prompt-based Learning

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels, y = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), [0, 0, 0, 1, 1, 1]
    >>> method = IPCLIP(["cat", "dog"], encoder=toy_encoder(tokenizer=CLIPTokenizer()), epochs=2)
    >>> method.fit(pixels, y, other=1 - pixels, other_y=y).predict(pixels).shape
    (6,)
    """

    keeps = "own"
    per_image = True
    crops: ClassVar[Augment] = Augment(
        scale=(0.5, 1.0), flip=0.5, jitter=(0.8, 0.8, 0.8, 0.5), jitter_p=1.0, grey=0.2, blur=0.5
    )

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        scenario: str = "auto",
        bank_size: int = 5,
        epochs: int = 50,
        lr: float = 0.01,
        batch_size: int = 8,
        views: int = 2,
        chunk: int | None = None,
        seed: int = 0,
    ):
        self.names, self.encoder, self.scenario, self.bank_size = names, encoder, scenario, bank_size
        self.epochs, self.lr, self.batch_size, self.views, self.chunk = epochs, lr, batch_size, views, chunk
        self.seed = seed

    def fit(
        self,
        images: Any,
        y: Any,
        *,
        other: Any = None,
        other_y: Any = None,
        names: Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> IPCLIP:
        """Learn from images that are to be served and from others that are not.

        Parameters
        ----------
        images, y, names, progress : as for every method of this room
        other, other_y : images of the same classes from the unauthorised domain, and their labels; left out, changed
            views of `images` take their place

        Raises
        ------
        ClipworksError
            If an image cannot be used, or labels, names and images do not belong together.
        """
        check_choice("scenario", self.scenario, ("auto", *SCENARIOS))
        check_range("bank_size", self.bank_size, 1)
        if (other is None) != (other_y is None):
            raise ClipworksError("other and other_y must be given together. Got one of them.")
        given = None if other is None else self._kept(other, 1)
        kept = self._kept(images, self.views if given is None else 1)
        if given is None and kept.views < 2:
            raise ClipworksError(f"views must be at least 2 where no other images are given. Got {kept.views}.")
        self._other, self._other_y = given, other_y
        self._weights = SCENARIOS[("specified" if given else "free") if self.scenario == "auto" else self.scenario]
        return super().fit(kept, y, names=names, progress=progress)

    def start(self, encoder: Encoder) -> Learned:
        """Two style maps and a content map per block, and the combination of the contents."""
        need_tokens("IP-CLIP", encoder)
        vision, width = encoder.config.vision, encoder.config.text.width
        p: Learned = {}
        for layer in range(vision.depth):
            p |= linear_start(f"style.{layer}.down", HIDDEN, vision.width, self.seed + 1 + layer)
            p |= linear_start(f"style.{layer}.up", width, HIDDEN, self.seed + 1001 + layer)
            p |= linear_start(f"content.{layer}", width, vision.width, self.seed + 2001 + layer)
        return p | linear_start("combine", 1, vision.depth, self.seed + 3001)

    def ready(self, encoder: Encoder) -> None:
        self._sentences = class_sentences(encoder, self.names_, 2 * encoder.config.vision.depth + CONTENT)

    def look(self, encoder: Encoder, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The image's vector, and mean and deviation over the tokens after every block, (B, blocks, channels)."""
        need_tokens("IP-CLIP", encoder)
        return layer_statistics(encoder, pixels)

    def draw(self, kept: Kept, rows: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """These images and as many others, one after the other: 2B rows; and the others' class numbers (B,)."""
        device, plain = self.model.device, np.zeros(len(rows), int)
        own = kept.take(rows, plain, device)
        if self._other is None:
            other, y = kept.take(rows, rng.integers(1, kept.views, size=len(rows)), device), self._own_numbers[rows]
        else:
            chosen = rng.choice(len(self._other), len(rows), replace=len(self._other) < len(rows))
            other, y = self._other.take(chosen, plain, device), self._other_numbers[chosen]
        both = {name: torch.cat([value, other[name]]) for name, value in own.items()}
        return {**both, "other_y": torch.from_numpy(y).to(device)}

    def step_tokens(self, batch: int) -> int:
        return super().step_tokens(2 * batch)

    def optimizer(self, p: Learned) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(p.values(), lr=self.lr, weight_decay=self.weight_decay)

    def domain(self, p: Learned, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """One token per block from its style, (B, blocks, width)."""
        found = []
        for layer, style in enumerate(((x["mean"] + x["deviation"]) / 2).unbind(1)):
            hidden = F.linear(style, p[f"style.{layer}.down.weight"], p[f"style.{layer}.down.bias"])
            found.append(F.linear(hidden, p[f"style.{layer}.up.weight"], p[f"style.{layer}.up.bias"]))
        return torch.stack(found, 1)

    def context(self, p: Learned, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """What stands before the names, (B, 2 blocks + 4, width): domain tokens twice, the content token four times."""
        domain = self.domain(p, x)
        means = enumerate(x["mean"].unbind(1))
        parts = [F.linear(mean, p[f"content.{layer}.weight"], p[f"content.{layer}.bias"]) for layer, mean in means]
        content = F.linear(torch.stack(parts, -1), p["combine.weight"], p["combine.bias"])[..., 0]
        return torch.cat([domain, domain, content[:, None].expand(-1, CONTENT, -1)], 1)

    def texts(self, p: Learned, x: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """The sentences of these classes behind the context of every image: (c, B, dim)."""
        return self._sentences.encode(self.context(p, x), rows).transpose(0, 1)

    def loss(
        self, p: Learned, x: dict[str, torch.Tensor], y: torch.Tensor, images: torch.Tensor, texts: torch.Tensor
    ) -> torch.Tensor:
        """Good on these images, bad on the others; see the formula."""
        (image, other), (own, strange), w = images.chunk(2), texts.chunk(2, dim=1), self._weights
        logits = self.scores(other, strange)
        near, far = (attended(self._attention, image, bank) for bank in self._banks)
        enhanced = F.cross_entropy(self.scores(near, own), y)
        domain, foreign = self.domain(p, x).chunk(2)
        value = F.cross_entropy(self.scores(image, own), y) - bounded(F.cross_entropy(logits, x["other_y"]))
        value = value + w.enhanced * (enhanced if w.enhanced > 0 else bounded(enhanced))
        value = (
            value
            - bounded(F.cross_entropy(self.scores(far, strange), y))
            - w.style * bounded(F.mse_loss(domain, foreign))
        )
        return value + w.entropy * batch_entropy(logits) - w.text * divergence(own, strange)

    def _train(self, p: Learned, kept: Kept, y: torch.Tensor, progress: bool | None) -> list[float]:
        """Build the banks and the attention, then learn."""
        vectors, self._own_numbers = kept.tensors["image"], y.numpy()
        others = vectors[:, 1:] if self._other is None else self._other.tensors["image"]
        if self._other is not None:
            self._other_numbers = self._numbers(self._other_y, "other_y")
            if len(self._other_numbers) != len(others):
                raise ClipworksError(
                    f"other_y must hold one label per image ({len(others)}). Got {len(self._other_numbers)}."
                )
        words = self.model.texts([f"a photo of a {name.replace('_', ' ')}." for name in self.names_])
        self._banks = []
        for rows, labels in ((vectors[:, 0], y), (others.flatten(0, 1), None)):
            bank = confident((self.model.logit_scale * rows @ words.T).softmax(1), labels, self.bank_size)
            means = [rows[chosen].mean(0) if len(chosen) else rows.new_zeros(rows.shape[1]) for chosen in bank]
            self._banks.append(torch.stack(means).to(self.model.device))
        self._attention = {k: v.to(self.model.device) for k, v in attention(self.model.dim, self.seed).items()}
        try:
            return super()._train(p, kept, y, progress)
        finally:
            self._other = self._other_y = None


def confident(probabilities: torch.Tensor, labels: torch.Tensor | None, size: int) -> list[torch.Tensor]:
    """Rows of the `size` most confident of those predicted as each class (n, C), the right ones if labels are given.

    >>> confident(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]]), torch.tensor([0, 0, 1]), 1)
    [tensor([0]), tensor([], dtype=torch.int64)]
    """
    best = probabilities.max(1)
    fit = torch.ones_like(best.indices, dtype=torch.bool) if labels is None else best.indices == labels
    found = []
    for number in range(probabilities.shape[1]):
        rows = torch.nonzero(fit & (best.indices == number))[:, 0]
        found.append(rows[best.values[rows].argsort(descending=True, stable=True)[:size]])
    return found


def attention(dim: int, seed: int) -> dict[str, torch.Tensor]:
    """The random layers of the attention, which are never learned."""
    hidden = max(1, dim // 8)
    shapes = {"first": (hidden, dim), "second": (hidden, hidden), "qkv": (3 * dim, hidden), "post": (dim, dim)}
    layers: dict[str, torch.Tensor] = {}
    for number, (name, (out, width)) in enumerate(shapes.items()):
        layers |= linear_start(name, out, width, seed + 4001 + number)
    return layers


def attended(layers: dict[str, torch.Tensor], images: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Unit vectors (B, d) of images (B, d) with what they attend to among the class means (C, d) of a bank."""

    def linear(name: str, rows: torch.Tensor) -> torch.Tensor:
        return F.linear(rows, layers[f"{name}.weight"], layers[f"{name}.bias"])

    def projected(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for name in ("first", "second"):  # batch normalisation by the batch's own statistics
            rows = linear(name, rows)
            rows = ((rows - rows.mean(0)) * torch.rsqrt(rows.var(0, correction=0) + 1e-5)).relu()
        return linear("qkv", rows).chunk(3, dim=-1)

    (q, _, _), (_, k, v) = projected(images), projected(bank)
    return F.normalize(images + linear("post", (SHARPNESS * q @ k.T).softmax(-1) @ v), dim=-1)


def bounded(loss: torch.Tensor) -> torch.Tensor:
    """A loss that is maximised, without gradient above its limit."""
    return loss.clamp(max=LIMIT)


def batch_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Mean over images of the entropy of their probabilities (B, C), each class made length 1 over the batch first."""
    shares = F.normalize(logits.softmax(1), dim=0)
    return -(shares * (shares + 1e-8).log()).sum(1).mean()


def divergence(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(other || own) of class vectors (C, B, dim), softmax over classes; summed over dimensions, mean over images."""
    return F.kl_div(own.log_softmax(0), other.log_softmax(0), log_target=True, reduction="sum") / own.shape[1]


def protection(own: float, own_before: float, other: float, other_before: float) -> float:
    """What is gained: accuracy at home times (points lost elsewhere less points lost at home); shares in [0, 1].

    >>> round(protection(0.9, 0.92, 0.2, 0.7), 3)
    0.432
    """
    return own * ((other_before - other) - (own_before - own))
