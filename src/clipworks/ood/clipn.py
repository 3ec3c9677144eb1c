"""CLIPN: a second text tower that says "no", so that an image can be refused by every class name.

Claim: taught once on web captions, a copy of the text tower with learnable prompts stands for "this is not ..."; any
list of classes then rejects unknown images without a threshold (ImageNet against four sets, ViT-B/16: AUROC 93.1,
MCM 90.8 in the paper).

Formula: with yes features t, no features n and the scale s:
p_no_ij = exp(s <x_i, n_j>) / (exp(s <x_i, t_j>) + exp(s <x_i, n_j>))
CTW: j* = argmax_j p_j, score 1 - p_no_j*, unknown if p_no_j* > 1/2;   p = softmax(s <x, t>)
ATD: score sum_j p_j (1 - p_no_j), unknown if sum_j p_j p_no_j > max_j p_j (1 - p_no_j)
taught by L = (itbo + tso) / 2:  itbo = -mean_i log p_yes_ii - mean_{i != j} log p_no_ij;
tso = mean_i (2 - sqrt(2 - 2 <t_i, n_i> + 1e-4)).

Paper: Wang et al. 2023, CLIPN for Zero-Shot OOD Detection: Teaching CLIP to Say No.
Differs from the paper: the image tower is frozen, so its vectors are computed beforehand; a no prompt is drawn per
batch.
Defaults: 16 prompts of zeros over all positions, AdamW 3e-4 and weight decay 0.2 (release); the release trains on CC3M
with batches of 2,048. Without such training there is no CLIPN.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ClipworksError, check_choice, check_range
from ..losses.common import check_rows, similarities
from ..registry import method
from ..zeroshot.sentences import as_text, as_vectors, softmax
from .common import UNKNOWN

PROMPTS, EPS = 16, 1e-4
RULES = ("atd", "ctw")


@method(card="clipn", level="M")
class CLIPN:
    """Classify by words, or answer "none of these" where every class says no.

    Parameters
    ----------
    text : one vector per class, shape (C, dim), from the usual text tower
    no_text : one vector per class, shape (C, dim), of the "no" tower (`NoTower.texts`)
    rule : "atd" (agreeing to differ: all classes vote) or "ctw" (competing to win: the best class decides)
    scale : factor of the cosines (the encoder's `logit_scale`)
    names : optional class names; labels are then names, else positions, and -1 for unknown
    unknown : label of refused images, where names are given

    Inputs
    ------
    image vectors; nothing is fitted and no threshold is set

    Relations
    ---------
    With equal yes and no features every score is 1/2. `zeroshot.open_set` needs no second tower but a threshold.

    References
    ----------
    Wang et al. 2023, CLIPN for Zero-Shot OOD Detection: Teaching CLIP to Say No

    Examples
    --------
    >>> yes = np.eye(3)[:2]
    >>> judge = CLIPN(yes, -yes, names=["cat", "dog"], scale=10)
    >>> judge.predict([[1, 0.2, 0], [-0.2, -0.1, 1]])
    array(['cat', 'none of these'], dtype=object)
    """

    def __init__(
        self,
        text: Any,
        no_text: Any,
        *,
        rule: str = "atd",
        scale: float = 100.0,
        names: Sequence[str] | None = None,
        unknown: str = UNKNOWN,
    ):
        check_choice("rule", rule, RULES)
        check_range("scale", scale, 0)
        self.text = as_text(text, names)
        self.no_text = as_vectors("no_text", no_text, self.text.shape[1])
        if len(self.no_text) != len(self.text):
            raise ClipworksError(f"no_text must have one row per class ({len(self.text)}). Got {len(self.no_text)}.")
        self.rule, self.scale, self.names, self.unknown = rule, scale, names, unknown

    def probabilities(self, x: Any) -> np.ndarray:
        """Probability of every class and, last, of none of them by ATD; shape (n, C + 1), rows sum to 1."""
        p, no = self._shares(x)
        return np.concatenate([p * (1 - no), (p * no).sum(1, keepdims=True)], 1)

    def score_samples(self, x: Any) -> np.ndarray:
        """How surely each image is of one of the classes, by the rule; shape (n,)."""
        p, no = self._shares(x)
        if self.rule == "atd":
            return (p * (1 - no)).sum(1)
        return 1 - no[np.arange(len(no)), p.argmax(1)]

    def predict(self, x: Any) -> np.ndarray:
        """The best class of each image, or -1 (with names: `unknown`); shape (n,)."""
        p, no = self._shares(x)
        best = p.argmax(1)
        if self.rule == "atd":
            refused = (p * no).sum(1) > (p * (1 - no)).max(1)
        else:
            refused = no[np.arange(len(no)), best] > 0.5
        if self.names is None:
            return np.where(refused, -1, best)
        return np.where(refused, self.unknown, np.array(list(self.names), object)[best])

    def _shares(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """softmax over the classes, and the share of "no" for each; (n, C) both."""
        x = as_vectors("x", x, self.text.shape[1])
        yes, no = (self.scale * (x @ t.T).astype(np.float64) for t in (self.text, self.no_text))
        return softmax(yes), 1 / (1 + np.exp(np.clip(yes - no, -700, 700)))


class NoTower(nn.Module):
    """A copy of a text tower with learnable prompts that are added to the embeddings of all positions.

    Parameters
    ----------
    encoder : the `Encoder` whose text tower is copied; it stays as it is
    prompts : how many; one is drawn in training, their mean is used afterwards
    """

    def __init__(self, encoder: Any, prompts: int = PROMPTS):
        super().__init__()
        check_range("prompts", prompts, 1)
        self.text = copy.deepcopy(encoder.text)
        shape = (prompts, encoder.context_length, encoder.config.text.width)
        self.prompts = nn.Parameter(torch.zeros(shape, device=encoder.device))
        self._tokens = encoder.tokenize

    def forward(self, tokens: torch.Tensor, prompt: int | None = None) -> torch.Tensor:
        """Token ids (B, L) to unit rows (B, dim), with one prompt or the mean of all."""
        tokens = tokens.to(self.prompts.device)
        added = self.prompts.mean(0) if prompt is None else self.prompts[prompt]
        seams = {"eot": self.text.end(tokens)} if self.text.config.pool == "eot" else {}
        if self.text.config.mask_padding:
            seams["mask"] = tokens != self.text.config.pad_id
        found = self.text(embeddings=self.text.tokens(tokens) + added[: tokens.shape[1]], **seams)
        return F.normalize(found.float(), dim=-1)

    def texts(self, sentences: Sequence[str]) -> torch.Tensor:
        """Unit rows (n, dim) of sentences, so that `class_vectors(names, no_tower)` works."""
        with torch.inference_mode():
            return self(self._tokens(list(sentences))).cpu()


def itbo_loss(image: torch.Tensor, yes: torch.Tensor, no: torch.Tensor, scale: float) -> torch.Tensor:
    """Image-text binary opposition: an image's own "no" text is rejected, those of other captions are accepted.

    Parameters
    ----------
    image, yes, no : unit rows (n, dim), n at least 2; row i of all belongs together
    scale : factor of the cosines
    """
    check_rows(least=2, image=image, yes=yes, no=no)
    for_yes = similarities(image, yes, scale) - similarities(image, no, scale)
    own = torch.eye(len(image), dtype=torch.bool, device=image.device)
    return -F.logsigmoid(for_yes[own]).mean() - F.logsigmoid(-for_yes[~own]).mean()


def tso_loss(yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """Text semantic opposition: 2 less the distance of the unit rows yes and no (n, dim), on average."""
    check_rows(yes=yes, no=no)
    return (2 - (2 - 2 * (yes * no).sum(1) + EPS).sqrt()).mean()


def teach_no(
    encoder: Any,
    image: torch.Tensor,
    captions: Sequence[str] | torch.Tensor,
    *,
    prompts: int = PROMPTS,
    epochs: int = 10,
    batch_size: int = 512,
    lr: float = 3e-4,
    weight_decay: float = 0.2,
    seed: int = 0,
) -> NoTower:
    """Teach a "no" tower on image-caption pairs; the encoder stays as it is.

    Parameters
    ----------
    encoder : an `Encoder`
    image : vectors of the images (n, dim) by this encoder
    captions : n captions, or their token ids (n, L)
    prompts : how many no prompts
    epochs, batch_size, lr, weight_decay : of AdamW; the last, smaller batch of a pass is left out
    seed : of the order and of the prompts drawn

    Returns
    -------
    NoTower, ready for use
    """
    if len(image) != len(captions) or len(image) < 2:
        raise ClipworksError(f"image and captions must be as many, at least 2. Got {len(image)} and {len(captions)}.")
    tower = NoTower(encoder, prompts)
    tokens = captions if isinstance(captions, torch.Tensor) else encoder.tokenize(list(captions))
    image = F.normalize(image.float(), dim=1).to(encoder.device)
    size, scale = min(batch_size, len(image)), encoder.logit_scale
    with torch.no_grad():
        yes = torch.cat([encoder.encode_text(part) for part in tokens.split(256)])
    optimizer = torch.optim.AdamW(tower.parameters(), lr=lr, weight_decay=weight_decay)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(image), generator=draw).split(size):
            if len(rows) < size:
                continue
            no = tower(tokens[rows], int(torch.randint(prompts, (1,), generator=draw)))
            loss = (itbo_loss(image[rows], yes[rows], no, scale) + tso_loss(yes[rows], no)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return tower.eval()
