"""Vectors of images and class names, computed once: the cache is keyed by the encoder's fingerprint and the image's
own bytes, so neither another encoder nor a changed file can be mistaken.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.labelled import LabelledSet
from ...data.loader import load_batches
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
            For an image that cannot be used: a benchmark leaves nothing out.
        """
        digests = [data.items[row].digest for row in rows]
        place, table = self._read(data.name)
        missing = {digest: row for row, digest in zip(rows, digests, strict=True) if digest not in place}
        work = list(missing.items())
        for start in range(0, len(work), AT_ONCE):
            part = work[start : start + AT_ONCE]
            items = [data.items[row] for _, row in part]
            batches = load_batches(items, self.encoder.preprocess, self.batch_size)
            label = f"{data.name}: embedding"
            bar = Progress(batches, len(items), label, unit=len, enabled=self.progress)
            new = np.concatenate([np.asarray(self.encoder.images(b.pixels), np.float32) for b in bar])
            table = new if not len(table) else np.concatenate([table, new])
            place |= {digest: len(place) + i for i, (digest, _) in enumerate(part)}
            self._write(data.name, place, table)
        self.known[data.name] = place, table
        return table[[place[digest] for digest in digests]]

    def words(self, names: Sequence[str], templates: str | Sequence[str]) -> np.ndarray:
        """Unit vectors (C, dim) of class names."""
        from ...zeroshot.classifier import class_vectors
        from ...zeroshot.templates import resolve_templates

        key = hashlib.sha256(json.dumps([list(names), resolve_templates(templates)]).encode()).hexdigest()[:24]
        path = self.folder / f"words-{key}.npy"
        if not path.exists():
            rows = class_vectors(names, self.encoder, templates=templates).numpy()
            write_atomically(path, lambda file: np.save(file, rows))
        return np.load(path)

    def _read(self, name: str) -> tuple[dict[str, int], np.ndarray]:
        if name not in self.known:
            path = self._path(name)
            self.known[name] = {}, np.empty((0, 0), np.float32)
            if path.exists():
                with np.load(path, allow_pickle=False) as file:
                    digests = [row.tobytes().hex() for row in file["digests"]]
                    self.known[name] = {digest: i for i, digest in enumerate(digests)}, file["vectors"]
        return self.known[name]

    def _write(self, name: str, place: dict[str, int], table: np.ndarray) -> None:
        digests = np.frombuffer(bytes.fromhex("".join(place)), np.uint8).reshape(-1, 32)
        write_atomically(self._path(name), lambda file: np.savez(file, digests=digests, vectors=table))

    def _path(self, name: str) -> Path:
        return self.folder / f"images-{slug(name)}.npz"


def data_digest(data: LabelledSet, rows: np.ndarray) -> str:
    """SHA-256 over key, class name and bytes of some images of a set."""
    state = hashlib.sha256()
    for row in rows:
        item = data.items[row]
        state.update(json.dumps([item.key, data.classes[data.y[row]], item.digest]).encode())
    return state.hexdigest()


def write_atomically(path: Path, write: Any) -> None:
    """Write a file beside its place and move it there when it is complete, so that nothing half is ever left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def slug(text: str) -> str:
    """A file name made of a text; texts that would share one get a few letters of their hash.

    >>> slug("human worse_label"), slug("gda")
    ('human-worse_label-b294', 'gda')
    """
    plain = "".join(c if c.isalnum() or c in "._" else "-" for c in text).strip("-.")[:80]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"
