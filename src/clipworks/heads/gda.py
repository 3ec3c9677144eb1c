"""GDA-CLIP: Gaussian discriminant analysis on the image features, added to the zero-shot logits.

Claim: class means and one covariance, without a single gradient step, come near or above trained prompts and adapters
(mean of 11 data sets, ResNet-50, 16 shots: 76.05 %); base-to-new, unbalanced and unlabelled data have closed forms too.

Formula: S = sum_i (x_i - mu_yi)(x_i - mu_yi)^T, Sigma = S / (N - 1);  P = dim * ((N - 1) Sigma + tr(Sigma) I)^-1;
w_c = P mu_c;  b_c = log(prior_c) - mu_c^T P mu_c / 2;  logits = SCALE * cos(x, t_c) + alpha * (w_c x + b_c).
New classes: mu_c = mean of the 64 base images nearest to t_c and of 16 copies of t_c; P = mean over c of the shrunk
precision of those 64 around t_c. Unlabelled: rounds of responsibilities r_ic = softmax_c(logits_i) and of the weighted
mu_c and Sigma = sum_ic r_ic (x_i - mu_c)(x_i - mu_c)^T / N, from zero-shot responsibilities.

Paper: Wang et al. 2024, A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation (ICLR).
Differs from the paper: alpha comes from folds of the shots (the release takes it from the whole validation split, for
ImageNet from the test images). Shots without any scatter (one per class, no views) get P = I, which is the nearest
class mean. The covariance of new classes divides by 64 - 1 and is inverted through its 64 rows, which is exact. How the
release treats unlabelled images is not published: the rounds are a plain form, with alpha = (N - 1) / dim unless given,
which undoes the factor of P, so that the Gaussians weigh as their own likelihood.
`shrink=False` is the pseudo-inverse, as the release has for base classes; for equally many shots its average of the
classes' covariances then differs from the pooled one by a factor only, which alpha takes up.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from ..errors import ClipworksError, check_choice, check_range
from ..registry import method
from .common import Choice, Head, Shots, check_vectors, fingerprint, named_words, one_hot, softmax, zero_shot

PRIORS = ("uniform", "shots")


@method(card="gda", level="MR")
class GDA(Head):
    """Classify by Gaussian discriminant analysis with one covariance.

    Parameters
    ----------
    text : class-word vectors (C, dim), or `Features` of them whose labels name the classes; adds zero-shot logits
    alpha : weight of the Gaussians beside the words; default: the best of 1e-4 ... 100 on images left out
    prior : "uniform" (also for unbalanced shots, so that rare classes are not held down) or "shots", their shares
    shrink : the shrunk precision of the formula; False: the pseudo-inverse of the covariance
    folds : parts of the shots that are left out in turn

    Attributes
    ----------
    means_, coef_, intercept_ : (C, dim), (C, dim), (C,)
    classes_, text_, alpha_, temperature_ : labels, words, weight, temperature of the probabilities

    Inputs
    ------
    features of labelled images (`fit`), of unlabelled ones (`fit_unlabelled`), or words of new classes (`to_new`)

    Relations
    ---------
    With P = I it is `nearest_mean`; without words it is scikit-learn's LinearDiscriminantAnalysis with this covariance.

    References
    ----------
    Wang et al. 2024, A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> GDA().fit(x, ["cat", "cat", "dog", "dog"]).predict([[0.8, 0.3]])
    array(['cat'], dtype='<U3')
    """

    effort = 1

    def __init__(
        self,
        text: Any = None,
        alpha: float | None = None,
        prior: str = "uniform",
        shrink: bool = True,
        folds: int = 5,
    ):
        self.text, self.alpha, self.prior, self.shrink, self.folds = text, alpha, prior, shrink, folds

    def _learn(self, shots: Shots) -> Choice:
        check_choice("prior", self.prior, PRIORS)
        check_range("folds", self.folds, 2)
        splits = shots.splits(self.folds)
        choice = self._choice(*splits)
        if splits:
            scores = []
            for rows, held, _ in splits:
                self._gaussians(shots.x[rows], one_hot(shots.y[rows], shots.classes))
                scores.append(self._scores(held))
            choice.offer(None, np.concatenate(scores))
        self._gaussians(shots.x, one_hot(shots.y, shots.classes))
        return choice

    def fit_unlabelled(self, x: Any, *, start: np.ndarray | None = None, rounds: int = 10) -> GDA:
        """Learn from images without labels by expectation-maximisation, starting from the words.

        Parameters
        ----------
        x : vectors (n, dim), or `Features`; their labels are not read
        start : responsibilities (n, C) to begin with (default: the zero-shot probabilities)
        rounds : at most so many; ends when no image changes its class

        Notes
        -----
        Without text, `start` alone says what the classes are, 0..C-1. The probabilities are not calibrated.
        """
        check_range("rounds", rounds, 1)
        check_choice("prior", self.prior, PRIORS)
        vectors = check_vectors(self, x, fit=True, labelled=False)
        if self.text is None and start is None:
            raise ClipworksError("text must be given to learn without labels, or start. Got neither.")
        if self.text is None:
            self.classes_, self.text_ = np.arange(np.shape(np.asarray(start))[-1]), None
        else:
            self.classes_, self.text_ = named_words(self.text, vectors.shape[1], fingerprint(x))
        natural = 1.0 if self.text_ is None else (len(vectors) - 1) / vectors.shape[1]
        self.alpha_ = natural if self.alpha is None else float(check_range("alpha", self.alpha, 0))
        self.temperature_ = 1.0
        share = softmax(zero_shot(vectors, self.text_)) if start is None else np.asarray(start, float)  # type: ignore[arg-type]
        if share.shape != (len(vectors), len(self.classes_)) or not np.isfinite(share).all() or (share < 0).any():
            raise ClipworksError(f"start must hold shares of shape {(len(vectors), len(self.classes_))}, none below 0. "
                                 f"Got shape {share.shape}.")  # fmt: skip
        for _ in range(rounds):
            self._gaussians(vectors, share, degrees=len(vectors))
            before, share = share, softmax(self._sum(vectors, self._scores(vectors)))
            if np.array_equal(before.argmax(1), share.argmax(1)) and np.allclose(before, share, atol=1e-6):
                break
        return self

    def to_new(self, text: Any, x: Any, *, neighbours: int = 64, copies: int = 16) -> GDA:
        """Return a head for classes without any image, from their words and the images of the base classes.

        Parameters
        ----------
        text : words of the new classes (C, dim), or `Features` whose labels name them (default names 0..C-1)
        x : features of the base images that this head was fitted on; their labels are not needed
        neighbours : base images nearest to a word that stand for its class (64: release)
        copies : how many images the word itself counts as in the mean (16: release)

        Notes
        -----
        The weight and the temperature are those of the base classes, for which there were labels.
        """
        check_range("neighbours", neighbours, 2)
        check_range("copies", copies, 0)
        base = check_vectors(self, x)
        new = copy.copy(self)
        new.classes_, words = named_words(text, base.shape[1], fingerprint(x))
        new.text, new.text_ = text, None if self.text_ is None else words
        near = np.argsort(-zero_shot(base, words), axis=0, kind="stable")[:neighbours].T  # (C, k)
        k = near.shape[1]
        means, total = np.empty_like(words), np.zeros((base.shape[1], base.shape[1]))
        for c, (rows, word) in enumerate(zip(near, words, strict=True)):
            means[c] = (base[rows].sum(0) + copies * word) / (k + copies)
            total += shrunk_from_rows(base[rows] - word)
        new._set(means, total / len(words), np.full(len(words), 1 / len(words)))
        return new

    def _gaussians(self, x: np.ndarray, share: np.ndarray, degrees: int | None = None) -> None:
        """Set the classifier from shares (n, C) of images in classes; the covariance divides by `degrees` (n - 1)."""
        count = share.sum(0)
        means = (share.T @ x) / np.maximum(count, 1e-12)[:, None]
        middle = share @ means  # every image's class mean (a mixture of them where its share is divided)
        scatter = (x - middle).T @ (x - middle)
        if degrees is not None:  # shares that are divided: what the mixture of means leaves out
            scatter = scatter + (means.T * count) @ means - middle.T @ middle
        sigma = scatter / (degrees or len(x) - 1)
        shares = np.full(len(count), 1 / len(count)) if self.prior == "uniform" else count / count.sum()
        self._set(means, precision(sigma, len(x), self.shrink), shares)

    def _set(self, means: np.ndarray, matrix: np.ndarray, prior: np.ndarray) -> None:
        self.means_, self.coef_ = means, means @ matrix
        self.intercept_ = np.log(np.maximum(prior, 1e-300)) - (self.coef_ * means).sum(1) / 2

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return x @ self.coef_.T + self.intercept_


def precision(sigma: np.ndarray, n: int, shrink: bool = True) -> np.ndarray:
    """Return dim * ((n - 1) sigma + tr(sigma) I)^-1, or the pseudo-inverse; the identity where there is no scatter.

    >>> precision(np.diag([1.0, 3.0]), 2)
    array([[0.4       , 0.        ],
           [0.        , 0.28571429]])
    """
    dim, trace = len(sigma), np.trace(sigma)
    if not trace > 1e-14:
        return np.eye(dim)
    if not shrink:
        return np.linalg.pinv(sigma, rcond=1e-10, hermitian=True)
    found = dim * np.linalg.inv((n - 1) * sigma + trace * np.eye(dim))
    return (found + found.T) / 2


def shrunk_from_rows(rows: np.ndarray) -> np.ndarray:
    """Return `precision` of rows around zero (k, dim), divided by k - 1, inverting a k x k matrix only."""
    k, dim = rows.shape
    trace = (rows**2).sum() / max(k - 1, 1)
    if not trace > 1e-14:
        return np.eye(dim)
    inner = np.linalg.solve(trace * np.eye(k) + rows @ rows.T, rows)
    return dim / trace * (np.eye(dim) - rows.T @ inner)
