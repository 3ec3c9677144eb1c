"""`differ`: what is truer of one set of images than of another, from folders or collections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ClipworksError, check_range
from ..zeroshot.seen import collection_of, image_features
from .visdiff import Differences, check_phrases, propose, visdiff
from .vocabulary import visual_vocabulary

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


def differ(
    first: Any,
    second: Any,
    *,
    phrases: Sequence[str] | str | Path | None = None,
    proposer: Callable[[], Sequence[str]] | None = None,
    count: int = 100,
    centre: bool = True,
    held_out: float = 0.5,
    level: float = 0.05,
    most: int = 5000,
    encoder: str | Encoder | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool | None = None,
) -> Differences:
    """Say what is truer of the first set of images than of the second.

    Parameters
    ----------
    first, second : folders or other sources of images, collections, or `Features`
    phrases : to choose from, or a text file with one per line (default: the built-in vocabulary of about 230)
    proposer : returns phrases in their place, such as a call of `visdiff.proposed_by`
    count : phrases of the vocabulary that are ranked, those that point most from the second set to the first
    centre : take the mean of the built-in vocabulary's vectors from every phrase's. Images of one kind may be near to
        all words (or far from all); without it nearly every phrase then separates the sets. The paper does not
    held_out : share of the images that phrases are ranked on; the rest is what they are chosen by. Where no choice is
        made, all images are ranked on
    level : of significance, after correction for the number of phrases
    most : images of each set that are used
    encoder : name, path or encoder (default: what made the collections, else the bundled one)
    batch_size : images per pass
    seed : of what is held out
    progress : show a bar (default: on a terminal)

    Returns
    -------
    Differences
    """
    check_range("held_out", held_out, 0.05, 1.0)
    check_range("count", count, 1)
    model = _encoder(encoder, first, second)
    told = _phrases(phrases) if proposer is None else check_phrases(list(proposer()))
    sets = []
    for name, source in (("first", first), ("second", second)):
        found, errors = image_features(source, model, batch_size=batch_size, progress=progress)
        if not len(found):
            reason = f": {errors[0]}" if errors else ""
            raise ClipworksError(f"{name} must hold images that can be used. Got none{reason}.")
        sets.append(np.asarray(found.vectors, np.float32))
    text = model.texts(told).numpy()
    if centre:
        text = text - model.texts(visual_vocabulary()).numpy().mean(0)
    one, other = sets
    if len(told) > count:
        if min(len(one), len(other)) < 2:
            sizes = f"{len(one)} and {len(other)}; or give count={len(told)}"
            raise ClipworksError("first and second must hold 2 images each, to choose phrases by some and rank on the "
                                 f"rest. Got {sizes}.")  # fmt: skip
        (seen_one, one), (seen_other, other) = (_split(x, held_out, seed) for x in sets)
        kept = propose(seen_one, seen_other, text, count)
        told, text = [told[i] for i in kept], text[kept]
    return visdiff(one, other, told, text, level=level, most=most, seed=seed)


def _encoder(given: Any, *sources: Any) -> Any:
    from ..store.identity import encoder_of, obtain

    for source in sources:
        kept = collection_of(source)
        if kept is not None:
            return encoder_of(kept, given)
    return obtain(given)[0]


def _phrases(given: Sequence[str] | str | Path | None) -> list[str]:
    if given is None:
        return visual_vocabulary()
    if isinstance(given, str | Path):
        path = Path(given)
        if not path.is_file():
            raise ClipworksError(f"phrases must be a text file of one phrase per line, or a list. Got {str(given)!r}.")
        given = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return check_phrases(given)


def _split(rows: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that phrases are chosen by, and those they are ranked on; at least one each."""
    order = np.random.default_rng(seed).permutation(len(rows))
    cut = min(len(rows) - 1, max(1, round((1 - share) * len(rows))))
    return rows[np.sort(order[:cut])], rows[np.sort(order[cut:])]
