"""How fast near-duplicates are found, against sentence-transformers' community detection on the same vectors.

    PYTHONPATH=src /tmp/peers/bin/python benchmarks/duplicates_speed.py [--rows 20000] [--repeats 3]

Vectors in clusters, as images of things are; of every twentieth there is a copy with some noise, whose cosine with its
original is about 0.98. Both look at the cosine 0.95, in turns, on the same threads; both compare all pairs, once here
and twice there. Ratios are medians over turns of (sentence-transformers) / (clipworks): above 1 clipworks is faster.
Found: the share of the copies that are in one group with their original; groups with anything else are counted too.
The environment needs both (docs/runtimes.md says how it is made).
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path

import numpy as np
import torch

from clipworks.store.collection import Collection
from clipworks.store.dedupe import dedupe
from clipworks.types import Features
from common import record
from search_speed import SEED, clustered, turns

THRESHOLD = 0.95
EVERY = 20


def with_copies(rows: int, dim: int) -> tuple[np.ndarray, int]:
    """Unit vectors; the last `copies` are noisy copies of the first, every one of another."""
    copies = rows // EVERY
    vectors = clustered(rows - copies, dim).astype(np.float32)
    noise = np.random.default_rng(SEED + 1).standard_normal((copies, dim), dtype=np.float32)
    near = vectors[:copies] + 0.2 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    both = np.concatenate([vectors, near])
    return (both / np.linalg.norm(both, axis=1, keepdims=True)).astype(np.float16), copies


def judged(groups: list[set[int]], rows: int, copies: int) -> dict[str, float]:
    """Share of the copies found with their original, and how many groups are no such pair."""
    pairs = {frozenset((i, rows - copies + i)) for i in range(copies)}
    found = {frozenset(group) for group in groups}
    return {"found": round(len(pairs & found) / copies, 4), "other_groups": len(found - pairs)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=20_000)
    options.add_argument("--dim", type=int, default=512)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    from importlib.metadata import version

    # torchvision from the registry does not match a CPU build of torch; its two operators are only declared
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from sentence_transformers.util import community_detection

    torch.set_num_threads(given.threads)
    vectors, copies = with_copies(given.rows, given.dim)
    results: dict = {"settings": {**vars(given), "threshold": THRESHOLD, "copies": copies, "stored": "float16",
                                  "sentence-transformers": version("sentence-transformers")}}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"{i:08d}" for i in range(given.rows)]
        opened = Collection.create(Path(folder) / "c", features=Features(vectors, keys))
        plain = torch.from_numpy(vectors.astype(np.float32))
        work = {
            "sentence-transformers": lambda: community_detection(plain, THRESHOLD, min_community_size=2),
            "clipworks": lambda: dedupe(opened, threshold=THRESHOLD),
        }
        seconds = turns(work, given.repeats)
        groups = {
            "sentence-transformers": [set(map(int, group)) for group in work["sentence-transformers"]()],
            "clipworks": [{int(key) for key in group.keys} for group in work["clipworks"]()],
        }
    theirs = seconds["sentence-transformers"]
    for name in work:
        clock, processor = np.median(seconds[name], axis=0).round(3).tolist()
        ratio, processor_ratio = np.median(theirs / seconds[name], axis=0).round(2).tolist()
        results[name] = {"seconds": clock, "seconds_processor": processor, "ratio": ratio,
                         "ratio_processor": processor_ratio, **judged(groups[name], given.rows, copies)}  # fmt: skip
        print(f"{name:24s}", results[name], flush=True)
    print(record("duplicates_speed", results, SEED, hashlib.sha256(vectors.tobytes()).hexdigest()))


if __name__ == "__main__":
    main()
