"""Approximate indexes of a large collection: memory and time to build, recall, time per query; and a cold text search.

    python benchmarks/index_speed.py --folder FOLDER [--rows 1000000] [--dim 512] [--threads 2]
    python benchmarks/index_speed.py --folder FOLDER --steps hnsw.build,hnsw.ask

A collection of float16 vectors (clustered, unit length) is made in the folder. Every index is built, and then searched,
in a process of its own, whose peak of resident memory is reported: pages of the mapped collection count in it, although
the system may take them back at any time. Queries are rows with noise, that are in no index, one at a time; recall is
against the exact answer. The cold search is `clipworks search COLLECTION WORDS` from the start of the process to its
end, on 100,000 vectors, with the model inside the package; what it reads is in the page cache.

A step is recorded as soon as it is done, with its commit, load and time; the others in the result file stay, as long as
they are of the same vectors. So the whole can be done in pieces, in one folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SEED, K, QUERIES = 0, 10, 200
BLOCK = 50_000
KINDS = ("ivf", "pq", "lance", "hnsw")
STEPS = ("cold", "exact.ask", *(f"{kind}.{what}" for kind in KINDS for what in ("build", "ask")))


def clustered(rows: int, dim: int, block: int, centres: int = 2000, spread: float = 0.8) -> np.ndarray:
    """Unit vectors around random centres, as images of things are; the same for the same block number."""
    middle = np.random.default_rng(SEED).standard_normal((centres, dim), dtype=np.float32)
    draw = np.random.default_rng((SEED, block))
    vectors = middle[draw.integers(0, centres, rows)] + spread * draw.standard_normal((rows, dim), dtype=np.float32)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def make(path: Path, rows: int, dim: int, encoder: bool = False) -> str:
    """A collection of so many rows, and the digest of its vectors."""
    import clipworks
    from clipworks.store.collection import Collection, new_meta
    from clipworks.store.identity import recorded
    from clipworks.store.table import make_schema
    from clipworks.store.writer import Writer

    identity = recorded(clipworks.load(), "clipworks-small") if encoder else {}
    state = hashlib.sha256()
    with Writer(path, make_schema(dim, "float16", new_meta(identity))) as writer:
        for start in range(0, rows, BLOCK):
            vectors = clustered(min(BLOCK, rows - start), dim, start // BLOCK)
            state.update(vectors.tobytes())
            keys = [{"key": f"{start + i:09d}.jpg"} for i in range(len(vectors))]
            writer.append(writer.build(keys, vectors))
        writer.tidy(force=True)
    Collection(path)  # makes the copy for searching
    return state.hexdigest()


def build(path: Path, kind: str) -> dict:
    """Build an index in this process."""
    from clipworks.store.index import build_index

    before = time.process_time()
    report = build_index(path, kind=kind, rebuild=True)
    return {"seconds": round(report.seconds, 1), "processor_seconds": round(time.process_time() - before, 1),
            "bytes_on_disk": report.size, "recall_at_build": report.recall, "breadth": report.breadth,
            "candidates": report.candidates, "peak_rss_mib": peak()}  # fmt: skip


def ask(path: Path, kind: str) -> dict:
    """Search with an index, or exactly, in this process."""
    from clipworks.store.collection import Collection
    from clipworks.store.exact import MEMORY, top_k
    from clipworks.store.indexed import usable

    opened = Collection.open(path)
    draw = np.random.default_rng(SEED + 1)
    queries = np.asarray(opened.vectors[np.sort(draw.integers(0, len(opened), QUERIES))], np.float32)
    queries += 0.03 * draw.standard_normal(queries.shape, dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    started = time.perf_counter()
    index = usable(opened, kind)
    opening = time.perf_counter() - started

    def call(query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if index is not None:
            return index.top_k(query, K, memory=MEMORY)
        return top_k(opened.vectors, query, K, norm=opened.norm)

    call(queries[:1])
    clock, processor, found = [], [], []
    for query in queries if kind != "exact" else queries[:40]:
        start = time.perf_counter(), time.process_time()
        found.append(call(query[None])[1][0])
        clock.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    alone = peak()
    exact = top_k(opened.vectors, queries, K, norm=opened.norm)[1]
    recall = np.mean([len(set(one) & set(other)) / K for one, other in zip(found, exact, strict=False)])
    return {"open_seconds": round(opening, 3), "ms_per_query": round(float(np.median(clock)) * 1e3, 3),
            "ms_per_query_processor": round(float(np.median(processor)) * 1e3, 3), "recall": round(float(recall), 4),
            "peak_rss_mib": alone}  # fmt: skip


def peak() -> int:
    """Peak of resident memory of this program; `ru_maxrss` would count what its parent had when it forked."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def child(threads: int, *words: str) -> dict:
    """Run this script for one part of the work, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, __file__, *words], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def cold(path: Path, repeats: int) -> dict:
    """Seconds of `clipworks search` in a process of its own, by the clock and of the processor.

    Compiled modules are kept, as an installation keeps them; the first start, which makes them, does not count.
    """
    seconds, processor = [], []
    command = [sys.executable, "-m", "clipworks", "search", str(path), "a red bicycle", "--k", "10"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(path.parent / "compiled")}
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment)
    for _ in range(repeats):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment)
        seconds.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"seconds": [round(s, 3) for s in sorted(seconds)], "processor": [round(s, 3) for s in sorted(processor)]}


def former(path: Path, settings: dict, digest: str) -> dict:
    """Results of an earlier call on the same vectors."""
    entry = json.loads(path.read_text()) if path.exists() else {}
    same = entry.get("data_digest") == digest and entry["results"].get("settings") == settings
    return entry["results"] if same else {"settings": settings}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--dim", type=int, default=512)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=20, help="of the cold search")
    options.add_argument("--folder", required=True, help="for the collections; what is there already is used")
    options.add_argument("--steps", default=",".join(STEPS), help="default: all of them, %(default)s")
    options.add_argument("--name", default="index_speed", help="of the result file")
    options.add_argument("--part", nargs=3, metavar=("WHAT", "COLLECTION", "KIND"), help="used by the script itself")
    given = options.parse_args()
    if given.part:
        print(json.dumps({"build": build, "ask": ask}[given.part[0]](Path(given.part[1]), given.part[2])))
        return
    from common import RESULTS, _git, record

    large, small = Path(given.folder) / "large", Path(given.folder) / "small"
    noted = Path(given.folder) / "digest.txt"
    if not noted.exists():
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(make(large, given.rows, given.dim))
    digest = noted.read_text()
    settings = {"rows": given.rows, "dim": given.dim, "threads": given.threads, "k": K, "stored": "float16"}
    results = former(RESULTS / f"{given.name}.json", settings, digest)
    for step in given.steps.split(","):
        load = round(os.getloadavg()[0], 1)
        kind, _, what = step.partition(".")
        if kind == "cold":
            if not small.exists():
                make(small, 100_000, 512, encoder=True)
            found = cold(small, given.repeats)
        else:
            found = child(given.threads, "--folder", given.folder, "--part", what, str(large), kind)
        made = {"commit": _git("rev-parse", "--short", "HEAD"), "load_before": load}
        at = time.strftime("%FT%TZ", time.gmtime())
        results.setdefault(kind, {})[what or "search"] = {**found, **made, "at": at}
        print(step, found, flush=True)
        record(given.name, results, SEED, digest)


if __name__ == "__main__":
    main()
