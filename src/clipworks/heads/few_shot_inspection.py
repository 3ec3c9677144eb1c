"""Few-shot inspection: an image is good or defective as the stored image most like it is, and that image is shown.

Claim: for quality inspection, 50 to 100 stored images per class and the features of a frozen image tower are enough,
with nothing trained (stochastic textures, ViT-L/14: accuracy 90 % with 10 images per class, 97.5 % with 50).

Formula: s_c(x) = max_{j in class c} cos(x, x_j);  label argmax_c s_c(x);  p = softmax(s(x) / T) with T = 1.
Prediction sets: with a_i = 1 - p_{y_i}(x_i) of n further images, q = the ceil((1 - rate) (n + 1))-th smallest a_i;
set(x) = {c : 1 - p_c(x) <= q}.

Paper: Megahed et al. 2025, Adapting OpenAI's CLIP Model for Few-Shot Image Inspection in Manufacturing Quality Control;
the sets are from its authors' later code.
Differs from the paper: words are not used there; with `text` their logits are added as in the other heads. T = 1 is the
paper's, where no probability of two classes leaves [0.119, 0.881]; `temperature=None` fits it on images left out.
Larger classes have more chances at the maximum: keep the numbers of images alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ClipworksError, check_range
from ..metrics.conformal import conformal_quantile
from ..registry import method
from ..types import Features
from .common import ALPHAS, SCALE, Choice, Head, Shots, check_vectors, class_numbers, unit

CELLS = 1 << 24  # similarities held at a time


@method(card="few-shot-inspection", level="M")
class FewShotInspection(Head):
    """Classify by the most similar stored image.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; adds zero-shot logits
    alpha : weight of the similarities beside the words; default: the best of 0.01 ... 1e4 on images left out
    temperature : of the probabilities (1: paper); None: the one that fits images left out best

    Attributes
    ----------
    shots_, owners_ : unit rows of the stored images, class after class, and the class number of each
    rows_ : the row of `fit` that each stored image was
    classes_, text_, alpha_, temperature_ : labels, words, weight, temperature of the probabilities

    Inputs
    ------
    features of stored images of each class, good and defective

    Relations
    ---------
    Without text it is `knn` with k=1 by cosine, with a similarity per class instead of one vote.

    References
    ----------
    Megahed et al. 2025, Adapting OpenAI's CLIP Model for Few-Shot Image Inspection in Manufacturing Quality Control

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> head = FewShotInspection().fit(x, ["good", "good", "scratch", "scratch"])
    >>> head.predict([[0.8, 0.3]]), head.nearest([[0.8, 0.3]])[0]
    (array(['good'], dtype='<U7'), array([[1, 3]]))
    """

    effort = 1
    alphas = tuple(SCALE * a for a in ALPHAS)  # its scores lie in [-1, 1], zero-shot logits in [-SCALE, SCALE]

    def __init__(self, text: Any = None, alpha: float | None = None, temperature: float | None = 1.0):
        self.text, self.alpha, self.temperature = text, alpha, temperature

    def _learn(self, shots: Shots) -> Choice:
        if self.temperature is not None:
            check_range("temperature", self.temperature, 1e-9)
        self.rows_ = np.argsort(shots.y, kind="stable")
        self.shots_, self.owners_ = unit(shots.x)[self.rows_], shots.y[self.rows_]
        choice = self._choice(shots.held)
        choice.offer(None, self._most(shots.held[0], shots.held_images, shots.images[self.rows_])[0])
        return choice

    def _take(self, choice: Choice, shots: Shots | None = None) -> None:
        super()._take(choice, shots)
        self.temperature_ = self.temperature_ if self.temperature is None else float(self.temperature)

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return self._most(x)[0]

    def nearest(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the most similar stored image of every class, as its row in `fit`, and the similarity; both (n, C)."""
        similarity, column = self._most(check_vectors(self, x))
        return self.rows_[column], similarity

    def sets(self, x: Any, y: Any = None, *, new: Any, rate: float = 0.1, per_class: bool = False) -> np.ndarray:
        """Return which classes are possible for new images (m, C): the true one is among them with probability
        1 - `rate`, over draws of these images and the new ones.

        Parameters
        ----------
        x, y : images with labels that were not in `fit` and come as the new ones do
        new : vectors (m, dim)
        rate : share of new images whose true class may be left out; below 1 / (n + 1) every class is possible
        per_class : hold the rate for every class by itself (Mondrian)
        """
        check_range("rate", rate, 0, 1)
        y = x.labels if y is None and isinstance(x, Features) else y
        p, own = self.predict_proba(x), class_numbers("y", np.asarray(y), self.classes_)
        if len(own) != len(p):
            raise ClipworksError(f"y must have one label per row ({len(p)}). Got {len(own)}.")
        strange = 1 - p[np.arange(len(own)), own]
        parts = [strange[own == c] for c in range(len(self.classes_))] if per_class else [strange]
        return 1 - self.predict_proba(new) <= np.array([conformal_quantile(part, rate) for part in parts])

    def _most(
        self, x: np.ndarray, image: np.ndarray | None = None, images: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Largest cosine per class (n, C) and its column; stored images of a row's own image are passed over."""
        starts = np.searchsorted(self.owners_, np.arange(len(self.classes_)))
        found, column = (np.empty((len(x), len(starts)), kind) for kind in (float, int))
        size = max(1, CELLS // len(self.shots_))
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            cosine = unit(x[part]) @ self.shots_.T
            if image is not None:
                cosine[image[part, None] == images] = -np.inf
            for c, (low, high) in enumerate(zip(starts, [*starts[1:], len(self.shots_)], strict=True)):
                own = cosine[:, low:high]
                column[part, c] = low + own.argmax(1)
                found[part, c] = own.max(1)
        return found, column
