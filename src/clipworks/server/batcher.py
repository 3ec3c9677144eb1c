"""`Batcher`: one thread that answers the requests of many clients together, behind a queue of limited length.

A model answers eight requests in one pass far sooner than in eight, and one scan of a collection serves many queries.
The thread takes what waits, up to `max_batch`. A client that was just answered comes back within milliseconds, so a
batch may wait for as many requests as there were clients a moment ago: those answered last and those that waited
meanwhile. A client that is alone never waits.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from ..errors import check_range

TICK = 1.0  # seconds between two looks at the clock of an idle thread
STOP = object()


class Busy(Exception):
    """The queue is full; `after` is the number of seconds after which to try again."""

    def __init__(self, after: int):
        super().__init__(f"too many requests are waiting; try again in {after} s.")
        self.after = after


class Closed(Exception):
    """The batcher no longer takes jobs."""


@dataclass
class Job:
    """One request and the place of its answer."""

    request: Any
    future: Future = field(default_factory=Future)


class Batcher:
    """Gather requests and hand them to `work` in batches.

    Parameters
    ----------
    work : from a list of requests to a list of answers, as long; an answer that is an exception is raised where the
        request was made, and so is what `work` itself raises, for all of the batch
    max_batch : most requests at once
    max_wait : seconds that a batch may wait for the clients of a moment ago, never more than half of the time that a
        pass takes
    max_queue : most requests that wait
    idle : called about once a second while there is nothing to do
    observe : called with the size of each batch and the seconds it took
    """

    def __init__(
        self,
        work: Callable[[list[Any]], Sequence[Any]],
        *,
        max_batch: int = 16,
        max_wait: float = 0.05,
        max_queue: int = 64,
        idle: Callable[[], None] | None = None,
        observe: Callable[[int, float], None] | None = None,
    ):
        self.work, self.idle, self.observe = work, idle, observe
        self.max_batch = int(check_range("max_batch", max_batch, 1))
        self.max_wait = float(check_range("max_wait", max_wait, 0))
        self.max_queue = int(check_range("max_queue", max_queue, 1))
        self._jobs: queue.Queue[Any] = queue.Queue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._expected = 1  # clients there were when the last batch was done
        self._seconds = 0.05  # of a batch, a running mean
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="clipworks-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that are not yet in work."""
        return self._waiting

    def submit(self, request: Any) -> Future:
        """Put a request in the queue.

        Raises
        ------
        Busy
            If `max_queue` requests wait already.
        Closed
            After `close`.
        """
        job = Job(request)
        with self._lock:
            if self._closed:
                raise Closed("the server is stopping.")
            if self._waiting >= self.max_queue:
                raise Busy(max(1, round(self._seconds * self._waiting / self.max_batch)))
            self._waiting += 1
            self._jobs.put(job)
        return job.future

    def close(self, timeout: float | None = None) -> None:
        """Answer what waits, then end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(STOP)
        self._thread.join(timeout)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                first = self._jobs.get(timeout=TICK)
            except queue.Empty:
                if self.idle is not None:
                    with contextlib.suppress(Exception):  # tidying up must not end the thread
                        self.idle()
                continue
            if first is STOP:
                return
            batch, stop = self._gather(first)
            with self._lock:
                self._waiting -= len(batch)
            self._answer([job for job in batch if job.future.set_running_or_notify_cancel()])
            if stop:
                return

    def _gather(self, first: Job) -> tuple[list[Job], bool]:
        batch, until = [first], time.monotonic() + min(self.max_wait, self._seconds / 2)
        while len(batch) < self.max_batch:
            try:
                # once as many are here as expected, whoever else has arrived joins, but nobody is waited for
                left = until - time.monotonic() if len(batch) < self._expected else 0.0
                job = self._jobs.get(timeout=left) if left > 0 else self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is STOP:
                return batch, True
            batch.append(job)
        return batch, False

    def _answer(self, batch: list[Job]) -> None:
        if not batch:
            return
        start = time.monotonic()
        try:
            answers = self.work([job.request for job in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"work must return {len(batch)} answers. Got {len(answers)}.")
        except BaseException as error:  # the thread outlives whatever a request brings
            answers = [error] * len(batch)
        seconds = time.monotonic() - start
        self._expected = len(batch) + self._waiting
        self._seconds += 0.1 * (seconds - self._seconds)
        for job, answer in zip(batch, answers, strict=True):
            with contextlib.suppress(InvalidStateError, CancelledError):
                if isinstance(answer, BaseException):
                    job.future.set_exception(answer)
                else:
                    job.future.set_result(answer)
        if self.observe is not None:
            self.observe(len(batch), seconds)
