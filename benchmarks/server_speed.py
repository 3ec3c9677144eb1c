"""Requests of many clients in one pass, against one request, one pass: throughput, latency and processor time.

Two processes of `clipworks serve` on the same collection, `--max-batch 1` and the default, asked in turns by the same
clients; every text is new, so that nothing is remembered. Processor time per request is the server's own: it says what
a machine without other work would do.

    python benchmarks/server_speed.py --clients 8 --rounds 3
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common import record

SEED = 0
WORDS = [
    "red", "green", "blue", "old", "new", "large", "small", "round", "wooden", "metal", "cat", "dog", "horse",
    "bird", "car", "bus", "train", "boat", "house", "tree", "beach", "street", "kitchen", "table", "chair",
    "lamp", "book", "phone", "ball", "cup",
]  # fmt: skip
MODES = {"one by one": ["--max-batch", "1"], "together": []}


class Server:
    """A running `clipworks serve`."""

    def __init__(self, collection: Path, options: list[str]):
        command = [sys.executable, "-m", "clipworks", "serve", str(collection), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        line = self.process.stderr.readline()  # type: ignore[union-attr]
        self.port = int(re.search(r":(\d+)", line.partition("//")[2])[1])  # type: ignore[index]
        while ask(self.connection(), "GET", "/readyz")[0] != 200:
            time.sleep(0.5)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def processor(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def batches(self) -> tuple[float, float]:
        """Number of passes and of requests in them so far."""
        text = ask(self.connection(), "GET", "/metrics")[1].decode()
        found = [re.search(rf"^clipworks_batch_size_{name} (\S+)", text, re.M) for name in ("count", "sum")]
        return float(found[0][1]), float(found[1][1])  # type: ignore[index]


def ask(line: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    line.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
    answer = line.getresponse()
    return answer.status, answer.read()


def measured(server: Server, bodies: list[list[dict[str, Any]]]) -> dict[str, float]:
    """One round: every client sends its requests one after the other."""
    seconds: list[float] = []
    wrong: list[int] = []
    lock = threading.Lock()

    def client(own: list[dict[str, Any]]) -> None:
        line = server.connection()
        for body in own:
            start = time.perf_counter()
            status, _ = ask(line, "POST", "/search", body)
            with lock:
                seconds.append(time.perf_counter() - start)
                if status != 200:
                    wrong.append(status)
        line.close()

    threads = [threading.Thread(target=client, args=(own,)) for own in bodies]
    passes, requests = server.batches()
    processor, start = server.processor(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall, used = time.perf_counter() - start, server.processor() - processor
    after = server.batches()
    if wrong:
        raise SystemExit(f"{len(wrong)} requests failed: {sorted(set(wrong))}")
    return {"requests": len(seconds), "requests_per_s": len(seconds) / wall, "processor_ms": 1000 * used / len(seconds),
            "p50_ms": 1000 * float(np.percentile(seconds, 50)), "p99_ms": 1000 * float(np.percentile(seconds, 99)),
            "mean_batch": (after[1] - requests) / max(after[0] - passes, 1)}  # fmt: skip


def texts(clients: int, each: int, draw: np.random.Generator) -> list[list[dict[str, Any]]]:
    def one() -> dict[str, Any]:
        return {"text": "a photo of a " + " ".join(draw.choice(WORDS, 6)) + f" {draw.integers(1_000_000)}", "k": 20}

    return [[one() for _ in range(each)] for _ in range(clients)]


def images(clients: int, each: int, draw: np.random.Generator) -> list[list[dict[str, Any]]]:
    def one() -> dict[str, Any]:
        out = io.BytesIO()
        Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).resize((480, 360), 3).save(out, "JPEG")
        return {"image": base64.b64encode(out.getvalue()).decode(), "k": 20}

    return [[one() for _ in range(each)] for _ in range(clients)]


def made(folder: Path, rows: int) -> Path:
    """A collection of random vectors in the space of the bundled encoder."""
    import clipworks
    from clipworks.store.collection import Collection
    from clipworks.types import Features

    encoder = clipworks.load()
    vectors = np.random.default_rng(SEED).standard_normal((rows, encoder.dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = [f"{i:08}" for i in range(rows)]
    features = Features(vectors.astype(np.float16), keys, fingerprint=encoder.fingerprint)
    Collection.create(folder / "random", encoder=encoder, features=features)
    return folder / "random"


def tower(most: int, repeats: int = 7) -> dict[str, Any]:
    """Milliseconds per image and per text of the encoder alone: one at a time and in a batch, in turns.

    What batching can gain at most, whatever the server does.
    """
    import torch

    import clipworks

    encoder = clipworks.load()
    pixels = torch.randn(most, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(SEED))
    words = [f"a photo of a {one} and a {other}" for one, other in zip(WORDS, WORDS[::-1], strict=True)][:most]
    rows = {
        "image alone": (1, lambda: encoder.images(pixels[:1])),
        "image in a batch": (most, lambda: encoder.images(pixels, batch_size=most)),
        "text alone": (1, lambda: encoder.texts(words[:1])),
        "text in a batch": (most, lambda: encoder.texts(words)),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, (count, call) in rows.items():
            start = time.perf_counter(), time.process_time()
            call()
            spent = (time.perf_counter() - start[0], time.process_time() - start[1])
            if turn:
                taken[name].append((1e3 * spent[0] / count, 1e3 * spent[1] / count))
    found: dict[str, Any] = {"batch": most, "threads": torch.get_num_threads()}
    for name, values in taken.items():
        clock, processor = np.median(values, axis=0).round(2).tolist()
        found[name] = {"ms": clock, "processor_ms": processor}
    for kind in ("image", "text"):
        alone, many = found[f"{kind} alone"], found[f"{kind} in a batch"]
        found[f"{kind}: most that a batch can gain"] = {key: round(alone[key] / many[key], 2) for key in alone}
    return found


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of every figure; of p99 the largest."""
    return {k: round(float(np.max(v) if k == "p99_ms" else np.median(v)), 2)
            for k in rounds[0] for v in [[r[k] for r in rounds]]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--each", type=int, default=12, help="text requests of each client in a round")
    options = parser.parse_args()
    draw = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as folder:
        collection = made(Path(folder), options.rows)
        servers = {name: Server(collection, given) for name, given in MODES.items()}
        try:
            results: dict[str, Any] = {"clients": options.clients, "rows": options.rows, "rounds": options.rounds}
            results["encoder"] = tower(options.clients)
            print("encoder", json.dumps(results["encoder"], indent=1), flush=True)
            for kind, make, each in (("text", texts, options.each), ("image", images, max(2, options.each // 4))):
                found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
                for server in servers.values():  # what is loaded on first use
                    measured(server, make(options.clients, 1, draw))
                for _ in range(options.rounds):
                    for name, server in servers.items():
                        found[name].append(measured(server, make(options.clients, each, draw)))
                rows = {name: summary(rounds) for name, rounds in found.items()}
                one, many = rows["one by one"], rows["together"]
                results[kind] = rows | {
                    "throughput_ratio": round(many["requests_per_s"] / one["requests_per_s"], 2),
                    "processor_ratio": round(one["processor_ms"] / many["processor_ms"], 2),
                }
                print(kind, json.dumps(results[kind], indent=1), flush=True)
        finally:
            for server in servers.values():
                server.process.terminate()
                server.process.wait()
    print(record("server_speed", results, SEED))


if __name__ == "__main__":
    main()
