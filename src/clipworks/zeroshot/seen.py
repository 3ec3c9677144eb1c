"""Images as features in memory, and labelled ones with the class names that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadImage, ClipworksError, closest, naming
from ..types import Features

CHUNK = 65536  # rows of features at a time


def collection_of(source: Any) -> Any:
    """The collection that a source is or names, or None."""
    from ..store.collection import Collection
    from ..store.table import is_collection

    if isinstance(source, Collection) or (isinstance(source, str | Path) and is_collection(Path(source))):
        return Collection.open(source)
    return None


def image_features(
    source: Any,
    encoder: Any,
    *,
    where: str | None = None,
    label_from: str = "none",
    batch_size: int = 32,
    workers: int | None = None,
    on_error: str = "report",
    progress: bool | None = None,
    doing: str = "embedding",
) -> tuple[Features, list[BadImage]]:
    """Return features of a collection, of `Features` or of images, and the images that could not be used.

    Parameters
    ----------
    source : a collection or its path, `Features`, or images as `open_source` takes them
    encoder : has made the collection or the features; images are embedded by it
    where : collections: only the rows that meet this condition
    label_from : folders of images: "folder" takes the first folder as the label
    batch_size, workers, on_error, progress : of embedding, as in `classify`
    doing : what the bar says
    """
    kept = collection_of(source)
    if kept is not None:
        whole = kept.features()
        return _checked(whole if where is None else _rows(whole, kept.where(where)), encoder), []
    if isinstance(source, Features):
        return _checked(source, encoder), []
    from ..data.folder import FolderSource
    from ..data.loader import load_batches
    from ..data.sources import open_source
    from ..progress import Progress

    opened = open_source(source)
    if isinstance(opened, FolderSource):
        opened.label_from = label_from
    keys: list[str] = []
    labels: list[str | None] = []
    errors: list[BadImage] = []
    parts: list[np.ndarray] = []
    batches = load_batches(opened, encoder.preprocess, batch_size, workers, on_error)
    for batch in Progress(batches, length(opened), doing, unit=lambda b: len(b) + len(b.errors), enabled=progress):
        errors += batch.errors
        if len(batch):
            keys += batch.keys
            labels += [item.label for item in batch.items]
            parts.append(np.asarray(encoder.images(batch.pixels).numpy(), np.float32))
    vectors = np.concatenate(parts) if parts else np.empty((0, encoder.dim), np.float32)
    given = np.array(labels, dtype=object) if any(label is not None for label in labels) else None
    return Features(vectors, keys, given, fingerprint=encoder.fingerprint), errors


def labelled_features(
    source: Any, encoder: Any, names: Sequence[str] | None, **options: Any
) -> tuple[Features, list[str], list[BadImage]]:
    """Return features whose labels are class names, all class names, and the images that could not be used.

    Parameters
    ----------
    source : a folder of one folder per class, a table with a label column, a labelled collection or `Features`
    encoder : of the images that will be classified
    names : the classes; labels are matched as they stand, else without regard to case, underscores and hyphens. None:
        the labels are the names
    options : of `image_features`

    Raises
    ------
    ClipworksError
        If there are fewer than two labelled images that can be used, or one is of none of the classes, or the labels
        that should be the names are all the same.
    """
    with naming("shots"):
        found, errors = image_features(source, encoder, label_from="folder", doing="embedding shots", **options)
    labels: list[Any] = [None] * len(found) if found.labels is None else list(found.labels)
    usable = [i for i, label in enumerate(labels) if str(label or "").strip()]
    errors += [BadImage(found.keys[i], "has no label") for i in sorted(set(range(len(labels))) - set(usable))]
    if len(usable) < 2:
        said = f"; left out: {'; '.join(map(str, errors[:3]))}." if errors else "."
        hint = " Labels are the names of subfolders, or a table's column." if len(usable) < len(labels) else ""
        raise ClipworksError("shots must hold at least 2 labelled images that can be used. "
                             f"Got {len(usable)}{said}{hint}")  # fmt: skip
    known = list(names) if names is not None else sorted({str(labels[i]) for i in usable})
    if len(known) < 2 and names is None:
        raise ClipworksError(f"shots must be of at least 2 classes where names are not given. Got {known[0]!r} alone.")
    folded: dict[str, list[str]] = {}
    for name in known:
        folded.setdefault(_fold(name), []).append(name)
    matched = []
    for i in usable:
        label = str(labels[i])
        near = [label] if label in known else folded.get(_fold(label), [])
        if len(near) != 1:
            hint = f" It could be {' or '.join(map(repr, near))}." if near else closest(label, known)
            raise ClipworksError(f"shots must be of the classes in names. {found.keys[i]!r} is of {label!r}.{hint}")
        matched += near
    kept = _rows(found, np.array(usable))
    return Features(kept.vectors, kept.keys, np.array(matched), fingerprint=kept.fingerprint), known, errors


def _rows(features: Features, rows: np.ndarray) -> Features:
    labels = None if features.labels is None else features.labels[rows]
    keys = [features.keys[i] for i in rows]
    return Features(np.asarray(features.vectors[rows], np.float32), keys, labels, fingerprint=features.fingerprint)


def length(source: Any) -> int | None:
    """How many items a source has, None where it does not know."""
    try:
        return len(source)
    except TypeError:
        return None


def _checked(features: Features, encoder: Any) -> Features:
    """Features of this encoder without a bad number, or an error that says what is wrong."""
    made_by = features.fingerprint
    if made_by and encoder.fingerprint and made_by != encoder.fingerprint:
        raise ClipworksError(f"encoder must be the one that made the features, {made_by[:12]}. "
                             f"Got {encoder.fingerprint[:12]}.")  # fmt: skip
    if len(features) and features.vectors.shape[1] != encoder.dim:
        raise ClipworksError(f"features must have the encoder's {encoder.dim} columns. "
                             f"Got {features.vectors.shape[1]}.")  # fmt: skip
    for start in range(0, len(features), CHUNK):
        finite(features, start)
    return features


def finite(features: Features, start: int) -> np.ndarray:
    """The next `CHUNK` vectors from `start` in float32, or an error that names the first with NaN or infinity."""
    part = np.asarray(features.vectors[start : start + CHUNK], np.float32)
    bad = ~np.isfinite(part).all(1)
    if bad.any():
        key = features.keys[start + int(bad.argmax())]
        raise ClipworksError(f"features must be finite. Got NaN or infinity for {key!r}.")
    return part


def _fold(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
