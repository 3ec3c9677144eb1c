"""A server under minutes of mixed requests: memory, open descriptors, errors, latency, of every kind of request.

Rounds of requests from several clients: words, images of many sizes, pages of the collection, names to choose from, and
requests that must be refused. Between two rounds nobody asks until the server has given its encoder back, and the next
round makes it load again. Memory at rest shows what stays for good: the slope is the least-squares line through it,
from the second half of the rounds, when caches are full. Where a request gets 5xx, the reason is counted. `--only
image` sends one kind, to see which of them grows.

    python benchmarks/soak.py --minutes 10
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common import record
from server_speed import SEED, WORDS, Server, ask, made

BAD = [("/search", {"text": ""}), ("/search", {"text": "x", "k": 10**9}), ("/search", {"image": "aGVsbG8="}),
       ("/search", {"vector": [0.0] * 3}), ("/embed", {"texts": ["a"] * 1000}), ("/segment", {"names": ["a"]}),
       ("/classify", {"names": []}), ("/nothing", {})]  # fmt: skip
KINDS = {"text": 0.5, "image": 0.1, "page": 0.15, "classify": 0.05, "bad": 0.2}
ROUND, IDLE = 45.0, 2.0  # seconds of requests; seconds of rest after which the encoder is given back


def jpeg(draw: np.random.Generator) -> str:
    """A picture of any shape."""
    out, size = io.BytesIO(), draw.integers(64, 640, 2).tolist()
    Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).resize(size, 3).save(out, "JPEG")
    return base64.b64encode(out.getvalue()).decode()


def request(draw: np.random.Generator, kind: str) -> tuple[str, dict[str, Any]]:
    if kind == "bad":
        return BAD[draw.integers(len(BAD))]
    if kind == "classify":
        return "/classify", {"names": list(draw.choice(WORDS, 3, replace=False)), "images": [jpeg(draw)]}
    if kind == "text":
        return "/search", {"text": " ".join(draw.choice(WORDS, 4)) + f" {draw.integers(10**6)}", "k": 20}
    if kind == "image":
        return "/search", {"image": jpeg(draw), "k": 20}
    return "/search", {"offset": int(draw.integers(500)), "k": 20}


def state(server: Server) -> tuple[float, int]:
    """Resident mebibytes and open descriptors of the process."""
    place = Path(f"/proc/{server.process.pid}")
    pages = int((place / "statm").read_text().split()[1])
    return pages * 4096 / 2**20, len(list((place / "fd").iterdir()))


def metric(server: Server, name: str) -> float:
    found = re.search(rf"^clipworks_{name} (\S+)", ask(server.connection(), "GET", "/metrics")[1].decode(), re.M)
    return float(found[1]) if found else 0.0


class Seen:
    """What clients were answered, by kind."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.statuses: dict[str, Counter[int]] = {kind: Counter() for kind in KINDS}
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.reasons: Counter[str] = Counter()

    def client(self, server: Server, draw: np.random.Generator, kinds: dict[str, float], end: float) -> None:
        """Send one request after the other."""
        line = server.connection()
        while time.monotonic() < end:
            kind = str(draw.choice(list(kinds), p=list(kinds.values())))
            path, body = request(draw, kind)
            start = time.perf_counter()
            status, answer = ask(line, "POST", path, body)
            with self.lock:
                self.statuses[kind][status] += 1
                self.seconds[kind].append(time.perf_counter() - start)
                if status >= 500:
                    self.reasons[json.loads(answer)["error"]] += 1
        line.close()

    def as_rows(self) -> dict[str, Any]:
        return {kind: {"statuses": {str(k): n for k, n in sorted(found.items())},
                       **{f"p{q}_ms": round(1000 * float(np.percentile(self.seconds[kind], q)), 1) for q in (50, 99)}}
                for kind, found in self.statuses.items() if found}  # fmt: skip


def rest(server: Server, unloads: float) -> tuple[float, int]:
    """State after the encoder was given back."""
    until = time.monotonic() + 120
    while metric(server, "model_unloads") <= unloads:
        if time.monotonic() > until:
            raise SystemExit("the encoder was not given back")
        time.sleep(0.5)
    time.sleep(1)
    return state(server)


def slope(minutes: list[float], mebibytes: list[float]) -> float:
    """Mebibytes per minute in the second half."""
    half = len(minutes) // 2
    return round(float(np.polyfit(minutes[half:], mebibytes[half:], 1)[0]), 2)


def soak(collection: Path, seconds: float, clients: int, kinds: dict[str, float]) -> dict[str, Any]:
    """Ask a server for so long, and return what was seen."""
    server, seen = Server(collection, ["--idle", str(IDLE / 60)]), Seen()
    threading.Thread(target=lambda: list(server.process.stderr or ()), daemon=True).start()  # an unread pipe fills
    begun, number = time.monotonic(), 0
    busy: list[tuple[float, float, int]] = []
    still: list[tuple[float, float, int]] = []
    try:
        while time.monotonic() < begun + seconds:
            unloads, end = metric(server, "model_unloads"), time.monotonic() + ROUND
            draws = [np.random.default_rng([SEED, number, i]) for i in range(clients)]
            threads = [threading.Thread(target=seen.client, args=(server, draw, kinds, end)) for draw in draws]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                busy.append(((time.monotonic() - begun) / 60, *state(server)))
                time.sleep(1)
            still.append(((time.monotonic() - begun) / 60, *rest(server, unloads)))
            number += 1
            print(f"{still[-1][0]:5.1f} min: {still[-1][1]:6.1f} MiB at rest, {still[-1][2]} descriptors", flush=True)
        alive = ask(server.connection(), "GET", "/healthz")[0] == 200
        loads, timeouts = metric(server, "model_loads"), metric(server, "timeouts_total")
    finally:
        server.process.terminate()
        code = server.process.wait()
    good = sum((c for kind, c in seen.statuses.items() if kind != "bad"), Counter())
    minutes, memory, files = (list(column) for column in zip(*still, strict=True))
    at, busy_memory, busy_files = (list(column) for column in zip(*busy, strict=True))
    return {
        "minutes": round(minutes[-1], 1), "clients": clients, "alive": alive, "exit_code": code,
        "requests": seen.as_rows(), "good": good.total(), "good_answered": good[200],
        "reasons_of_5xx": dict(seen.reasons), "timeouts": int(timeouts), "loads": int(loads), "unloads": len(still),
        "memory_mib": {
            "at_rest": [round(x, 1) for x in memory], "slope_per_minute_at_rest": slope(minutes, memory),
            "busy_most": round(max(busy_memory), 1), "slope_per_minute_busy": slope(at, busy_memory),
        },
        "descriptors": {"at_rest": files, "most": max(busy_files)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--only", choices=list(KINDS), help="the only kind of request; nothing is recorded")
    options = parser.parse_args()
    kinds = {options.only: 1.0} if options.only else KINDS
    with tempfile.TemporaryDirectory() as folder:
        results = soak(made(Path(folder), options.rows), 60 * options.minutes, options.clients, kinds)
    print(json.dumps(results, indent=1))
    if not options.only:
        print(record("soak", results, SEED))


if __name__ == "__main__":
    main()
