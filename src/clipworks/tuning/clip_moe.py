"""CLIP-MoE: a dense CLIP becomes a mixture of experts, whose feed-forward parts were taught what earlier ones ignore.

Claim: copies of one CLIP, each fine-tuned on batches whose samples look alike to the copies before, learn different
features; as experts under a router they are better than the dense model in retrieval, classification and as the eye of
a language model, and than fine-tuning it directly (reported without a table in the abstract).

Formula: y = x + sum over the k likeliest e of w_e FFN_e(LN x), p = softmax(W LN x), w = p of these k, summing to 1.
Experts: cluster numbers c <- K^2 c + K l_text + l_image by k-means on the rows of the model before; the next one learns
InfoNCE within one cluster per batch, feed-forward parts only. Router: InfoNCE + b (bal_image + bal_text / 2),
bal = E sum_{r, e} f_{r, e} P_e, f the share of tokens whose r-th choice is e, P the mean of p.

Paper: Zhang et al. 2024, CLIP-MoE: Towards Building Mixture of Experts for CLIP with Diversified Multiplet Upcycling
(EMNLP 2025).
Differs from the paper: clusters below a batch are pooled with those of the same earlier cluster (`small="merge"`), as
small sets would lose most of their samples; "skip" leaves them out, as the release does. The logit scale stays. Every
expert starts from the dense model; whether the release goes on from the expert before is not confirmed (`begin`). The
balance is divided by nothing further where several processes average their gradients.
Defaults: 4 experts, 2 of them per token, 3 x 3 clusters, smoothing 0.1, lr 1e-5, weight decay 0.2, one epoch; routers
lr 1e-6, weight decay 0.01, 200 steps of warm-up, one epoch, b 0.01, dropout 0.1; batch 800: released code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data.item import Item
from ..encoders.encoder import Encoder
from ..encoders.experts import Experts, balance, one_expert, parts, recorded
from ..encoders.layers import MLP, swap
from ..errors import ClipworksError, check_choice, check_range
from ..losses.infonce import infonce
from ..registry import method
from ..training.augment import Augment, resolve_augment
from ..training.clusters import ClusterOrder, batches_from
from ..training.recipe import ContrastiveRecipe, contrast
from .common import TEMPLATE, Tuned, Tuner, linears, only, run
from .long_clip import first_sentence
from .shots import Shots


@method(card="clip-moe", level="M")
class CLIPMoE(Tuner):
    """Put several diversified feed-forward experts and a router in the place of every feed-forward part.

    Parameters
    ----------
    names : class names; what is predicted, and what labels may be given as
    encoder : encoder, or its name or path; default: the bundled one
    experts : experts per block; the first is the encoder's own feed-forward part
    top_k : experts that a token goes through
    towers : "both", "vision" or "text"
    length : tokens that texts may have, by a stretched table as in `long_clip`; None: as the encoder has it
    clusters : of k-means on the images and, apart, on the texts, in every stage
    small : clusters below a batch: "merge" with those of the same earlier cluster, or "skip"
    begin : what the next expert starts from: the "base" or the "previous" model
    smoothing : of the labels of the experts' contrast
    short_weight : of the contrast with first sentences, for the routers
    balance_weight : of the routers' balance
    dropout : inside the experts, while the routers learn
    templates : sentences around the names
    lr, weight_decay, epochs : AdamW and passes of every expert after the first
    router_lr, router_decay, router_epochs : the same of the routers
    warmup : steps of warm-up of the routers, or below 1 their share
    batch_size : pairs per step
    augment : views: "none", "light", "crop" (8 % and more, flip), "standard", "strong"
    seed : of routers, clusters, order, views and dropout

    Attributes
    ----------
    encoder_, classes_, classifier_, alpha_, losses_ : see `common.Tuner`
    kept_ : share of the pairs that each stage could use

    Inputs
    ------
    images with captions; or labelled images, each with a sentence about its class that is drawn once

    Relations
    ---------
    With one expert, or several that are alike, it is the dense encoder, whatever the routers say. It cannot be folded
    into a dense encoder: `encoder_` is the result, and `save` writes what changed.

    References
    ----------
    Zhang et al. 2024, CLIP-MoE: Towards Building Mixture of Experts for CLIP with Diversified Multiplet Upcycling

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> tuner = CLIPMoE(["cat", "dog"], encoder=toy_encoder(tokenizer=CLIPTokenizer()), experts=2)
    >>> tuner.fit(pixels, ["a cat on a mat", "a cat", "a dog", "two dogs"]).predict(pixels).shape
    (4,)
    """

    pairs, merges = True, False
    frozen = only("*.mlp.router.weight", "*.mlp.experts.[!0]*")
    kept_: list[float]

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        experts: int = 4,
        top_k: int = 2,
        towers: str = "both",
        length: int | None = None,
        clusters: int = 3,
        small: str = "merge",
        begin: str = "base",
        smoothing: float = 0.1,
        short_weight: float = 0.0,
        balance_weight: float = 0.01,
        dropout: float = 0.1,
        templates: str | Sequence[str] = TEMPLATE,
        lr: float = 1e-5,
        weight_decay: float = 0.2,
        epochs: int = 1,
        router_lr: float = 1e-6,
        router_decay: float = 0.01,
        router_epochs: int = 1,
        warmup: float = 200,
        batch_size: int = 800,
        augment: str = "none",
        seed: int = 0,
    ):
        self.names, self.encoder, self.experts, self.top_k, self.towers = names, encoder, experts, top_k, towers
        self.length, self.clusters, self.small, self.begin = length, clusters, small, begin
        self.smoothing, self.short_weight, self.balance_weight = smoothing, short_weight, balance_weight
        self.dropout, self.templates, self.lr, self.weight_decay = dropout, templates, lr, weight_decay
        self.epochs, self.router_lr, self.router_decay = epochs, router_lr, router_decay
        self.router_epochs = router_epochs
        self.warmup, self.batch_size, self.augment, self.seed = warmup, batch_size, augment, seed

    def _shape(self, encoder: Encoder) -> None:
        check_range("experts", self.experts, 1, 16)
        check_range("top_k", self.top_k, 1, self.experts)
        check_range("dropout", self.dropout, 0, 1)
        if self.length is not None:
            encoder.resize(context_length=self.length)
        for path in linears(encoder, ["up"], self.towers):
            path = path.removesuffix(".up")
            part = encoder.get_submodule(path)
            if not isinstance(part, MLP):
                raise ClipworksError(f"encoder must be dense. Got one with {type(part).__name__} at {path}.")
            swap(encoder, path, Experts(part, self.experts, self.top_k, self.dropout))

    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        check_range("clusters", self.clusters, 1, 8)
        merge = check_choice("small", self.small, ("merge", "skip")) == "merge"
        from_base = check_choice("begin", self.begin, ("base", "previous")) == "base"
        items, augment = shots.captioned(self.templates, self.seed), resolve_augment(self.augment)
        batch, branches = min(self.batch_size, len(items)), self.clusters**2
        models, ids, self.kept_ = [one_expert(start, 0)], np.zeros(len(items), np.int64), []
        for stage in range(1, self.experts):
            ids = branches * ids + pseudo_labels(models[-1], items, self.clusters, self.seed + stage)
            groups = batches_from(ids, batch, branches if merge else None)
            self.kept_.append(sum(map(len, groups)) / len(items))
            recipe = ClusterRecipe(groups, self.smoothing, augment)
            models.append(run(
                models[0] if from_base else models[-1], items, recipe, freeze=only("*.blocks.*.mlp.*"), lr=self.lr,
                weight_decay=self.weight_decay, epochs=self.epochs, batch_size=self.batch_size,
                seed=self.seed + stage, progress=progress,
            ).encoder)  # fmt: skip
        routed = copy.deepcopy(start)
        for path, part in parts(routed):
            for expert, model in zip(part.experts, models, strict=True):
                expert.load_state_dict(model.get_submodule(path).state_dict())
        return run(
            routed, items, RouterRecipe(self.short_weight, self.balance_weight, augment),
            freeze=only("*.mlp.router.weight"), lr=self.router_lr, weight_decay=self.router_decay, warmup=self.warmup,
            epochs=self.router_epochs, batch_size=self.batch_size, seed=self.seed, progress=progress,
        )  # fmt: skip


class ClusterRecipe(ContrastiveRecipe):
    """InfoNCE on batches that come from one group of samples each.

    Parameters
    ----------
    groups : numbers of the samples of every group
    smoothing : of the labels
    augment : how views are drawn
    """

    def __init__(self, groups: Sequence[np.ndarray], smoothing: float, augment: Augment | None = None):
        super().__init__("infonce", augment, {"smoothing": smoothing})
        self.groups = tuple(groups)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "groups": [group.tolist() for group in self.groups]}

    def order(self, count: int, batch_size: int, seed: int) -> ClusterOrder:
        """Return the order that the loop takes in the place of its own."""
        return ClusterOrder(count, batch_size, seed, self.groups)


class RouterRecipe(ContrastiveRecipe):
    """InfoNCE, and routers that use all experts.

    Parameters
    ----------
    short_weight : of the contrast with first sentences
    balance_weight : of the balance
    augment : how views are drawn
    """

    split = False

    def __init__(self, short_weight: float, balance_weight: float, augment: Augment | None = None):
        super().__init__("infonce", augment)
        self.short_weight = check_range("short_weight", short_weight, 0)
        self.balance_weight = check_range("balance_weight", balance_weight, 0)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "short_weight": self.short_weight, "balance_weight": self.balance_weight}

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        found = super().batch(items, step, rng)
        if self.short_weight:
            found["short"] = self.bound.tokenize([first_sentence(item.caption or "") for item in items])
        return found

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the contrasts and the weighted balance."""
        scale = encoder.log_scale.exp().reshape(())
        with recorded(encoder.visual) as routes:
            image = encoder.encode_image(batch["pixels"])
        penalties, found = [balance(routes)] if routes else [], {}
        for name, key, weight in (("long", "tokens", 1.0), ("short", "short", self.short_weight)):
            if key in batch:
                with recorded(encoder.text) as routes:
                    text = encoder.encode_text(batch[key])
                pair = contrast(infonce, name, {"image": image, "text": text, "scale": scale})
                found[name] = weight * pair[name]
                penalties += [balance(routes) / 2] if routes else []
        return {**found, "balance": self.balance_weight * torch.stack(penalties).sum()}


def pseudo_labels(encoder: Encoder, items: Sequence[Item], clusters: int, seed: int) -> np.ndarray:
    """Return clusters * (cluster of the text) + (cluster of the image) of every pair, int64 (n,)."""
    from sklearn.cluster import MiniBatchKMeans

    images: Any = [item.image for item in items]
    images = torch.stack(images) if isinstance(images[0], torch.Tensor) else images
    sides = (encoder.texts([item.caption or "" for item in items]), encoder.images(images))
    count = min(clusters, len(items))
    text, image = (
        MiniBatchKMeans(count, tol=1e-5, max_iter=500, n_init=3, random_state=seed).fit_predict(rows.numpy())
        for rows in sides
    )
    return clusters * text.astype(np.int64) + image
