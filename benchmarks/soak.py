"""A server under minutes of mixed requests: slope of its memory, open descriptors, errors, latency.

Clients send words, images, names to choose from, pages of the collection, and requests that must be refused. Memory and
descriptors are read from outside every second; the slope is the least-squares line through what follows the first
third, in which caches fill.

    python benchmarks/soak.py --minutes 4
"""

from __future__ import annotations

import argparse
import base64
import io
import json
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


def jpeg(draw: np.random.Generator) -> str:
    out = io.BytesIO()
    Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).resize((320, 240), 3).save(out, "JPEG")
    return base64.b64encode(out.getvalue()).decode()


def request(draw: np.random.Generator) -> tuple[str, dict[str, Any], bool]:
    """One request, and whether it must be answered."""
    words = " ".join(draw.choice(WORDS, 4)) + f" {draw.integers(10**6)}"
    kind = draw.choice(["text", "image", "page", "classify", "bad"], p=[0.5, 0.1, 0.15, 0.05, 0.2])
    if kind == "bad":
        path, body = BAD[draw.integers(len(BAD))]
        return path, body, False
    if kind == "classify":
        return "/classify", {"names": list(draw.choice(WORDS, 3, replace=False)), "images": [jpeg(draw)]}, True
    body = {"text": {"text": words}, "image": {"image": jpeg(draw)}, "page": {"offset": int(draw.integers(500))}}[kind]
    return "/search", {**body, "k": 20}, True


def state(server: Server) -> tuple[float, int]:
    """Resident bytes and open descriptors of the process."""
    place = Path(f"/proc/{server.process.pid}")
    pages = int((place / "statm").read_text().split()[1])
    return pages * 4096.0, len(list((place / "fd").iterdir()))


def soak(collection: Path, seconds: float, clients: int) -> dict[str, Any]:
    """Ask a server for so long, and return what was seen."""
    server, lock, end = Server(collection, []), threading.Lock(), time.monotonic() + seconds
    good, bad, latencies = Counter(), Counter(), []

    def client(number: int) -> None:
        draw, line = np.random.default_rng([SEED, number]), server.connection()
        while time.monotonic() < end:
            path, body, answered = request(draw)
            start = time.perf_counter()
            status, _ = ask(line, "POST", path, body)
            with lock:
                (good if answered else bad)[status] += 1
                if answered:
                    latencies.append(time.perf_counter() - start)
        line.close()

    try:
        threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
        seen, begun = [], time.monotonic()
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            seen.append((time.monotonic() - begun, *state(server)))
            time.sleep(1)
        for thread in threads:
            thread.join()
        alive = ask(server.connection(), "GET", "/healthz")[0] == 200
        after = state(server)
    finally:
        server.process.terminate()
        code = server.process.wait()
    at, memory, files = np.array(seen).T
    late = at > at[-1] / 3
    slope = float(np.polyfit(at[late] / 60, memory[late] / 2**20, 1)[0])
    return {
        "minutes": round(seconds / 60, 2), "clients": clients, "alive": alive, "exit_code": code,
        "good": {str(k): v for k, v in sorted(good.items())}, "refused": {str(k): v for k, v in sorted(bad.items())},
        "error_rate_of_good": round(1 - good[200] / max(1, sum(good.values())), 4),
        "server_errors": sum(v for k, v in (good + bad).items() if k >= 500),
        "p50_ms": round(1000 * float(np.percentile(latencies, 50)), 1),
        "p99_ms": round(1000 * float(np.percentile(latencies, 99)), 1),
        "memory_mib": {"start": round(memory[0] / 2**20), "third": round(float(memory[late][0]) / 2**20),
                       "end": round(after[0] / 2**20), "slope_per_minute": round(slope, 2)},
        "descriptors": {"start": int(files[0]), "most": int(files.max()), "end": after[1]},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rows", type=int, default=5_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = soak(made(Path(folder), options.rows), 60 * options.minutes, options.clients)
    print(json.dumps(results, indent=1))
    print(record("soak", results, SEED))


if __name__ == "__main__":
    main()
