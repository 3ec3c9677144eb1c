"""How fast exact search in a collection is, against faiss IndexFlatIP on the same vectors and threads.

    python benchmarks/search_speed.py [--rows 100000] [--dim 512] [--threads 1] [--repeats 9]

A collection of float16 vectors (clustered, unit length) is made in a temporary folder and searched through its
memory map; faiss holds the same values as float32 in memory. Both take turns. Ratios are medians over turns of
(faiss) / (row): above 1 is faster than faiss; by the clock, and by the processor time of this process, which other
work on the machine disturbs less. Recall is measured against float64 products.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from clipworks.store.collection import Collection
from clipworks.store.exact import choose, top_k
from clipworks.types import Features
from common import record

SEED = 0
K = 10


def clustered(rows: int, dim: int, centres: int = 500, spread: float = 0.8) -> np.ndarray:
    """Unit vectors around random centres, as images of things are."""
    draw = np.random.default_rng(SEED)
    middle = draw.standard_normal((centres, dim), dtype=np.float32)
    vectors = middle[draw.integers(0, centres, rows)] + spread * draw.standard_normal((rows, dim), dtype=np.float32)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def turns(work: dict[str, Callable], repeats: int) -> dict[str, np.ndarray]:
    """Seconds per call by the clock and of the processor, each in turn, after one uncounted turn."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, call in work.items():
            start = time.perf_counter(), time.process_time()
            call()
            if turn:
                seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: np.array(taken) for name, taken in seconds.items()}


def recall(found: np.ndarray, scores: np.ndarray) -> float:
    """Share of hits whose exact score reaches the k-th best exact score."""
    last = np.sort(scores, axis=1)[:, -K]
    return float(np.mean(np.take_along_axis(scores, found, 1) >= last[:, None] - 1e-7))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--dim", type=int, default=512)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--name", default="search_speed", help="of the result file")
    given = options.parse_args()
    import faiss

    torch.set_num_threads(given.threads)
    faiss.omp_set_num_threads(given.threads)
    vectors = clustered(given.rows, given.dim)
    draw = np.random.default_rng(SEED + 1)
    results: dict = {"settings": {**vars(given), "k": K, "stored": "float16", "faiss": "float32"}}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        features = Features(vectors, [f"{i:08d}" for i in range(given.rows)])
        made = Collection.create(Path(folder) / "c", features=features)
        results["build_seconds"] = round(time.perf_counter() - start, 3)
        start = time.perf_counter()
        opened = Collection.open(Path(folder) / "c")
        results["open_seconds"] = round(time.perf_counter() - start, 4)
        stored = np.asarray(made.vectors, np.float32)
        index = faiss.IndexFlatIP(given.dim)
        index.add(stored)
        for count in (1, 8, 100, 500):
            queries = clustered(given.rows, given.dim)[draw.integers(0, given.rows, count)].astype(np.float32)
            queries += 0.03 * draw.standard_normal(queries.shape, dtype=np.float32)
            queries /= np.linalg.norm(queries, axis=1, keepdims=True)

            def ours(path: str, q: np.ndarray = queries) -> tuple[np.ndarray, np.ndarray]:
                return top_k(opened.vectors, q, K, norm=opened.norm, path=path)

            work: dict[str, Callable] = {
                "faiss IndexFlatIP": lambda q=queries: index.search(q, K),
                "clipworks": lambda call=ours: call("auto"),
                "clipworks, float32 throughout": lambda call=ours: call("float32"),
            }
            repeats = given.repeats if count < 100 else max(3, given.repeats // 3)
            seconds = turns(work, repeats)
            exact = queries.astype(np.float64) @ stored.T.astype(np.float64) if count <= 100 else None
            rows: dict = {}
            theirs = seconds["faiss IndexFlatIP"]
            for name, call in work.items():
                clock, processor = (np.median(seconds[name], axis=0) * 1e6 / count).round(1).tolist()
                ratio, processor_ratio = np.median(theirs / seconds[name], axis=0).round(3).tolist()
                found = call()[1]
                rows[name] = {
                    "us_per_query": clock,
                    "us_per_query_processor": processor,
                    "ratio": ratio,
                    "ratio_processor": processor_ratio,
                    "recall": None if exact is None else recall(found, exact),
                }
                print(f"{count:4d} queries  {name:32s}", rows[name], flush=True)
            rows["path"] = choose(count, opened.vectors.dtype)
            results[f"{count} queries"] = rows
        results["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(record(given.name, results, SEED, hashlib.sha256(vectors.tobytes()).hexdigest()))


if __name__ == "__main__":
    main()
