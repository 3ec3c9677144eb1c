"""Vectors of images and class names, computed once: the cache is keyed by the encoder's fingerprint and the image's
own bytes, so neither another encoder nor a changed file can be mistaken.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...atomic import write_atomically
from ...data.item import Item
from ...data.labelled import LabelledSet
from ...data.loader import Batch, load_batches
from ...errors import BadImage
from ...progress import Progress

AT_ONCE = 2048  # images between two savings of the cache


class FeatureCache:
    """Vectors of one encoder.

    Parameters
    ----------
    folder : where caches of all encoders lie
    encoder : the encoder; any object with `images`, `texts`, `preprocess` and `fingerprint`
    batch_size : images per pass
    progress : as in `Progress`
    """

    def __init__(self, folder: Path, encoder: Any, batch_size: int = 32, progress: bool | None = None):
        self.folder, self.encoder = folder / encoder.fingerprint[:16], encoder
        self.batch_size, self.progress = batch_size, progress
        self.known: dict[str, tuple[dict[str, int], np.ndarray]] = {}

    def vectors(self, data: LabelledSet, rows: np.ndarray) -> np.ndarray:
        """Unit vectors (n, dim) of some images of a set, from the cache or computed and put there.

        Raises
        ------
        BadImage
            For the first image that cannot be used; `fill` says which these are.
        """
        for error in self.fill(data, rows):
            raise error
        place, table = self._read(data.name)
        return table[[place[data.items[row].digest] for row in rows]]

    def fill(self, data: LabelledSet, rows: np.ndarray) -> list[BadImage]:
        """Compute what the cache lacks of some images of a set; returns the images that cannot be used."""
        place, table = self._read(data.name)
        missing: dict[str, Item] = {}
        errors: list[BadImage] = []
        for item in (data.items[row] for row in rows):
            try:
                if item.digest not in place:
                    missing[item.digest] = item
            except BadImage as error:
                errors.append(error)
        work = list(missing.values())
        for start in range(0, len(work), AT_ONCE):
            part = work[start : start + AT_ONCE]
            batches = load_batches(part, self.encoder.preprocess, self.batch_size, on_error="report")
            new = [table] if len(table) else []
            for batch in Progress(batches, len(part), f"{data.name}: embedding", unit=_taken, enabled=self.progress):
                errors += batch.errors
                if len(batch):
                    place |= {item.digest: len(place) + i for i, item in enumerate(batch.items)}
                    new.append(np.asarray(self.encoder.images(batch.pixels), np.float32))
            if new:
                table = np.concatenate(new)
                self.known[data.name] = place, table
                self._write(data.name, place, table)
        return errors

    def words(self, names: Sequence[str], templates: str | Sequence[str]) -> np.ndarray:
        """Unit vectors (C, dim) of class names."""
        from ...zeroshot.classifier import class_vectors
        from ...zeroshot.templates import resolve_templates

        key = hashlib.sha256(json.dumps([list(names), resolve_templates(templates)]).encode()).hexdigest()[:24]
        path = self.folder / f"words-{key}.npy"
        kept = _kept(path)
        if kept is None:
            kept = class_vectors(names, self.encoder, templates=templates).numpy()
            _keep(path, lambda file: np.save(file, kept))
        return kept

    def _read(self, name: str) -> tuple[dict[str, int], np.ndarray]:
        if name not in self.known:
            self.known[name] = {}, np.empty((0, 0), np.float32)
            if (kept := _kept(self._path(name))) is not None:
                digests = [row.tobytes().hex() for row in kept["digests"]]
                self.known[name] = {digest: i for i, digest in enumerate(digests)}, kept["vectors"]
        return self.known[name]

    def _write(self, name: str, place: dict[str, int], table: np.ndarray) -> None:
        digests = np.frombuffer(bytes.fromhex("".join(place)), np.uint8).reshape(-1, 32)
        _keep(self._path(name), lambda file: np.savez(file, digests=digests, vectors=table))

    def _path(self, name: str) -> Path:
        return self.folder / f"images-{slug(name)}.npz"


def data_digest(data: LabelledSet, rows: np.ndarray) -> str:
    """SHA-256 over key, class name and bytes of some images of a set."""
    state = hashlib.sha256()
    for row in rows:
        item = data.items[row]
        state.update(json.dumps([item.key, data.classes[data.y[row]], item.digest]).encode())
    return state.hexdigest()


def _taken(batch: Batch) -> int:
    return len(batch) + len(batch.errors)


def _kept(path: Path) -> Any:
    """The array of a file, or its arrays by name; None where there is none, or a damaged one, to be computed again."""
    try:
        found = np.load(path, allow_pickle=False)
        return found if isinstance(found, np.ndarray) else dict(found)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _keep(path: Path, save: Callable[[IO[bytes]], None]) -> None:
    def write(place: Path) -> None:
        with place.open("wb") as file:
            save(file)

    write_atomically(path, write)


def slug(text: str) -> str:
    """A file name made of a text; texts that would share one get a few letters of their hash.

    >>> slug("human worse_label"), slug("gda")
    ('human-worse_label-b294', 'gda')
    """
    plain = "".join(c if c.isalnum() or c in "._" else "-" for c in text).strip("-.")[:80]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"
