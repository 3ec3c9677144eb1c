"""`link`: records of a table, each an image with a text, put into groups that mean the same thing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadImage, ClipworksError, check_choice
from ..zeroshot.seen import image_features
from .clippings import LINKAGES, Tuned, link_records, record_vectors, tune_links
from .common import group_scores

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


@dataclass
class Links:
    """Records in groups.

    Attributes
    ----------
    keys : of the records
    groups : number of each record's group
    nearest : cosine of each record with the nearest other of its group; NaN where it is alone
    weight, threshold : that were used
    tuned : how they were chosen, if they were
    scores : agreement with the labels of the table, if it has some
    errors : records that could not be used
    """

    keys: list[str]
    groups: np.ndarray
    nearest: np.ndarray
    weight: float
    threshold: float
    tuned: Tuned | None = None
    scores: dict[str, float] = field(default_factory=dict)
    errors: list[BadImage] = field(default_factory=list)

    def as_rows(self, alone: bool = False) -> list[dict[str, Any]]:
        """One dictionary per record, by group; `alone` adds records that are linked to no other."""
        order = [i for i in np.argsort(self.groups, kind="stable") if alone or not np.isnan(self.nearest[i])]
        return [
            {"group": int(self.groups[i]) + 1, "key": self.keys[i],
             "nearest": None if np.isnan(self.nearest[i]) else round(float(self.nearest[i]), 4)}
            for i in order
        ]  # fmt: skip


def link(
    source: Any,
    *,
    weight: float = 0.5,
    threshold: float = 0.13,
    linkage: str = "single",
    validation: str | Any = None,
    encoder: str | Encoder | None = None,
    batch_size: int = 32,
    allow_outside: bool = False,
    progress: bool | None = None,
) -> Links:
    """Put the records of a table into groups.

    Parameters
    ----------
    source : a table with columns for image, text and perhaps label, or anything with captions that `open_source` takes
    weight : share of the image in a record's vector; the rest is the text's
    threshold : largest cosine distance of a link; it depends on the encoder and the records, so tune it
    linkage : "single" or "average"
    validation : a table with labels, on which weight and threshold are chosen in the place of those given; none of its
        groups may be among the records
    encoder : name, path or encoder (default: the bundled one)
    batch_size : images per pass
    allow_outside : accept paths that leave the folder of a table
    progress : show a bar (default: on a terminal)

    Returns
    -------
    Links
    """
    from ..store.identity import obtain

    check_choice("linkage", linkage, LINKAGES)
    model = obtain(encoder)[0]
    tuned = None
    if validation is not None:
        image, text, _, labels, _ = _records(validation, model, batch_size, allow_outside, progress)
        if labels is None:
            raise ClipworksError("validation must have a label for every record. Got records without labels.")
        tuned = tune_links(image, text, labels, linkage=linkage)
        weight, threshold = tuned.weight, tuned.threshold
    image, text, keys, labels, errors = _records(source, model, batch_size, allow_outside, progress)
    groups = link_records(image, text, weight=weight, threshold=threshold, linkage=linkage)
    rows = record_vectors(image, text, weight)
    nearest = np.full(len(rows), np.nan)
    for group in np.flatnonzero(np.bincount(groups) > 1):
        members = np.flatnonzero(groups == group)
        score = rows[members] @ rows[members].T
        np.fill_diagonal(score, -np.inf)
        nearest[members] = score.max(1)
    scores = {} if labels is None else group_scores(labels, groups.tolist())
    return Links(keys, groups, nearest, weight, threshold, tuned, scores, errors)


def _records(
    source: Any, encoder: Any, batch_size: int, allow_outside: bool, progress: bool | None
) -> tuple[Any, ...]:
    """Vectors of images and of texts, keys, labels (None unless all have one), and what could not be used."""
    from ..data.sources import open_source

    items = {item.key: item for item in open_source(source, allow_outside=allow_outside)}
    lacking = [key for key, item in items.items() if item.error is None and not item.caption]
    if lacking:
        raise ClipworksError(f"source must give every image a text. {len(lacking)} of {len(items)} have none, for "
                             f"example {lacking[0]!r}.")  # fmt: skip
    found, errors = image_features(list(items.values()), encoder, batch_size=batch_size, progress=progress)
    if not len(found):
        raise ClipworksError("source must hold records that can be used. Got none"
                             + (f": {errors[0]}." if errors else "."))  # fmt: skip
    keys = list(found.keys)
    text = encoder.texts([items[key].caption or "" for key in keys]).numpy()
    labels = [items[key].label for key in keys]
    return found.vectors, text, keys, None if None in labels else labels, errors
