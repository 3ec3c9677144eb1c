"""Images in batches, decoded by threads while the encoder works, in order, with a bounded queue."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from threadpoolctl import ThreadpoolController

from ..errors import BadImage, check_choice, check_range
from .decode import decode
from .item import Item

if TYPE_CHECKING:
    import torch

ON_ERROR = ("raise", "skip", "report")
_END = object()


@dataclass
class Batch:
    """Consecutive items of a source, ready for the encoder.

    Attributes
    ----------
    keys, items : of the images that could be used, in the order of the source
    pixels : float32 tensor of shape (len(keys), 3, H, W)
    errors : the bad ones among them, each with `key` and `reason` (policy "report" only)
    """

    keys: list[str]
    pixels: torch.Tensor
    items: list[Item]
    errors: list[BadImage] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


def load_batches(
    items: Iterable[Item],
    preprocess: Callable[..., torch.Tensor],
    batch_size: int,
    workers: int | None = None,
    on_error: str = "raise",
) -> Iterator[Batch]:
    """Decode and preprocess `items` in threads, ahead of the caller by at most about two batches.

    A batch covers `batch_size` consecutive items; a bad one leaves a smaller batch and never moves or changes its
    neighbours. Leaving the loop early, or an error in it, stops the threads.

    Parameters
    ----------
    items : a source, or any iterable of items
    preprocess : called as `preprocess(image, key=key)`, returns a tensor of shape (3, H, W)
    batch_size : items per batch
    workers : decoding threads (default: one per available core, at most 16)
    on_error : "raise" stops at the first bad image; "skip" leaves bad images out; "report" leaves them out and
        lists them in `Batch.errors`

    Returns
    -------
    iterator of `Batch`; one without any usable image (`len` 0) is yielded only to report its errors

    Raises
    ------
    BadImage
        With on_error="raise".
    """
    check_choice("on_error", on_error, ON_ERROR)
    check_range("batch_size", batch_size, 1)
    workers = available_cores() if workers is None else int(check_range("workers", workers, 1))
    return _batches(items, preprocess, batch_size, workers, on_error)


def readable(items: Iterable[Item], workers: int | None = None) -> tuple[list[Item], list[BadImage]]:
    """Return the items whose image can be decoded, in their order, and why the others cannot; each is decoded once."""
    good: list[Item] = []
    errors: list[BadImage] = []
    for batch in load_batches(items, _decoded, 256, workers, on_error="report"):
        good += batch.items
        errors += batch.errors
    return good, errors


def _decoded(source: Any, key: str) -> torch.Tensor:
    import torch

    decode(source, key=key)
    return torch.empty(0)


def available_cores(most: int = 16) -> int:
    """Cores this process may use, at most `most`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, most))


def _batches(items: Iterable[Item], preprocess: Any, batch_size: int, workers: int, on_error: str) -> Iterator[Batch]:
    import torch

    waiting: queue.Queue = queue.Queue(maxsize=2 * batch_size + workers)
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers, "clipworks-decode", initializer=one_core)
    work = (items, preprocess, pool, waiting, stop)
    feeder = threading.Thread(target=_feed, args=work, name="clipworks-feed", daemon=True)
    feeder.start()
    rows: list[tuple[Item, torch.Tensor]] = []
    errors: list[BadImage] = []
    taken = 0

    def batch() -> Batch:
        good = [item for item, _ in rows]
        pixels = torch.stack([p for _, p in rows]) if rows else torch.empty(0, 3, 0, 0)
        return Batch([item.key for item in good], pixels, good, errors)

    try:
        while True:
            entry = waiting.get()
            if isinstance(entry, tuple):
                item, future = entry
                taken += 1
                try:
                    rows.append((item, future.result()))
                except BadImage as error:
                    if on_error == "raise":
                        raise
                    if on_error == "report":
                        errors.append(error)
                if taken < batch_size:
                    continue
            if rows or errors:
                yield batch()
            if isinstance(entry, BaseException):  # the source itself failed; what came before is delivered
                raise entry
            if entry is _END:
                return
            rows, errors, taken = [], [], 0
    finally:
        stop.set()
        _drain(waiting)
        feeder.join()
        _drain(waiting)
        pool.shutdown(wait=True, cancel_futures=True)


def one_core() -> None:
    """Keep a decoding thread to one core; teams of OpenMP's threads in each would push the encoder's aside."""
    import torch

    torch.get_num_threads()  # torch sets the number for a thread when it is first used there
    _openmp().limit(limits=1)


@lru_cache(maxsize=1)
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")


def _feed(
    items: Iterable[Item], preprocess: Any, pool: ThreadPoolExecutor, waiting: queue.Queue, stop: threading.Event
) -> None:
    """Walk the source in its own thread and keep the bounded queue filled."""
    entry: Any = _END
    try:
        for item in items:
            future: Future = pool.submit(_prepare, item, preprocess, stop)
            if not _put(waiting, (item, future), stop):
                return
    except BaseException as error:  # anything left in this thread would leave the caller waiting
        entry = error
    _put(waiting, entry, stop)


def _prepare(item: Item, preprocess: Any, stop: threading.Event) -> torch.Tensor:
    if stop.is_set():
        raise BadImage(item.key, "loading was stopped")
    return preprocess(item.source(), key=item.key)


def _put(waiting: queue.Queue, entry: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            waiting.put(entry, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False


def _drain(waiting: queue.Queue) -> None:
    while True:
        try:
            entry = waiting.get_nowait()
        except queue.Empty:
            return
        if isinstance(entry, tuple):
            entry[1].cancel()
