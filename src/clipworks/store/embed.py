"""`embed`: images of any source into a collection, once each; safe to stop at any moment and to run again.

A second run over the same source does nothing; new images are added, changed ones encoded anew, deleted ones removed.
Rows are committed every `commit_every` images, so a kill costs at most that many. Every batch has the same shape
(the last one is filled up), so that an image gets the same bytes whichever batch it falls into.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadImage, ClipworksError, CollectionError, check_choice, check_range, need
from ..progress import Progress
from . import snapshot
from .changes import Known, UserColumns, read_once
from .collection import new_meta
from .identity import check_same, describe, obtain, recorded
from .table import DTYPES, is_collection, make_schema, open_table, read_meta
from .writer import Writer

if TYPE_CHECKING:
    from ..data.item import Item
    from ..data.loader import Batch
    from ..encoders.encoder import Encoder
    from .engine_ray import RayBatches

PATIENCE = 10.0  # seconds after which encoded rows are committed even if they are few
ON_ERROR = ("report", "skip", "raise")
ENGINES = ("local", "ray")


@dataclass
class EmbedReport:
    """What `embed` did.

    Attributes
    ----------
    path : the collection
    n_added, n_changed : images encoded: new ones, and ones whose bytes had changed
    n_refreshed : images of which only label, caption, columns or modification time had changed
    n_skipped : images that were there already, unchanged
    n_removed : rows removed because the source no longer has the image
    n_left_out : images that could not be used
    n_rows : rows in the collection now
    left_out : the images left out, each with `key` and `reason` (empty with on_error="skip")
    notes : what else a person should know, a sentence each
    ignored : file ending -> files of the source that are no images
    seconds : of wall time
    wait_share : share of that time in which the encoder (with engine="ray": the actors') waited for images
    """

    path: str
    n_added: int = 0
    n_changed: int = 0
    n_refreshed: int = 0
    n_skipped: int = 0
    n_removed: int = 0
    n_left_out: int = 0
    n_rows: int = 0
    left_out: list[BadImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    wait_share: float = 0.0

    def __str__(self) -> str:
        counts = {
            "added": self.n_added, "changed": self.n_changed, "refreshed": self.n_refreshed,
            "unchanged": self.n_skipped, "removed": self.n_removed, "left out": self.n_left_out,
        }  # fmt: skip
        done = ", ".join(f"{n} {name}" for name, n in counts.items() if n or name == "added")
        encoded = self.n_added + self.n_changed
        rate = f", {encoded / self.seconds:.1f} images/s, {self.wait_share:.0%} waiting for images" if encoded else ""
        return f"{self.path}: {done}; {self.n_rows} rows; {self.seconds:.1f} s{rate}"

    def as_rows(self) -> list[dict[str, str]]:
        """One dictionary per image left out (key, reason)."""
        return [{"key": error.key, "reason": error.reason} for error in self.left_out]


def embed(
    source: Any,
    out: str | os.PathLike,
    *,
    encoder: str | Encoder | None = None,
    batch_size: int = 32,
    precision: str | None = None,
    dtype: str | None = None,
    fast: bool | None = None,
    device: str | None = None,
    workers: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    prune: bool = True,
    on_error: str = "report",
    commit_every: int = 256,
    progress: bool | None = None,
    engine: str = "local",
    actors: int | None = None,
    kind: str = "auto",
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    key_column: str | None = None,
    captions: bool = True,
    label_from: str = "none",
    allow_outside: bool = False,
    split: str = "train",
    every: float = 1.0,
) -> EmbedReport:
    """Encode the images of a source into a collection.

    Parameters
    ----------
    source : a folder, a list of paths or `Item`s, a file of paths, a CSV / TSV / Parquet table, webdataset tar
        files, a Hugging Face dataset, a video (see `data.sources.open_source`)
    out : the collection's folder; made if it is not there, continued if it is
    encoder : an `Encoder`, or a name or path for `load`; default: the encoder that made the collection, the
        model inside the package for a new one
    batch_size : images per pass of the encoder
    precision : "fp32", "bf16", "fp16" or "auto" (default: the encoder's or the collection's own)
    dtype : how vectors are stored, "float16" (default, relative error at most 2^-11) or "float32"
    fast : decode large JPEGs at a fraction of their size (faster, small loss; default: as the collection was made)
    device : where an encoder that is named runs: "cpu", "cuda", or "auto" for CUDA where there is one (default: what
        the environment variable CLIPWORKS_DEVICE says, else "cpu")
    workers : decoding threads (default: one per core)
    resume : continue a collection that is there; False refuses it
    overwrite : replace a collection that is there, whatever made it
    prune : remove rows whose images are no longer in the source they came from
    on_error : what to do with an image that cannot be used: "report" lists it, "skip" counts it, "raise" stops
    commit_every : rows per commit; what a kill can cost
    progress : show a progress bar (default: on a terminal)
    engine : "local" encodes in this process; "ray" in actors on this machine or on a cluster (RAY_ADDRESS names it),
        which gives the same collection (see docs/scale.md)
    actors : how many with engine="ray" (default: as many as the machines' cores, or GPUs, allow)
    kind : what the source is: "auto", "folder", "paths", "list", "table", "parquet", "webdataset",
        "huggingface", "video"
    image_column, caption_column, label_column, key_column : columns of a table (default: guessed)
    captions : read the captions beside the images of a folder
    label_from : "folder" takes the first folder of an image as its label, "none" does not
    allow_outside : accept paths that leave the folder of a table
    split : which split of a Hugging Face dataset
    every : seconds between the frames of a video

    Returns
    -------
    EmbedReport

    Raises
    ------
    CollectionError
        If another encoder made the collection, another process writes it, it is damaged or cannot be written.
    BadImage
        For the first image that cannot be used, with on_error="raise"; what was encoded before is kept.
    """
    from ..data.sources import open_source

    check_choice("on_error", on_error, ON_ERROR)
    check_range("batch_size", batch_size, 1)
    check_range("commit_every", commit_every, 1)
    _check_engine(engine, actors)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    path, started = Path(out), time.perf_counter()
    opened = open_source(
        source, kind=kind, image_column=image_column, caption_column=caption_column, label_column=label_column,
        key_column=key_column, captions=captions, label_from=label_from, allow_outside=allow_outside, split=split,
        every=every,
    )  # fmt: skip
    there = is_collection(path)
    if there and not resume and not overwrite:
        raise CollectionError(
            f"there is a collection at {str(path)!r} already; give resume=True to continue it, or overwrite=True."
        )
    meta = read_meta(open_table(path).schema, path) if there and not overwrite else {"encoder": {}}
    model, name = obtain(encoder, meta["encoder"], precision, fast, device)
    identity = describe(model, name)
    check_same(
        path, meta["encoder"], identity, "choose another place, give the encoder that made it, or overwrite=True."
    )
    made_by = recorded(model, name) if not meta["encoder"] else identity
    schema = make_schema(model.dim, dtype or "float16", new_meta(made_by))
    with Writer(path, schema, overwrite=overwrite) as writer:
        if dtype not in (None, writer.dtype) or writer.dim != model.dim:
            raise CollectionError(
                f"collection {str(path)!r} holds {writer.dtype} vectors of length {writer.dim}; "
                f"{dtype or writer.dtype} of length {model.dim} do not fit. Leave dtype out, or overwrite=True."
            )
        run = _Run(writer, model, EmbedReport(str(path)), batch_size, workers, on_error, commit_every)
        remote = None
        if engine == "ray":
            from .engine_ray import RayBatches

            remote = RayBatches(run.todo(opened), model, name, batch_size, workers, actors)
        run.all(opened, progress, prune, remote)
        report = run.report
        writer.tidy()
        report.n_rows = writer.table.count_rows()
        report.ignored = dict(opened.ignored)
        try:
            snapshot.current(path)  # the first search need not wait for it
        except (CollectionError, OSError) as error:
            report.notes.append(f"the copy for searching could not be made now: {error}")
    report.seconds = time.perf_counter() - started
    return report


class _Run:
    """One pass over a source."""

    def __init__(
        self,
        writer: Writer,
        model: Encoder,
        report: EmbedReport,
        batch_size: int,
        workers: int | None,
        on_error: str,
        commit: int,
    ):
        self.writer, self.model, self.report = writer, model, report
        self.batch_size, self.workers, self.on_error, self.commit = batch_size, workers, on_error, commit
        self.user = UserColumns(writer)
        self.known = Known(writer, self.user)
        self.rows: list[dict[str, Any]] = []
        self.vectors: list[np.ndarray] = []
        self.stale: list[dict[str, Any]] = []  # rows whose image is the same, with new values
        self.since = time.perf_counter()
        self.visited = 0

    def all(self, source: Any, progress: bool | None, prune: bool, remote: RayBatches | None) -> None:
        from ..data.loader import load_batches

        self.name = _source_name(source)
        total = len(source) if hasattr(source, "__len__") else None
        policy = "raise" if self.on_error == "raise" else "report"
        batches: Any
        if remote is not None:
            batches = iter(remote)
        else:
            batches = load_batches(self.todo(source), self.model.preprocess, self.batch_size, self.workers, policy)
        unit = self._units if remote is None else _size  # there the source is walked far ahead
        bar = Progress(batches, total, "embedding", unit=unit, enabled=progress)
        try:
            for batch in bar:
                self._bad(batch.errors)
                if len(batch):
                    self._encode(batch)
                if len(self.rows) >= self.commit or time.perf_counter() - self.since > PATIENCE:
                    self.flush()
        except (CollectionError, MemoryError):
            raise  # nothing more can be written
        except BaseException:  # a bad image, a failing source, Ctrl-C: keep what has been encoded
            self.flush()
            raise
        finally:
            batches.close()
            self.report.wait_share = bar.wait_share if remote is None else remote.wait_share
        self.flush()
        self._refresh()
        if prune:
            gone = self.known.unseen(self.name)
            if gone:
                self.writer.delete(gone)
                self.report.n_removed = len(gone)
        self.report.notes += self.user.notes()

    def todo(self, source: Any) -> Iterator[Item]:
        """The items that must be encoded; runs in the loader's thread."""
        seen: set[str] = set()
        for item in source:
            if item.key in seen:
                raise ClipworksError(f"duplicate key {item.key!r} in {self.name}. Every image needs its own key.")
            seen.add(item.key)
            self.visited += 1
            state = self.known.look(item, self.name)
            if state == "same":
                self.report.n_skipped += 1
            elif state == "stale":
                self.stale.append(self._row(item))
            elif state == "taken":
                reason = f"its key belongs to another image, from {self.known.source_of(item.key)}"
                self._bad([BadImage(item.key, f"{reason}; give keys that differ, or another collection")])
            else:
                yield read_once(item, getattr(self.model.preprocess, "limits", None))

    def _units(self, batch: Any) -> int:
        done, self.visited = self.visited, 0
        return done

    def _bad(self, errors: Sequence[BadImage]) -> None:
        self.report.n_left_out += len(errors)
        if self.on_error == "raise" and errors:
            raise errors[0]
        if self.on_error == "report":
            self.report.left_out += errors

    def _row(self, item: Item) -> dict[str, Any]:
        values = {
            "key": item.key,
            "digest": item.digest,
            "mtime": item.mtime,
            "label": item.label,
            "caption": item.caption,
            "_source": self.name,
        }
        return values | self.user.fit(item.columns)

    def _encode(self, batch: Any) -> None:
        far = getattr(batch, "vectors", None)
        self.vectors.append(vectors_of_batch(self.model, batch, self.batch_size) if far is None else far)
        self.rows += [self._row(item) for item in batch.items]

    def flush(self) -> None:
        """Commit what has been encoded: new keys in one step, changed ones in another."""
        self.since = time.perf_counter()
        if not self.rows:
            return
        rows, vectors = self.rows, np.concatenate(self.vectors)
        self.rows, self.vectors = [], []
        self.user.widen()
        new = np.array([row["key"] not in self.known for row in rows])
        for mask, write in ((new, self.writer.append), (~new, self.writer.merge)):
            chosen = np.flatnonzero(mask)
            if len(chosen):
                write(self.writer.build([rows[i] for i in chosen], vectors[chosen]))
        self.report.n_added += int(new.sum())
        self.report.n_changed += int((~new).sum())

    def _refresh(self) -> None:
        """Write new labels, captions, columns and times of images that are the same."""
        self.user.widen()
        for start in range(0, len(self.stale), 1000):
            rows = self.stale[start : start + 1000]
            self.writer.merge(self.writer.build(rows, self.known.vectors([r["key"] for r in rows])))
        self.report.n_refreshed = len(self.stale)


def vectors_of_batch(model: Encoder, batch: Batch, batch_size: int) -> np.ndarray:
    """Encode the images of a batch, filled up to `batch_size`: float32 (len(batch), dim)."""
    import torch

    pixels = batch.pixels
    if not len(batch):
        return np.empty((0, model.dim), np.float32)
    if len(pixels) < batch_size:
        filler = pixels.new_zeros(batch_size - len(pixels), *pixels.shape[1:])
        pixels = torch.cat([pixels, filler])
    return model.images(pixels, batch_size=batch_size, progress=False)[: len(batch)].numpy()


def _check_engine(engine: str, actors: int | None) -> None:
    check_choice("engine", engine, ENGINES)
    if engine == "ray":
        need("ray.data", "ray")
    elif actors is not None:
        raise ClipworksError(f"actors is for engine='ray'. Got actors={actors!r} with engine={engine!r}.")
    if actors is not None:
        check_range("actors", actors, 1)


def _size(batch: Any) -> int:
    return len(batch) + len(batch.errors)


def _source_name(source: Any) -> str:
    """The source as rows remember it: an absolute path where it is one."""
    name = str(source.name)
    return os.path.abspath(name) if os.path.exists(name) else name


__all__ = ["EmbedReport", "embed"]
