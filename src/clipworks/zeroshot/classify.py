"""Sort images into classes given by their names, by a few labelled images, or by any method that uses either.

A collection, features, or images that were not embedded yet. Names alone need no image in memory at a time but its
batch; the other methods (`by_name`) read the features of all images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadImage, ClipworksError, check_range
from ..types import Classification, Features
from .classifier import check_names, class_vectors
from .seen import CHUNK, collection_of, finite, image_features, labelled_features, length
from .sentences import softmax, unit

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder
    from ..store.collection import Collection


def classify(
    source: Any,
    names: Sequence[str] | None = None,
    *,
    shots: str | Path | Features | Collection | None = None,
    method: str | None = None,
    descriptions: str | Path | Mapping[str, Any] | None = None,
    explain: bool = False,
    budget: float | None = None,
    encoder: str | Encoder | None = None,
    templates: str | Sequence[str] = "default",
    scale: float | None = None,
    where: str | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    on_error: str = "report",
    progress: bool | None = None,
) -> Classification:
    """Give every image the probability of each class, from the class names alone or with labelled images.

    Parameters
    ----------
    source : a collection or its path, `Features`, or images as `open_source` takes them (folder, table, list ...)
    names : class names in words a reader would use (default: the labels of the shots)
    shots : a few labelled images: a folder with one folder per class, a table with a label column, a collection or
        `Features` with labels
    method : any classifier by name, such as auto, ridge, gda, fudd (default: zero_shot; with shots auto, which chooses)
    descriptions : JSON file of what the method is told of the classes, {"hen": ["a red comb", ...], ...}
    explain : say of each image what speaks for its class
    budget : auto: seconds after which no further method is tried
    encoder : a name, a path or an encoder (default: the one that made the collection; for images the bundled one)
    templates : name of a set (default, simple, name, imagenet), a sentence with {} for the name, or several
    scale : sharpness of the probabilities (default: the encoder's logit scale); the order of classes does not change
    where : collections: only the rows that meet this condition, such as "label = 'cat'"
    batch_size, workers : images: how many per pass, and how many threads decode
    on_error : images: "raise" at the first that cannot be used, "skip" it, or "report" it in `errors`
    progress : None shows a bar on a terminal

    Returns
    -------
    Classification, in the order of the source (collections: by key); for a method other than the plain one a
    `by_name.Decision`, with the reasons, the leaderboard and the shots that could not be used

    Raises
    ------
    ClipworksError
        If names or templates cannot be used, or an option does not apply to the source.
    CollectionError
        If the encoder is not the one that made the collection.

    Examples
    --------
    >>> import torch
    >>> class Toy:
    ...     logit_scale, fingerprint = 10.0, ""
    ...     def texts(self, sentences): return torch.eye(2)[["dog" in s for s in sentences]]
    >>> features = Features(np.eye(2, dtype="float32"), keys=["1.jpg", "2.jpg"])
    >>> classify(features, ["cat", "dog"], encoder=Toy()).labels
    ['cat', 'dog']
    """
    if names is None and shots is None:
        raise ClipworksError("names must be given, or shots whose labels are the names. Got neither.")
    names = None if names is None else check_names(names)
    kept = collection_of(source)
    if kept is None and where is not None:
        raise ClipworksError(f"where applies to collections only. Got {where!r}.")
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "on_error": on_error, "progress": progress}
    if names is None or shots is not None or method not in (None, "zero_shot") or descriptions is not None or explain:
        told = {"descriptions": descriptions, "templates": templates, "scale": scale, "budget": budget}
        return _by_method(source, kept, names, encoder, shots, method, where, told | {"explain": explain}, options)
    if budget is not None:
        raise ClipworksError("budget must be left out where only one method is tried.")
    if isinstance(source, Features):
        return _of_features(source, names, _ready(encoder, source.fingerprint), templates, scale)
    if kept is not None:
        return _of_collection(kept, names, encoder, templates, scale, where)
    from ..data.loader import load_batches
    from ..data.sources import open_source
    from ..progress import Progress

    opened = open_source(source)
    model = _ready(encoder)
    words = class_vectors(names, model, templates=templates)
    scale = _scale(scale, model)
    keys: list[str] = []
    errors: list[BadImage] = []
    parts = []
    batches = load_batches(opened, model.preprocess, batch_size, workers, on_error)
    bar = Progress(batches, length(opened), "classifying", unit=lambda b: len(b) + len(b.errors), enabled=progress)
    for batch in bar:
        errors += batch.errors
        if len(batch):
            keys += batch.keys
            parts.append(_probabilities(model.images(batch.pixels).numpy(), words.numpy(), scale))
    found = np.concatenate(parts) if parts else np.empty((0, len(names)), np.float32)
    return Classification(keys, names, found, errors)


def _by_method(
    source: Any,
    kept: Collection | None,
    names: list[str] | None,
    encoder: str | Encoder | None,
    shots: Any,
    method: str | None,
    where: str | None,
    told: dict[str, Any],
    options: dict[str, Any],
) -> Classification:
    """Any other method than names alone: the features of shots and images, then the method by its name."""
    from ..store.identity import encoder_of
    from .by_name import check_method, check_shown, decide

    asked = {name: value for name, value in told.items() if name != "explain"}
    method = check_method(method or ("zero_shot" if shots is None else "auto"), shots=shots, **asked)
    made_by = source.fingerprint if isinstance(source, Features) else ""
    model = _ready(encoder, made_by) if kept is None else encoder_of(kept, encoder)
    labelled: Features | None = None
    failed: list[BadImage] = []
    if shots is not None:
        labelled, names, failed = labelled_features(shots, model, names, **options)
        check_shown(method, names, labelled)
    seen, errors = image_features(source if kept is None else kept, model, where=where, doing="classifying", **options)
    found = decide(seen, names or [], model, method, shots=labelled, **told)
    found.errors, found.shot_errors = errors, failed
    return found


def _of_collection(
    collection: Collection,
    names: list[str],
    encoder: str | Encoder | None,
    templates: Any,
    scale: float | None,
    where: str | None,
) -> Classification:
    from ..store.identity import encoder_of

    model = encoder_of(collection, encoder)
    rows = np.arange(len(collection)) if where is None else collection.where(where)
    vectors = collection.vectors if where is None else collection.vectors[rows]
    keys = collection.keys if where is None else [collection.keys[i] for i in rows]
    return _of_features(Features(vectors, keys), names, model, templates, scale)


def _of_features(
    features: Features, names: list[str], model: Any, templates: Any, scale: float | None
) -> Classification:
    words = class_vectors(names, model, templates=templates).numpy()
    dim, given = words.shape[1], features.vectors.shape[1]
    if len(features) and given != dim:
        raise ClipworksError(f"features must have the encoder's {dim} columns. Got {given}.")
    found = np.empty((len(features), len(names)), np.float32)
    for start in range(0, len(features), CHUNK):
        found[start : start + CHUNK] = _probabilities(finite(features, start), words, _scale(scale, model))
    return Classification(list(features.keys), names, found)


def _probabilities(images: np.ndarray, words: np.ndarray, scale: float) -> np.ndarray:
    """Softmax of scale * cosine over the classes; images stored in 16 bits do not have length 1 to the last digit."""
    return softmax(scale * (unit(images) @ words.T)).astype(np.float32)


def _scale(scale: float | None, model: Any) -> float:
    return float(model.logit_scale) if scale is None else float(check_range("scale", scale, 0))


def _ready(encoder: str | Encoder | None, fingerprint: str = "") -> Any:
    """The encoder itself; where features say what made them, it must be that one."""
    from ..encoders.loading import resolve

    model: Any = resolve(encoder)
    if fingerprint and model.fingerprint and fingerprint != model.fingerprint:
        given = model.fingerprint[:12]
        raise ClipworksError(f"encoder must be the one that made the features, {fingerprint[:12]}. Got {given}.")
    return model
