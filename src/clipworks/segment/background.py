"""Where nothing of the list is: a constant, words for surroundings, or an objectness map.

All three are one more score, and a pixel is background where that score is above every name's probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import ClipworksError, check_range, closest

if TYPE_CHECKING:
    from .common import Hidden

# surroundings that no list of things holds; of the kind that MaskCLIP's and SCLIP's releases give VOC's background
WORDS = ("sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sand", "building", "house",
         "floor", "ceiling", "ground", "field", "snow", "water", "window", "door", "background")  # fmt: skip
SURE = 0.99  # a pixel that is no object stays background unless a name is surer than this (CLIP-DINOiser)
FOUND = 0.3  # cosine with the seed from which on a patch is background (FOUND)


def background_words(background: str | float | Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """The further words that a setting means, without those that are names themselves."""
    if background is None or isinstance(background, float | int):
        return []
    if isinstance(background, str):
        if background not in ("words", "objects"):
            raise ClipworksError("background must be a number from 0 to 1, 'words', 'objects' or several words. "
                                 f"Got {background!r}.{closest(background, ('words', 'objects'))}")  # fmt: skip
        background = WORDS if background == "words" else ()
    return [word for word in background if word not in names]


def background_threshold(background: str | float | Sequence[str] | None) -> str | float | Sequence[str] | None:
    """A number written as a word ("0.3", from a shell) as a number; words separated by commas as a list."""
    if isinstance(background, str):
        if background.replace(".", "", 1).isdigit():
            background = float(background)
        elif "," in background:
            background = [word.strip() for word in background.split(",") if word.strip()]
    if isinstance(background, float | int):
        check_range("background", background, 0, 1)
    return background


def found_background(attention: torch.Tensor, keys: torch.Tensor, threshold: float = FOUND) -> torch.Tensor:
    """FOUND's background of one image: patches like the one that the class token looks at least.

    Heads are weighed by b_h = log(sum_h Q_h / Q_h), Q_h being the share of patches above the head's mean; with one head
    that weight would be 0 and is taken as 1.

    Parameters
    ----------
    attention : (heads, N), of the class token to the patches
    keys : (heads, N, d)
    threshold : cosine with the seed above which a patch is background

    Returns
    -------
    bool (N,), True for background

    References
    ----------
    Siméoni et al. 2023, Unsupervised Object Localization: Observing the Background to Discover Objects (CVPR)
    """
    if attention.ndim != 2 or keys.ndim != 3 or attention.shape != keys.shape[:2]:
        raise ClipworksError(f"attention (heads, N) and keys (heads, N, d) must agree. Got {tuple(attention.shape)}, "
                             f"{tuple(keys.shape)}.")  # fmt: skip
    spread = (attention > attention.mean(1, keepdim=True)).float().mean(1).clamp(min=1e-6)
    weights = (spread.sum() / spread).log() if len(attention) > 1 else torch.ones(1)
    weights = weights.to(attention)
    seed = int((weights[:, None] * attention).sum(0).argmin())
    features = torch.nn.functional.normalize((weights[:, None, None] * keys).transpose(0, 1).flatten(1), dim=-1)
    return features @ features[seed] > threshold


def found_objects(hidden: Hidden) -> torch.Tensor:
    """FOUND's rule on a tower's last block: bool (B, h, w), True for patches of objects."""
    if not hidden.prefix:
        raise ClipworksError("background 'objects' needs a tower with a class token. This one has none.")
    q, k = hidden.heads("q"), hidden.heads("k")
    looks = (q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0, hidden.prefix :]
    maps = [~found_background(a, b) for a, b in zip(looks, k[:, :, hidden.prefix :], strict=True)]
    return torch.stack(maps).unflatten(1, hidden.grid)


def long_objects(hidden: Hidden) -> torch.Tensor:
    """Patches whose vector behind a convolutional stem is longer than the image's mean: bool (B, h, w).

    Channels of such a stem answer to things it was trained to know; where nothing is to be known, few do.
    """
    if hidden.embedded is None:
        raise ClipworksError("long_objects needs what the stem gave (`enter` with memory=True).")
    length = hidden.embedded.float().norm(dim=-1)
    return (length > length.mean(1, keepdim=True)).unflatten(1, hidden.grid)
