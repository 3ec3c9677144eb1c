"""MoCoOp: several learned contexts, one per group of hand-made templates, of which a router mixes two for each image.

Claim: prompts for different styles of images, held to what hand-made templates know, improve on CoOp and its successors
in few-shot learning, on new classes and on shifted domains (11 data sets; abstract).

Formula: t_g(c) of context g around the name, T_g(c) = norm(mean over the templates of group g of their unit vectors);
r = W x + b, pi = softmax over the two largest of r, 0 elsewhere;  s_c = scale * sum_g pi_g <x, norm(t_g(c) + w)>.
L = CE(s, y) + 5 L_text + L_router;  L_text = mean over g and c of CE over c' of (<t_g(c), T_g(c')>, c);
L_router = CE(r, softmax(h)), h_g = <x, T_g(y)> + 10 for the two largest.

Paper: Du, Niu and Zhao 2025, Mixture of Prompts Learning for Vision-Language Models (Frontiers in Artificial
Intelligence).
Differs from the paper: a reduced form as to the image tower, whose norms the release trains too at a tenth of the rate;
here it stays as it is, so that images are seen once. The text loss names the classes at hand alone, where the released
base-to-new runs use the new classes' names as well. Noise falls on a copy of T, where the release lets it pile up. By
default every template is a group (the release has lists and groups of its own per data set). Other defaults are the
released code's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_range
from ..registry import method
from ..training.schedule import learning_rate
from ..zeroshot.classifier import class_vectors
from ..zeroshot.templates import resolve_templates
from .common import WARM_LR, Learned, PromptMethod
from .kept import Kept
from .parts import linear_start
from .words import class_sentences, phrase, word_vectors

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

BOOST = 10.0  # what the two best groups get in the router's target
NOISY = 0.5  # share of the steps with noise


@method(card="mocoop", level="MR")
class MoCoOp(PromptMethod):
    """Learn a context per group of templates, and which of them suit an image.

    Parameters
    ----------
    names : C class names in the order of the labels; default: the labels themselves, sorted
    encoder : encoder, or its name or path; default: the bundled one
    templates : hand-made ones, group after group: name of a set, or several; words around `{}`
    groups : how many templates each group has, in their order; default: one
    active : contexts that are mixed for an image
    text_weight : of the loss that holds the contexts to their templates
    text_scale : scale of the cosines in that loss (1 in the paper, which makes it gentle)
    router_weight : of the loss that teaches the router which templates suit an image
    noise : deviation of what is added to the templates' vectors in every other step
    clip_norm : length to which a longer gradient is cut
    epochs : passes over the images
    warmup : epochs at the small first rate
    lr : highest learning rate, of SGD with momentum 0.9 and weight decay 5e-4; cosine after the warm-up
    batch_size : images per step
    views : of each image, kept from the beginning: the image itself and random crops, of which a step takes one
    chunk : classes encoded at a time (no effect on the result); default: as many as 0.7 GB hold with ViT-B
    seed : of the start, the order, the views and the noise

    Attributes
    ----------
    learned_ : "context.g" (words of the first template of group g, width); "router.weight" (G, d), "router.bias" (G,);
        "correction" (d,)
    classes_, names_, losses_ : labels, class names, the loss of every step

    Inputs
    ------
    images with labels, or their vectors from the same encoder: the image tower runs once

    Relations
    ---------
    With one group and correction 0 it is `coop` with the words of that template. `biomedcoop` is held to sentences by
    distance.

    References
    ----------
    Du, Niu and Zhao 2025, Mixture of Prompts Learning for Vision-Language Models

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> templates, model = ["a photo of a {}.", "a {} at night."], toy_encoder(tokenizer=CLIPTokenizer())
    >>> method = MoCoOp(["cat", "dog"], encoder=model, templates=templates, epochs=2)
    >>> method.fit(pixels, [0, 0, 0, 1, 1, 1]).predict(pixels).shape
    (6,)
    """

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        templates: str | Sequence[str] = "default",
        groups: Sequence[int] | None = None,
        active: int = 2,
        text_weight: float = 5.0,
        text_scale: float = 1.0,
        router_weight: float = 1.0,
        noise: float = 0.05,
        clip_norm: float = 1.0,
        epochs: int = 50,
        warmup: int = 5,
        lr: float = 0.032,
        batch_size: int = 32,
        views: int = 1,
        chunk: int | None = None,
        seed: int = 0,
    ):
        self.names, self.encoder, self.templates, self.groups, self.active = names, encoder, templates, groups, active
        self.text_weight, self.text_scale, self.router_weight = text_weight, text_scale, router_weight
        self.noise, self.clip_norm, self.warmup = noise, clip_norm, warmup
        self.epochs, self.lr, self.batch_size, self.views, self.chunk = epochs, lr, batch_size, views, chunk
        self.seed = seed

    def start(self, encoder: Encoder) -> Learned:
        """Contexts from the words of the first template of every group, a router, and a correction of 0."""
        for name in ("text_weight", "text_scale", "router_weight", "noise", "clip_norm", "warmup"):
            check_range(name, getattr(self, name), 0)
        check_range("active", self.active, 1)
        around = [_around(encoder, group[0]) for group in self._groups()]
        p = {f"context.{g}": word_vectors(encoder, before + after) for g, (before, after) in enumerate(around)}
        p |= linear_start("router", len(around), encoder.dim, self.seed + 1)
        return p | {"correction": torch.zeros(encoder.dim)}

    def ready(self, encoder: Encoder) -> None:
        self._layouts = []
        for group in self._groups():
            before, after = _around(encoder, group[0])
            self._layouts.append(class_sentences(encoder, self.names_, len(before) + len(after), len(before)))
        self._targets: torch.Tensor | None = None

    def targets(self) -> torch.Tensor:
        """T, the unit vectors (G, C, dim) of the groups of templates; computed when first asked for."""
        if self._targets is None:
            names = [name.replace("_", " ") for name in self.names_]
            ended = [[f"{template.rstrip('.')}." for template in group] for group in self._groups()]
            found = torch.stack([class_vectors(names, self.model, templates=group) for group in ended])
            self._targets = found.to(self.model.device)
        return self._targets

    def draw(self, kept: Kept, rows: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """One view of each image, and the templates' vectors of this step."""
        x, targets = super().draw(kept, rows, rng), self.targets()
        if self.noise and rng.random() < NOISY:
            drawn = torch.from_numpy(rng.standard_normal(tuple(targets.shape))).to(targets)
            targets = targets + self.noise * drawn
        return {**x, "targets": targets}

    def step_tokens(self, batch: int) -> int:
        return sum(layout.tokens_per_class() for layout in self._layouts)

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch: a small one for the first ones, then the cosine over all epochs."""
        warm = min(self.warmup, self.epochs - 1)
        return min(WARM_LR, self.lr) if epoch < warm else learning_rate(epoch - warm, lr=self.lr, total=self.epochs)

    def texts(self, p: Learned, x: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Class vectors of all contexts, as they are and corrected: (c, 2, G, dim)."""
        found = [layout.encode(p[f"context.{g}"][None], rows)[0] for g, layout in enumerate(self._layouts)]
        own = torch.stack(found, 1)
        return torch.stack([own, F.normalize(own + p["correction"], dim=-1)], 1)

    def images(self, p: Learned, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """The image's vector times the weight of each context, (B, G, dim): it is mixed here and not in the texts."""
        return self.weights(p, x["image"])[..., None] * x["image"][:, None]

    def weights(self, p: Learned, images: torch.Tensor) -> torch.Tensor:
        """Weights (B, G) of the contexts: 0 for all but the active ones, which share 1."""
        routed = _routed(p, images)
        best = routed.topk(min(self.active, routed.shape[1]))
        return torch.zeros_like(routed).scatter(1, best.indices, best.values.softmax(1))

    def scores(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of `images` and `texts`."""
        return self.model.logit_scale * images.flatten(1) @ texts[:, 1].flatten(1).T

    def loss(
        self, p: Learned, x: dict[str, torch.Tensor], y: torch.Tensor, images: torch.Tensor, texts: torch.Tensor
    ) -> torch.Tensor:
        """Cross entropy of the mixture, contexts held to their templates, router to the templates that suit."""
        value = F.cross_entropy(self.scores(images, texts), y)
        value = value + self.text_weight * text_loss(texts[:, 0], x["targets"], self.text_scale)
        wanted = router_target(x["image"], self.targets()[:, y], self.active)
        return value + self.router_weight * F.cross_entropy(_routed(p, x["image"]), wanted)

    def backward(self, p: Learned, x: dict[str, torch.Tensor], y: torch.Tensor) -> float:
        """Add the gradient of one batch to the learned tensors, cut to its length; returns the loss."""
        found = super().backward(p, x, y)
        torch.nn.utils.clip_grad_norm_(p.values(), self.clip_norm)
        return found

    def class_vectors(self) -> torch.Tensor:
        """Not here: every image mixes its own."""
        raise ClipworksError("MoCoOp has other class vectors for every image; call logits.")

    def _groups(self) -> list[list[str]]:
        """The templates of every group."""
        templates = resolve_templates(self.templates)
        sizes = [1] * len(templates) if self.groups is None else list(self.groups)
        if sum(sizes) != len(templates) or min(sizes, default=0) < 1:
            raise ClipworksError(f"groups must share out the {len(templates)} templates. Got {sizes}.")
        return [templates[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def text_loss(own: torch.Tensor, targets: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Mean cross entropy by which the vectors (C, G, dim) of each context name their class among targets (G, C, dim).

    >>> bool(text_loss(torch.eye(3)[:, None], torch.eye(3)[None]).isclose(torch.tensor(1 + 2 / torch.e).log()))
    True
    """
    cosines = torch.einsum("cgd,gkd->gck", own, targets).flatten(0, 1)
    return F.cross_entropy(scale * cosines, torch.arange(len(own), device=own.device).repeat(len(targets)))


def router_target(images: torch.Tensor, targets: torch.Tensor, active: int) -> torch.Tensor:
    """Shares (B, G) of the groups, nearly all for those whose vector (G, B, dim) of the image's class is nearest."""
    near = torch.einsum("bd,gbd->bg", images, targets)
    best = near.topk(min(active, near.shape[1])).indices
    return near.scatter_add(1, best, torch.full_like(near, BOOST)[:, : best.shape[1]]).softmax(1)


def _routed(p: Learned, images: torch.Tensor) -> torch.Tensor:
    return F.linear(images, p["router.weight"], p["router.bias"])


def _around(encoder: Encoder, template: str) -> tuple[list[int], list[int]]:
    """Token ids of a template's words before and after the name, without the full stop that ends every sentence."""
    before, after = template.rstrip(".").split("{}")
    return phrase(encoder, before), phrase(encoder, after)
