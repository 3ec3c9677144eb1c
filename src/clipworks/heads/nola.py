"""NoLA's alignment head: a small network on any encoder's features, taught by the surest answers of the words.

Claim: with class names but no labels, descriptions give better zero-shot answers, a second frozen encoder (DINO) gives
better features, and a head between them that is trained on the surest answers is better than these (the whole method,
11 data sets: 3.6 points above the best label-free one before it).

Formula: e_c = norm(mean of the unit vectors of the class's descriptions and templates);  p(x) = softmax(SCALE <x, e>);
of every predicted class the k surest images, k = max(16, floor(0.2 N / C)), with their predicted class as label;
h(z) = W2 relu(W1 z + b1) + b2 on the vectors z of the second encoder, by cross-entropy.

Paper: Imam et al. 2024, CLIP meets DINO for Tuning Zero-Shot Classifier using Unlabeled Image Collections (NoLA).
Differs from the paper: this is its label-free alignment head (stages 1 and 2), which there teaches prompts, layer norms
and a classifier of the CLIP image tower (stage 3), not part of this. Vectors are brought to length sqrt(dim), the size
that the towers' own outputs have, for which the learning rate is meant. The last epoch is taken, where the release
takes the one with the best labelled accuracy. The images learned from are those of the set in question: transductive.
Hidden size, epochs, batch and optimiser are those of the released code.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ClipworksError, check_range
from ..registry import method
from ..types import Features
from .common import Head, as_array, check_vectors, fingerprint, named_words, softmax, unit, zero_shot

if TYPE_CHECKING:
    from ..zeroshot.descriptions import Source


@method(card="nola", level="M")
class NoLA(Head):
    """Classify by a small network that learned from unlabelled images and the words' surest answers.

    Parameters
    ----------
    text : class vectors (C, dim), or `Features` of them whose labels name the classes, such as `description_vectors`
        gives; without text the labels of `fit` take the place of the words' answers
    alpha : None; no zero-shot logits are added
    hidden : units of the hidden layer
    keep : images kept per class, as a share of its even share N / C of the images
    least : images kept per class at least, where the words give it as many
    epochs, batch_size, lr : of the training by Adam
    seed : of the first weights and of the order of the images

    Attributes
    ----------
    kept_, labels_ : rows of `fit` that were learned from, and the class number each was given by the words
    counts_ : how many of each class; a class with none cannot be learned
    weights_ : W1 (hidden, dim), b1, W2 (C, hidden), b2
    classes_, temperature_ : labels, temperature of the probabilities (1 without `validation`)

    Inputs
    ------
    features of unlabelled images, of two encoders or of one; labels are not read where there is text

    Relations
    ---------
    With keep=1 and least=0 and the words' own features it repeats zero-shot. `gda` has a closed form for unlabelled
    images (`fit_unlabelled`).

    References
    ----------
    Imam et al. 2024, CLIP meets DINO for Tuning Zero-Shot Classifier using Unlabeled Image Collections

    Examples
    --------
    >>> words, x = np.eye(2), np.array([[1.0, 0.2], [0.9, 0.1], [0.2, 1.0], [0.3, 0.9]])
    >>> NoLA(text=words, hidden=8).fit(x).predict([[0.8, 0.3], [0.3, 0.8]])
    array([0, 1])
    """

    labelled = False
    effort = 3

    def __init__(
        self,
        text: Any = None,
        alpha: None = None,
        hidden: int = 256,
        keep: float = 0.2,
        least: int = 16,
        epochs: int = 50,
        batch_size: int = 32,
        lr: float = 1e-3,
        seed: int = 0,
    ):
        self.text, self.alpha, self.hidden, self.keep, self.least = text, alpha, hidden, keep, least
        self.epochs, self.batch_size, self.lr, self.seed = epochs, batch_size, lr, seed

    def fit(self, x: Any, y: Any = None, *, groups: Any = None, validation: Any = None, clip: Any = None) -> NoLA:
        """Learn from unlabelled images.

        Parameters
        ----------
        x : vectors (n, dim) that the head reads, now and later, or `Features`; of a second encoder in the paper
        y : n labels, read only where there is no text
        groups : not used; views of one image are images of their own
        validation : (x, y) or `Features` with labels: fit the temperature on these images; nothing else is chosen
        clip : vectors of the same images by the encoder of the words (default: x)
        """
        for name, low in (("hidden", 1), ("keep", 0), ("least", 0), ("epochs", 1), ("batch_size", 1), ("lr", 0)):
            check_range(name, getattr(self, name), low)
        if self.text is None:
            if y is None and not isinstance(x, Features):
                raise ClipworksError("without text it requires y to be passed, but the target y is None: give either.")
            shots = self._open(x, y, groups)
            rows, self.kept_, self.labels_ = shots.x, np.arange(len(shots.y)), shots.y
        else:
            rows = check_vectors(self, x, fit=True, labelled=False)
            seen = rows if clip is None else self._paired(clip, len(rows))
            made_by = fingerprint(x if clip is None else clip)
            self.classes_, words = named_words(self.text, seen.shape[1], made_by)
            if len(words) < 2:
                raise ClipworksError("text must hold the vectors of at least 2 classes. Got 1.")
            self.kept_, self.labels_ = surest(softmax(zero_shot(seen, words)), self.keep, self.least)
        self.text_ = None  # the words are in the answers learned from: nothing is added to the logits
        self.counts_ = np.bincount(self.labels_, minlength=len(self.classes_))
        if not self.counts_.all():
            names = ", ".join(map(repr, self.classes_[self.counts_ == 0][:5].tolist()))
            warnings.warn(f"no image looks most like {names}: such a class cannot be learned.", stacklevel=2)
        self.weights_ = self._train(_sized(rows[self.kept_]), self.labels_)
        held = self._validation(validation)
        choice = self._choice() if held is None else self._choice(held)
        if held is not None:
            choice.offer(None, self._scores(held[0]))
        self._take(choice)
        return self

    def _paired(self, clip: Any, count: int) -> np.ndarray:
        seen = np.asarray(as_array(clip), np.float64)
        if seen.ndim != 2 or len(seen) != count or not np.isfinite(seen).all():
            raise ClipworksError(f"clip must have one finite row per row of x ({count}). Got shape {seen.shape}.")
        return seen

    def _train(self, z: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        """Return the four weights after the last epoch."""
        import torch

        dice = torch.Generator().manual_seed(self.seed)
        sizes = [(self.hidden, z.shape[1]), (len(self.classes_), self.hidden)]
        weights = []
        for out, into in sizes:  # a linear layer's usual first weights
            for shape in ((out, into), (out,)):
                drawn = (2 * torch.rand(shape, generator=dice) - 1) / into**0.5
                weights.append(drawn.requires_grad_())
        optimiser = torch.optim.Adam(weights, lr=self.lr)
        rows, labels = torch.from_numpy(z).float(), torch.from_numpy(y)
        for _ in range(self.epochs):
            for part in torch.randperm(len(rows), generator=dice).split(self.batch_size):
                inside = torch.relu(rows[part] @ weights[0].T + weights[1])
                loss = torch.nn.functional.cross_entropy(inside @ weights[2].T + weights[3], labels[part])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return [w.detach().double().numpy() for w in weights]

    def _scores(self, x: np.ndarray) -> np.ndarray:
        inner, shift, outer, bias = self.weights_
        return np.maximum(_sized(x) @ inner.T + shift, 0) @ outer.T + bias


def surest(p: np.ndarray, keep: float = 0.2, least: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the max(least, floor(keep * N / C)) surest images of every predicted class, and the classes.

    >>> surest(np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]), keep=0.5, least=1)
    (array([0, 3]), array([0, 1]))
    """
    k = max(least, int(keep * len(p) / p.shape[1] + 1e-9), 1)
    said, sure = p.argmax(1), p.max(1)
    order = np.lexsort((-sure, said))  # class after class, the surest first
    place = np.arange(len(p)) - np.searchsorted(said[order], said[order])
    rows = order[place < k]
    return rows, said[rows]


def description_vectors(
    names: Sequence[str], encoder: Any, descriptions: Source, templates: str | Sequence[str] = "simple"
) -> np.ndarray:
    """Return one unit vector per class: the mean of its descriptions and its templates, every sentence counted alike.

    Parameters
    ----------
    names : C distinct class names
    encoder : anything with `texts(list of str) -> (n, dim)`, or a mapping from sentence to vector
    descriptions : mapping or JSON file from names to whole sentences, or a function of a name
    templates : name of a set, a template or several
    """
    from ..zeroshot.classifier import check_names
    from ..zeroshot.descriptions import descriptions_of
    from ..zeroshot.sentences import encode, means
    from ..zeroshot.templates import resolve_templates

    names, chosen = check_names(names), resolve_templates(templates)
    told = descriptions_of(names, descriptions)
    sentences = [[t.replace("{}", n) for t in chosen] + own for n, own in zip(names, told, strict=True)]
    return unit(means(encode([s for own in sentences for s in own], encoder), [len(own) for own in sentences]))


def _sized(rows: np.ndarray) -> np.ndarray:
    return unit(rows) * rows.shape[1] ** 0.5
