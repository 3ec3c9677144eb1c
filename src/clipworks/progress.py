"""One progress bar for all long work: ETA, rate and the share of time spent waiting for data.

Silent when the output is not a terminal, so logs stay clean.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Progress(Generic[T]):
    """Iterate over `items` with a bar; time spent inside the iterator is counted as waiting for data.

    Parameters
    ----------
    items : the work, one element or batch at a time
    total : number of units, if known
    label : what is being done, in two or three words
    unit : function from an element to the units it holds (default: 1 each)
    enabled : None shows the bar on a terminal only

    Attributes
    ----------
    done : units finished
    wait_share : share of the elapsed time spent waiting for the next element, in [0, 1]
    rate : units per second
    """

    def __init__(
        self, items: Iterable[T], total: int | None = None, label: str = "", unit=None, enabled: bool | None = None
    ):
        self.items, self.total, self.label = items, total, label
        self.unit = unit or (lambda _: 1)
        self.enabled = enabled
        self.done, self.waited, self.started, self.elapsed = 0, 0.0, 0.0, 0.0

    @property
    def wait_share(self) -> float:
        return self.waited / self.elapsed if self.elapsed else 0.0

    @property
    def rate(self) -> float:
        return self.done / self.elapsed if self.elapsed else 0.0

    def __iter__(self) -> Iterator[T]:
        bar = self._bar()
        self.started = time.perf_counter()
        try:
            iterator = iter(self.items)
            while True:
                before = time.perf_counter()
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                self.waited += time.perf_counter() - before
                yield item
                self.done += self.unit(item)
                self.elapsed = time.perf_counter() - self.started
                if bar:
                    rate, wait = f"{self.rate:.1f}/s", f"data wait {self.wait_share:.0%}"
                    bar.update(bar.task_ids[0], completed=self.done, rate=rate, wait=wait)
        finally:
            self.elapsed = time.perf_counter() - self.started
            if bar:
                bar.stop()

    def _bar(self):
        import sys

        if self.enabled is False or (self.enabled is None and not sys.stderr.isatty()):
            return None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        rate, wait = "{task.fields[rate]}", "{task.fields[wait]}"
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), wait)
        bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
        bar.add_task(self.label, total=self.total, rate="", wait="")
        bar.start()
        return bar
