"""Sentences about good and defective things: states ("flawless {}") inside templates ("a photo of {}.").

WinCLIP's prompt ensemble (Jeong et al. 2023), of which AdaptCLIP uses a variant, and AnoVL's domain-aware one (Deng et
al. 2023). The states are those of the papers; of the templates, which are variations of a few sentences, a shorter list
is kept here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import ClipworksError, check_choice
from ..zeroshot.sentences import as_vectors, encode, unit

GOOD = ("{}", "flawless {}", "perfect {}", "unblemished {}", "{} without flaw", "{} without defect",
        "{} without damage")  # fmt: skip
BAD = ("damaged {}", "{} with flaw", "{} with defect", "{} with damage")
PHOTOS = (
    "a cropped photo of the {}.", "a cropped photo of a {}.", "a close-up photo of a {}.",
    "a close-up photo of the {}.",
    "a bright photo of a {}.", "a bright photo of the {}.", "a dark photo of a {}.", "a dark photo of the {}.",
    "a jpeg corrupted photo of a {}.", "a jpeg corrupted photo of the {}.", "a blurry photo of the {}.",
    "a blurry photo of a {}.", "a photo of a {}.", "a photo of the {}.", "a photo of a small {}.",
    "a photo of the small {}.", "a photo of a large {}.", "a photo of the large {}.",
    "a photo of the {} for visual inspection.", "a photo of a {} for visual inspection.",
    "a photo of the {} for anomaly detection.", "a photo of a {} for anomaly detection.",
)  # fmt: skip
MORE_BAD = ("damaged {}", "imperfect {}", "blemished {}", "{} with flaw", "{} with defect", "{} with damage",
            "broken {}")  # fmt: skip
DOMAINS = {
    "industrial": ("an industrial photo of a {}.", "a cropped industrial photo of the {}.",
                   "an industrial image of a {}.", "a close-up industrial image of the {}.",
                   "a manufacturing photo of a {}.", "a cropped manufacturing image of the {}."),
    "textural": ("a textural photo of a {}.", "a cropped textural photo of the {}.", "a surface photo of a {}.",
                 "a close-up surface image of the {}.", "a textural image of a {}.",
                 "a cropped surface image of the {}."),
}  # fmt: skip


def sentences(name: str, ensemble: str = "winclip") -> tuple[list[str], list[str]]:
    """Sentences about good and about defective things of a name.

    Parameters
    ----------
    name : of the object, in words a reader would use ("circuit board", not "pcb_1")
    ensemble : "winclip", or AnoVL's "industrial" (objects) and "textural" (surfaces)

    Examples
    --------
    >>> good, bad = sentences("tile")
    >>> len(good), len(bad), bad[0]
    (154, 88, 'a cropped photo of the damaged tile.')
    """
    check_choice("ensemble", ensemble, ("winclip", *DOMAINS))
    if not isinstance(name, str) or not name.strip():
        raise ClipworksError(f"name must be the object in words. Got {name!r}.")
    templates = PHOTOS if ensemble == "winclip" else (*PHOTOS, *DOMAINS[ensemble])
    pair = (GOOD, BAD) if ensemble == "winclip" else (GOOD, MORE_BAD)
    return tuple([t.replace("{}", s.replace("{}", name)) for s in states for t in templates] for states in pair)  # type: ignore[return-value]


def state_vectors(text: Any, name: str, encoder: Any, ensemble: str = "winclip") -> np.ndarray:
    """Return two unit vectors (2, dim), of good and of defective things: as given, or the means of their sentences."""
    if text is None:
        groups = [encode(group, encoder) for group in sentences(name, ensemble)]
        return unit(np.stack([group.mean(0) for group in groups]))
    found = as_vectors("text", text, encoder.dim)
    if len(found) != 2:
        raise ClipworksError(f"text must hold two vectors, of good and of defective things. Got {len(found)}.")
    return found


def bad_share(features: torch.Tensor, text: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Probability of the second of two unit texts (2, dim), by their scaled cosines with unit features (..., dim)."""
    return (scale * (features @ text.to(features).T)).softmax(-1)[..., 1]
