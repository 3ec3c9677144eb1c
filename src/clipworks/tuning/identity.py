"""Identities: batches of several images each, losses on them, and what a camera must not help to find."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..encoders.layers import wide
from ..errors import ClipworksError


def identity_rows(labels: Sequence[str], count: int, per: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a batch of `per` images each of count // per identities, at least two; an identity with fewer repeats some.

    >>> identity_rows(["a", "a", "b", "b", "b"], 4, 2, np.random.default_rng(0)).shape
    (4,)
    """
    names, codes = np.unique(np.asarray(labels), return_inverse=True)
    chosen = rng.permutation(len(names))[: max(2, count // per)]
    parts = []
    for name in chosen:
        own = np.flatnonzero(codes == name)
        parts.append(rng.choice(own, per, replace=len(own) < per))
    return np.concatenate(parts)


def batch_hard_triplet(rows: torch.Tensor, labels: torch.Tensor, margin: float = 0.3) -> torch.Tensor:
    """Return the mean of max(0, farthest of the same identity - nearest of another + margin), Euclidean.

    Parameters
    ----------
    rows : (n, dim)
    labels : int64 (n,)
    margin : between the two distances

    >>> batch_hard_triplet(torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([0, 0, 1, 1]))  # 4 apart
    tensor(0.)
    """
    rows = wide(rows)
    squares = (rows[:, None] - rows[None]).square().sum(-1)
    distance = squares.clamp(min=1e-12).sqrt()  # the root has no derivative at 0
    same = labels[:, None] == labels
    farthest = distance.masked_fill(~same, -torch.inf).amax(1)
    nearest = distance.masked_fill(same, torch.inf).amin(1)
    return (farthest - nearest + margin).clamp(min=0).mean()


def identity_contrast(
    image: torch.Tensor, text: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Return the sum of both directions of a contrast in which all pairs of one identity are right.

    -1/B sum_i 1/|P(i)| sum_{p in P(i)} log( exp(a_i . b_p / tau) / sum_j exp(a_i . b_j / tau) ), P(i) i itself and the
    others of its identity; then with a and b exchanged.

    Parameters
    ----------
    image, text : rows (n, dim), of any length
    labels : int64 (n,)
    temperature : tau
    """
    if not temperature > 0:
        raise ClipworksError(f"temperature must be above 0. Got {temperature}.")
    logits = wide(image) @ wide(text).T / temperature
    same = (labels[:, None] == labels).to(logits.dtype)
    share = same / same.sum(1, keepdim=True)
    return -((share * logits.log_softmax(1)).sum(1) + (share * logits.T.log_softmax(1)).sum(1)).mean()


def same_camera(
    labels: Sequence, cameras: Sequence, gallery_labels: Sequence | None = None, gallery_cameras: Sequence | None = None
) -> np.ndarray:
    """Return what a query may not count, (queries, gallery): images of its identity by its own camera.

    For `ignore` of `metrics.retrieval.image_retrieval`; recall at k is then the CMC at rank k. Without a gallery the
    queries are it.

    >>> same_camera([1, 1, 2], [0, 1, 0])[0]
    array([ True, False, False])
    """
    own, eyes = np.asarray(labels), np.asarray(cameras)
    others = own if gallery_labels is None else np.asarray(gallery_labels)
    their = eyes if gallery_cameras is None else np.asarray(gallery_cameras)
    if own.shape != eyes.shape or others.shape != their.shape:
        raise ClipworksError(f"cameras must hold one per label ({len(own)} and {len(others)}). "
                             f"Got {len(eyes)} and {len(their)}.")  # fmt: skip
    return (own[:, None] == others) & (eyes[:, None] == their)
