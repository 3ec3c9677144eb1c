"""Masks that follow the edges of the image: PAMR and mean-field inference of a dense conditional random field.

PAMR: Araslanov and Roth 2020, Single-Stage Semantic Segmentation from Image Labels (CVPR). Dense CRF: Krähenbühl and
Koltun 2011, Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials (NeurIPS); here all pairs are
summed exactly, on a grid small enough for that, where the paper approximates by filtering.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_range

DILATIONS = (1, 2, 4, 8, 12, 24)
LARGEST = 10_000  # cells of the dense CRF: all pairs of them are 400 MB


def pamr(
    image: torch.Tensor, scores: torch.Tensor, *, iterations: int = 10, dilations: Sequence[int] = DILATIONS
) -> torch.Tensor:
    """Pixel-adaptive refinement: every pixel's scores become the mean of its neighbours' of like colour, repeatedly.

    a_pq = mean over channels of -|I_p - I_q| / (1e-8 + 0.1 std of the window); weights = softmax over the eight
    neighbours at every dilation.

    Parameters
    ----------
    image : (3, H, W)
    scores : (K, H, W); sums over classes are kept
    iterations, dilations : of the paper's release. NACLIP's has the dilations 8 and 16 alone; without a 1 among them
        pixels side by side never meet, and the result is speckled.

    Returns
    -------
    (K, H, W)
    """
    _check(image, scores)
    check_range("iterations", iterations, 0)
    patches = _neighbours(image, dilations)  # (3, neighbours, H, W)
    with_centre = torch.cat([patches, image[:, None].expand(-1, len(dilations), -1, -1)], dim=1)
    spread = with_centre.std(1, keepdim=True)
    affinity = (-(patches - image[:, None]).abs() / (1e-8 + 0.1 * spread)).mean(0).softmax(0)
    for _ in range(iterations):
        # one class at a time: the neighbours of all classes at once would be as many maps as there are neighbours
        scores = torch.stack([(affinity * _neighbours(one[None], dilations)[0]).sum(0) for one in scores])
    return scores


def dense_crf(
    image: torch.Tensor,
    scores: torch.Tensor,
    *,
    iterations: int = 10,
    space: float = 67.0,
    color: float = 3.0,
    weight: float = 4.0,
    smooth_space: float = 1.0,
    smooth_weight: float = 3.0,
) -> torch.Tensor:
    """Mean field of a conditional random field in which every pixel sees every other: Q <- softmax(log p + K Q).

    K = weight exp(-|p|^2 / (2 space^2) - |I|^2 / (2 color^2)) + smooth_weight exp(-|p|^2 / (2 smooth_space^2)),
    without the pixel itself.

    Parameters
    ----------
    image : (3, H, W) in [0, 255]; at most 10,000 pixels
    scores : (K, H, W), probabilities
    iterations, space, color, weight, smooth_space, smooth_weight : of ExCEL's release; space is in pixels of this grid

    Returns
    -------
    (K, H, W), probabilities
    """
    _check(image, scores)
    height, width = image.shape[1:]
    if height * width > LARGEST:
        raise ClipworksError(f"image must have at most {LARGEST} pixels for the exact sums. Got {height} x {width}.")
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows, columns], -1).reshape(-1, 2).to(scores)
    far = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist").square_()
    unlike = torch.cdist(image.flatten(1).T.to(scores), image.flatten(1).T.to(scores)).square_()
    kernel = weight * (far / (-2 * space**2) - unlike / (2 * color**2)).exp_()
    kernel += smooth_weight * (far / (-2 * smooth_space**2)).exp_()
    kernel.fill_diagonal_(0)
    unary = scores.flatten(1).clamp(min=1e-8).log()
    belief = unary.softmax(0)
    for _ in range(iterations):
        belief = (unary + belief @ kernel).softmax(0)
    return belief.view_as(scores)


def _neighbours(maps: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """The eight neighbours of every pixel at every dilation, borders repeated: (C, H, W) to (C, 8 n, H, W)."""
    height, width = maps.shape[-2:]
    found = []
    for d in dilations:
        wide = F.pad(maps[None], (d, d, d, d), mode="replicate")[0]
        places = [(y, x) for y in (0, d, 2 * d) for x in (0, d, 2 * d) if (y, x) != (d, d)]
        found += [wide[:, y : y + height, x : x + width] for y, x in places]
    return torch.stack(found, dim=1)


def _check(image: torch.Tensor, scores: torch.Tensor) -> None:
    if image.ndim != 3 or scores.ndim != 3 or image.shape[1:] != scores.shape[1:]:
        raise ClipworksError(
            f"image (3, H, W) and scores (K, H, W) must have one size. Got {tuple(image.shape)}, {tuple(scores.shape)}."
        )
