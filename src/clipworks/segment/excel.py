"""ExCEL, its training-free part: self-attention over the last blocks for patches, attributes for words, calibration.

Claim: CLIP's own patch-text similarity holds dense knowledge; enriched words and calibrated patches make class
activation maps without training, from which the paper then trains (78.4 mIoU on VOC val with image labels alone).

Formula: the image's path runs as in CLIP. Beside it patches collect x' <- x' + W_o A v over the last blocks, A being
(softmax(q q^T s) + softmax(k k^T s) + softmax(v v^T s)) / 3 summed over heads, no feed-forward part. Words:
t' = t + softmax(t A^T) A over attribute centres, the lowest tenth left out. Scores: w_k cos(f_i, t_k) minus its mean
over classes, w_k = c_k / mean(c), c = softmax(2 cos(class token, t)).

Papers: Yang et al. 2025, ExCEL: Exploring CLIP's Dense Knowledge for Weakly Supervised Semantic Segmentation (CVPR);
the two paths and the removal of what classes share: Li et al. 2023, CLIP Surgery for Better Explainability.
Differs from the paper: patches are brought to length 1 over channels (the release over patches); the trained part
(learnable calibration, decoder) is not here; towers of fewer than twelve blocks calibrate the same share of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..encoders.layers import attention_weights
from ..errors import ClipworksError, check_choice, check_range
from ..registry import method
from .common import Dense, Hidden, cosines

RELEASED, DEPTH = 5, 12  # calibrated blocks of the release, and how many its tower has


@method(card="excel", level="M")
class ExCEL(Dense):
    """Static visual calibration and enriched words.

    Parameters
    ----------
    calibrated : how many of the last blocks patches collect from; None is the release's 5, in towers of fewer than its
        twelve blocks the same share; 0 leaves CLIP's own tokens
    attributes : unit rows (B, dim) of attribute centres, see `attribute_centres`; None leaves the words alone
    dropped : share of the attributes, the least like a word, that it does not take (release: 0.1)
    shared : remove from the scores what all classes share (release: True)
    heads : "sum" their attention into one map for all (release), or their "mean"

    Inputs
    ------
    images and class names, no training; sentences about the classes for the attributes

    Relations
    ---------
    With the last block alone, without what CLIP's tokens are to start from, `clearclip` with rule "qq+kk+vv".

    References
    ----------
    Yang et al. 2025, ExCEL: Exploring CLIP's Dense Knowledge for Weakly Supervised Semantic Segmentation (CVPR)

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> from clipworks.segment.common import enter
    >>> ExCEL().features(enter(toy_encoder(), torch.zeros(1, 3, 16, 24), blocks=2)).shape
    torch.Size([1, 4, 6, 8])
    """

    def __init__(
        self,
        calibrated: int | None = None,
        attributes: torch.Tensor | None = None,
        dropped: float = 0.1,
        shared: bool = True,
        heads: str = "sum",
    ):
        self.calibrated = None if calibrated is None else int(check_range("calibrated", calibrated, 0))
        self.blocks = RELEASED if self.calibrated is None else max(1, self.calibrated)
        self.attributes, self.dropped = attributes, check_range("dropped", dropped, 0, 1)
        self.shared, self.heads_together = shared, check_choice("heads", heads, ("sum", "mean"))

    def words(self, words: torch.Tensor) -> torch.Tensor:
        """Rows with their attributes added, length 1."""
        if self.attributes is None:
            return words
        attributes = torch.as_tensor(self.attributes).to(words)
        if attributes.ndim != 2 or attributes.shape[1] != words.shape[1] or not len(attributes):
            raise ClipworksError(
                f"attributes must have the shape (B, {words.shape[1]}). Got {tuple(attributes.shape)}."
            )
        near = words @ attributes.T
        count = min(int(self.dropped * len(attributes)), len(attributes) - 1)
        if count:
            near = near.scatter(1, near.topk(count, largest=False).indices, -torch.inf)
        return F.normalize(words + near.softmax(1) @ attributes, dim=1)

    def features(self, hidden: Hidden) -> torch.Tensor:
        """A map (B, h, w, dim), not normalised."""
        if self.calibrated == 0:
            return hidden.project(hidden.finish(hidden.attend(None)))
        blocks = hidden.visual.blocks
        count = self.calibrated or max(1, min(RELEASED, round(len(blocks) * RELEASED / DEPTH)))
        inputs = hidden.inputs[-count:]
        new = inputs[0]
        for block, x in zip(blocks[len(blocks) - len(inputs) :], inputs, strict=True):
            attention, y = block.attention, block.norm1(x)
            q, k, v = (attention.split(layer(y)) for layer in (attention.q, attention.k, attention.v))
            weights = attention_weights("qq+kk+vv", q, k, v) / 3
            together = weights.sum(1) if self.heads_together == "sum" else weights.mean(1)
            new = new + attention.out((together[:, None].to(v) @ v).transpose(1, 2).flatten(2))
        return hidden.project(new)

    def local(self, hidden: Hidden, words: torch.Tensor) -> torch.Tensor:
        """Scores (B, K, h, w), without what all classes share."""
        if not self.shared or len(words) == 1:
            return cosines(self.features(hidden), words)
        image = self.image(hidden)
        return without_shared(cosines(self.features(hidden), words), image, words)

    def image(self, hidden: Hidden) -> torch.Tensor:
        """CLIP's own vector of the image, (B, dim), unit rows."""
        if not hidden.prefix:
            raise ClipworksError("ExCEL weighs the classes by the class token, which this tower lacks: shared=False.")
        token = hidden.finish(hidden.attend(None))[:, 0]
        recall = () if hidden.embedded is None else (hidden.embedded.mean(1),)
        return F.normalize(hidden.visual.project(token, *recall).float(), dim=-1)


def without_shared(scores: torch.Tensor, image: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """CLIP Surgery's removal: w_k score_k minus its mean over classes, w from the image's own vector.

    Written out, the channels' products are summed first, which is the same and needs no (patches, classes, dim) array.

    Parameters
    ----------
    scores : (B, K, h, w), cosines
    image : (B, dim), unit rows
    words : (K, dim), unit rows
    """
    share = (2 * image @ words.to(image).T).softmax(1)
    weighted = (share / share.mean(1, keepdim=True))[:, :, None, None] * scores
    return weighted - weighted.mean(1, keepdim=True)


def activation_maps(scores: torch.Tensor, present: Sequence[int]) -> torch.Tensor:
    """Class activation maps (len(present), h, w) in [0, 1]: each class from its least to its greatest score.

    Parameters
    ----------
    scores : (K, h, w) of one image
    present : the classes that the image is known to show; absent ones must be left out, as every map reaches 1
    """
    if not len(present) or not 0 <= min(present) <= max(present) < len(scores):
        raise ClipworksError(f"present must name classes from 0 to {len(scores) - 1}. Got {list(present)}.")
    kept = scores[list(present)]
    low, high = (f(kept, dim=(1, 2), keepdim=True) for f in (torch.amin, torch.amax))
    return (kept - low) / (high - low).clamp(min=1e-8)


def attribute_centres(sentences: Any, encoder: Any, centres: int = 112, seed: int = 0) -> torch.Tensor:
    """Centres (B, dim) of sentences about all classes, by k-means of their unit vectors (release: 112 for 20).

    Parameters
    ----------
    sentences : about 20 for each class, of all classes together
    encoder : with `texts`
    centres, seed : of k-means; no more centres than sentences are made
    """
    from sklearn.cluster import KMeans

    rows = encoder.texts(list(sentences)).numpy()
    found = KMeans(min(centres, len(rows)), random_state=seed, n_init=10).fit(rows)
    return torch.from_numpy(np.ascontiguousarray(found.cluster_centers_, dtype=np.float32))
