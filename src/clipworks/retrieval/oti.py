"""OTI: the vector of an image turned into a text's by learning pseudo-words, so that images are found as by words.

Claim: CLIP was trained to compare images with texts; likeness of two images is uncalibrated. Ranking images by the
inverted vector of the query image, which lies among the texts, is better than by its own vector (0.2 to 2 points
of mAP on most of 15 sets), while zero-shot classification, already between modalities, must get worse by it (CIFAR-100
56.0 -> 17.9).

Formula: v* = argmin over R pseudo-words of  1 - cos( f_T("a photo of" v*), psi ),  psi the image's vector;  OTI(psi) =
f_T("a photo of" v*) after S steps of AdamW.

Paper: Mistretta, Baldrati, Agnolucci et al. 2025, Cross the Gap: Exposing the Intra-modal Misalignment in
CLIP via Modality Inversion (ICLR).
Differs from the paper: all vectors begin with the same pseudo-words, so that a result depends on the seed and on
nothing beside it.
Defaults: S = 150, R = 1, lr 0.02, weight decay 0.01, start N(0, 0.02^2) from the released code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np  # noqa: F401 - of the example
import torch

from ..errors import ClipworksError, check_range
from ..prompts.words import Sentences, phrase
from ..registry import method
from .inversion import Inverted, invert

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

PLACEHOLDER = "*"


@method(card="cross-the-gap", level="M")
def textual_inversion(
    features: Any,
    encoder: Encoder,
    *,
    prompt: str = "a photo of",
    tokens: int = 1,
    steps: int = 150,
    lr: float = 0.02,
    weight_decay: float = 0.01,
    batch_size: int = 64,
    seed: int = 0,
) -> Inverted:
    """Bring vectors of images (or of anything) to the side of the texts.

    Parameters
    ----------
    features : vectors of shape (n, dim), or `Features`
    encoder : whose text tower is used; it needs a tokenizer and is not changed
    prompt : words before the pseudo-words
    tokens : number of pseudo-words R
    steps : of the optimiser; too many pull the vector back towards where it came from: choose it on validation data
    lr, weight_decay : of AdamW
    batch_size : vectors at a time; results do not depend on it
    seed : of the start

    Returns
    -------
    Inverted: `vectors` (n, dim), `tokens`, `losses`

    Raises
    ------
    ClipworksError
        If features do not fit the encoder or are not finite, or the prompt leaves no room.

    Inputs
    ------
    features of images; the images themselves are not needed

    Relations
    ---------
    `retrieval/ovi` goes the other way. The pseudo-words can stand in any sentence, as in Pic2Word and SEARLE.

    References
    ----------
    Mistretta et al. 2025, Cross the Gap: Exposing the Intra-modal Misalignment in CLIP via Modality Inversion

    Examples
    --------
    >>> from clipworks.encoders.toy import toy_encoder
    >>> encoder, image = toy_encoder(), np.eye(2, 8)
    >>> textual_inversion(image, encoder, steps=3).vectors.shape
    (2, 8)
    """
    sentence = pseudo_sentence(encoder, prompt, int(check_range("tokens", tokens, 1)))

    def encode(learned: torch.Tensor) -> torch.Tensor:
        return sentence.encode_own(learned, torch.zeros(len(learned), dtype=torch.long, device=learned.device))

    shape = (tokens, encoder.config.text.width)
    return invert(features, encoder, encode, shape, steps=steps, lr=lr, weight_decay=weight_decay,
                  batch_size=batch_size, seed=seed)  # fmt: skip


def pseudo_sentence(encoder: Encoder, prompt: str, tokens: int) -> Sentences:
    """One sentence that ends with `tokens` slots for learned vectors; its end token is read where it stands."""
    before = phrase(encoder, prompt)
    whole = phrase(encoder, " ".join([prompt, *[PLACEHOLDER] * tokens]))
    if whole[: len(before)] != before or len(whole) != len(before) + tokens:
        raise ClipworksError(f"prompt must leave room for {tokens} pseudo-words in {encoder.context_length} tokens. "
                             f"Got {prompt!r}.")  # fmt: skip
    row = encoder.tokenize(" ".join([prompt, *[PLACEHOLDER] * tokens]))[0].tolist()
    head = next(i for i in range(len(row)) if row[i : i + len(whole)] == whole)
    end = head + len(whole)
    ids, slots = torch.tensor([row]), torch.full((1, len(row)), -1)
    slots[0, end - tokens : end] = torch.arange(tokens)
    ended = end < len(row) and row[end] == encoder.tokenizer.eot_id
    length = torch.tensor([end + ended])
    return Sentences(encoder, ids.to(encoder.device), slots.to(encoder.device), length.to(encoder.device), 0)
