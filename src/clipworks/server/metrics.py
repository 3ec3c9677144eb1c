"""Counters in the text form that Prometheus reads, without a library."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How many observations were at most each bound, their number and their sum."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        place = next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))
        self.counts[place] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        total, out, comma = 0, [], "," if labels else ""
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            out.append(f'{name}_bucket{{{labels}{comma}le="{bound}"}} {total}')
        tail = f"{{{labels}}}" if labels else ""
        return [*out, f"{name}_sum{tail} {self.sum:.6f}", f"{name}_count{tail} {total}"]


class Metrics:
    """Requests by route and status, their duration, batches, and gauges that are read when asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start = time.time()
        self.requests: dict[tuple[str, int], int] = {}
        self.durations: dict[str, Histogram] = {}
        self.batch_sizes = Histogram(SIZES)
        self.batch_seconds = Histogram(SECONDS)
        self.counters: dict[str, int] = {}
        self.gauges: dict[str, Callable[[], float]] = {"process_resident_memory_bytes": resident,
                                                      "process_open_fds": descriptors}  # fmt: skip

    def request(self, route: str, status: int, seconds: float) -> None:
        with self._lock:
            self.requests[route, status] = self.requests.get((route, status), 0) + 1
            self.durations.setdefault(route, Histogram(SECONDS)).add(seconds)

    def batch(self, size: int, seconds: float) -> None:
        with self._lock:
            self.batch_sizes.add(size)
            self.batch_seconds.add(seconds)

    def count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self.counters[name] = self.counters.get(name, 0) + by

    def text(self) -> str:
        """All of it, a line each."""
        with self._lock:
            out = ["# TYPE clipworks_requests_total counter"]
            out += [f'clipworks_requests_total{{route="{route}",status="{status}"}} {count}'
                    for (route, status), count in sorted(self.requests.items())]  # fmt: skip
            out.append("# TYPE clipworks_request_seconds histogram")
            for route, histogram in sorted(self.durations.items()):
                out += histogram.lines("clipworks_request_seconds", f'route="{route}"')
            for name, histogram in (("batch_size", self.batch_sizes), ("batch_seconds", self.batch_seconds)):
                out += [f"# TYPE clipworks_{name} histogram", *histogram.lines(f"clipworks_{name}", "")]
            for name, count in sorted(self.counters.items()):
                out += [f"# TYPE clipworks_{name}_total counter", f"clipworks_{name}_total {count}"]
        gauges = {**self.gauges, "process_start_time_seconds": lambda: self._start}
        for name, read in sorted(gauges.items()):
            title = name if name.startswith("process_") else f"clipworks_{name}"
            out += [f"# TYPE {title} gauge", f"{title} {read():g}" if name != "process_start_time_seconds"
                    else f"{title} {read():.3f}"]  # fmt: skip
        return "\n".join(out) + "\n"


def resident() -> float:
    """Bytes of memory that the process holds, 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def descriptors() -> float:
    """Open file descriptors, 0 where the system does not say."""
    try:
        return float(len(os.listdir("/proc/self/fd")))
    except OSError:
        return 0.0
