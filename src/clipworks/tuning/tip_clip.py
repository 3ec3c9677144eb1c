"""TIP-CLIP: how visual a text is, by its distance from one noise image that stands for all texts without a picture.

Claim: with texts that evoke no image matched to a common NULL image, the cosine to it tells which sentences deserve an
illustration (TIMED test, macro F1: CLIP .694, BERT .753, TIP-CLIP .865), and pictures are still found (MRR .989, .937).

Formula: I_i the image of text i, or the one row of NULL, a fixed random image that is encoded anew in every step;
L = InfoNCE(I, T) at a learned temperature;  S(t) = 1 - <I_null, T(t)>, visual where S > threshold.

Paper: Verma et al. 2023, Learning the Visualness of Text Using Large Vision-Language Models (EMNLP).
Differs from the paper: nothing in the arithmetic. Targets that spread evenly over the texts of NULL would change
nothing, as all of these have one image row: loss and gradient are the same, so there is no such option. `alpha`
(WiSE-FT) may keep part of what the start could retrieve.
Defaults: Adam, lr 5e-5, 5 epochs (then 2 on sentences that people have rated), threshold 0.79, mining above 0.35 and
below 0.18: paper, for ViT-B/32. Batch 128, which is not stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from ..data.item import Item
from ..encoders.encoder import Encoder
from ..errors import ClipworksError
from ..metrics.detection import check_scores
from ..progress import Progress
from ..registry import method
from ..training.augment import Augment, resolve_augment
from ..training.recipe import ContrastiveRecipe
from .common import TEMPLATE, Tuned, Tuner, run
from .shots import Shots

NULL, UNSURE = -1, -2  # in the place of an image's number, see `mine`


@method(card="tip-clip", level="MR")
class TIPCLIP(Tuner):
    """Fine-tune both towers so that texts without a picture meet one noise image, and score how visual texts are.

    Parameters
    ----------
    names : class names; what is predicted, and what labels may be given as
    encoder : encoder, or its name or path; default: the bundled one. That of an earlier fit (`encoder_`) keeps its NULL
    non_visual : texts without a picture, or a text file with one per line
    threshold : of `is_visual`; it belongs to a model and its NULL, see `best_threshold`
    templates : sentences around the names
    lr : of Adam, constant
    epochs : passes over pairs and texts
    batch_size : pairs and texts per step
    augment : views: "none", "light", "crop" (8 % and more, flip), "standard", "strong"
    alpha : share of the change that is kept; None: chosen on `validation`
    seed : of NULL, order and views

    Attributes
    ----------
    encoder_, classes_, classifier_, alpha_, losses_ : see `common.Tuner`; `encoder_.null` are NULL's pixels

    Inputs
    ------
    images with their texts, and texts without a picture

    Relations
    ---------
    Without texts that have no picture it is CLIP's own fine-tuning, `flyp` on captions. `mine` draws both kinds from
    documents.

    References
    ----------
    Verma et al. 2023, Learning the Visualness of Text Using Large Vision-Language Models

    Examples
    --------
    >>> from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    >>> from clipworks.encoders.toy import toy_encoder
    >>> pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> tuner = TIPCLIP(["cat", "dog"], encoder=toy_encoder(tokenizer=CLIPTokenizer()), non_visual=["nevertheless"])
    >>> tuner.fit(pixels, ["a cat on a mat", "a cat", "a dog", "two dogs"]).visualness(["a cat", "however"]).shape
    (2,)
    """

    pairs = True
    frozen = ()  # the temperature learns too
    also_written = frozenset({"null"})

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        encoder: Any = None,
        non_visual: str | Sequence[str] = (),
        threshold: float = 0.79,
        templates: str | Sequence[str] = TEMPLATE,
        lr: float = 5e-5,
        epochs: int = 5,
        batch_size: int = 128,
        augment: str = "none",
        alpha: float | None = 1.0,
        seed: int = 0,
    ):
        self.names, self.encoder, self.non_visual, self.threshold = names, encoder, non_visual, threshold
        self.templates, self.lr, self.epochs, self.batch_size = templates, lr, epochs, batch_size
        self.augment, self.alpha, self.seed = augment, alpha, seed

    def visualness(self, texts: str | Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        """Return S of every text, (n,), in [0, 2]: 1 minus the cosine to NULL."""
        check_is_fitted(self, "encoder_")
        return visualness(texts, self.encoder_, batch_size=batch_size)

    def is_visual(self, texts: str | Sequence[str]) -> np.ndarray:
        """Return whether each text is above the threshold, (n,)."""
        return self.visualness(texts) > self.threshold

    def _shape(self, encoder: Encoder) -> None:
        add_null(encoder)

    def _merge(self, encoder: Encoder) -> None:
        del encoder.null

    def _train(self, start: Encoder, shots: Shots, progress: bool | None) -> Tuned:
        alone = [Item(f"null-{i}", caption=text) for i, text in enumerate(read_texts(self.non_visual))]
        recipe = NullRecipe(resolve_augment(self.augment))
        return run(
            start, [*shots.captioned(self.templates, self.seed), *alone], recipe, freeze=self.frozen, lr=self.lr,
            weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, schedule="constant", warmup=0, epochs=self.epochs,
            batch_size=self.batch_size, seed=self.seed, progress=progress,
        )  # fmt: skip


class NullRecipe(ContrastiveRecipe):
    """InfoNCE in which items without an image have the row of the encoder's NULL.

    Parameters
    ----------
    augment : how views of the images are drawn
    """

    split = False  # rows of images are fewer than those of texts

    def __init__(self, augment: Augment | None = None):
        super().__init__("infonce", augment)

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return NULL and the pixels of the images, which of these rows every item has, and the tokens."""
        draws = rng.spawn(len(items))
        seen = [i for i, item in enumerate(items) if item.image is not None]
        place = torch.zeros(len(items), dtype=torch.long)
        place[seen] = torch.arange(1, len(seen) + 1)
        pixels = null_pixels(self.bound)
        if seen:
            own = self.pixels([items[i] for i in seen], [draws[i] for i in seen])
            pixels = torch.cat([pixels.to(own), own])
        return {"pixels": pixels, "place": place, "tokens": self.bound.tokenize(self.texts(items, draws))}

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the contrast."""
        image = encoder.encode_image(batch["pixels"])[batch["place"]]
        text, scale = encoder.encode_text(batch["tokens"]), encoder.log_scale.exp().reshape(())
        return self.losses({"image": image, "text": text, "scale": scale})


def add_null(encoder: Encoder) -> None:
    """Give an encoder its NULL, random pixels of torch's generator, unless it has one: uint8 (H, W, 3)."""
    if not hasattr(encoder, "null"):
        side = encoder.image_size
        encoder.register_buffer("null", torch.randint(0, 256, (side, side, 3), dtype=torch.uint8))


def null_pixels(encoder: Encoder) -> torch.Tensor:
    """Return the normalised pixels of an encoder's NULL, (1, 3, H, W)."""
    null: Any = encoder.null
    return encoder.preprocess.normalize(null.cpu().numpy())[None]


def visualness(texts: str | Sequence[str], encoder: Encoder, *, batch_size: int = 256) -> np.ndarray:
    """Return 1 minus the cosine of every text to an encoder's NULL (see `add_null`), (n,)."""
    return (1 - encoder.texts(texts, batch_size=batch_size) @ encoder.images(null_pixels(encoder))[0]).numpy()


def best_threshold(scores: Any, visual: Any) -> float:
    """Return the threshold with the highest macro F1 (visual: above it), half way between two scores; of equal ones the
    lowest.

    Parameters
    ----------
    scores : visualness of texts that were not learned from
    visual : whether each is visual; both kinds must occur

    Examples
    --------
    >>> best_threshold([0.1, 0.3, 0.5, 0.9], [False, False, True, True])
    0.4
    """
    scores, labels = check_scores(scores, visual)
    order = np.argsort(scores, kind="stable")
    scores, labels = scores[order], labels[order]
    missed, right = np.cumsum(labels), np.cumsum(~labels)  # visual and other texts up to here, which are called other
    found, false = labels.sum() - missed, (~labels).sum() - right
    macro = (2 * found / (2 * found + false + missed) + 2 * right / (2 * right + missed + false)) / 2
    between = np.append(scores[:-1] < scores[1:], False)
    if not between.any():
        raise ClipworksError("scores must differ, so that a threshold can lie between them. Got one value.")
    best = int(np.argmax(np.where(between, macro, -1.0)))
    return float((scores[best] + scores[best + 1]) / 2)


def mine(similarity: Any, above: float = 0.35, below: float = 0.18) -> np.ndarray:
    """Return the number of the image that each sentence of a page belongs to, or `NULL` (-1), or `UNSURE` (-2).

    Parameters
    ----------
    similarity : cosines of a page's sentences and images, (n, m)
    above : a sentence is visual where its highest cosine is greater
    below : a sentence is not visual where all its cosines are less; a page without images says nothing of that

    Examples
    --------
    >>> mine([[0.1, 0.4], [0.1, 0.17], [0.2, 0.3]])
    array([ 1, -1, -2])
    """
    values = np.asarray(similarity, np.float64)
    if values.ndim != 2:
        raise ClipworksError(f"similarity must have the shape (sentences, images). Got {values.shape}.")
    if not below <= above:
        raise ClipworksError(f"below must not exceed above ({above}). Got {below}.")
    if values.shape[1] == 0:
        return np.full(len(values), UNSURE)
    highest = values.max(1)
    return np.where(highest > above, values.argmax(1), np.where(highest < below, NULL, UNSURE))


def mine_pages(
    pages: Sequence[tuple[Sequence[str], Sequence[Any]]],
    encoder: Encoder,
    *,
    above: float = 0.35,
    below: float = 0.18,
    progress: bool | None = None,
) -> tuple[list[Any], list[str], list[str]]:
    """Return images, their texts, and texts without a picture, from pages of documents.

    Parameters
    ----------
    pages : sentences and images of each
    encoder : whose similarities decide; the defaults of `above` and `below` are those of ViT-B/32
    above, below : as in `mine`
    progress : show a bar (default: on a terminal)
    """
    images: list[Any] = []
    texts: list[str] = []
    alone: list[str] = []
    for sentences, pictures in Progress(pages, len(pages), "mining pages", enabled=progress):
        if not len(sentences) or not len(pictures):
            continue
        cosines = encoder.texts(list(sentences)) @ encoder.images(list(pictures)).T
        for sentence, place in zip(sentences, mine(cosines.numpy(), above, below), strict=True):
            if place >= 0:
                images.append(pictures[place])
                texts.append(sentence)
            elif place == NULL:
                alone.append(sentence)
    return images, texts, alone


def read_texts(texts: str | Sequence[str]) -> list[str]:
    """Return texts as they are, or the lines of a text file."""
    if isinstance(texts, str):
        path = Path(texts)
        if not path.is_file():
            raise ClipworksError(f"non_visual must be a list of texts or a text file. There is none at {texts!r}.")
        texts = path.read_text(encoding="utf-8").splitlines()
    if odd := [text for text in texts if not isinstance(text, str)]:
        raise ClipworksError(f"non_visual must hold texts. Got {odd[0]!r}.")
    return [text for text in texts if text.strip()]
