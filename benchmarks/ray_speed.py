"""`embed --engine ray` with two actors on this machine, beside the plain run on one and on two threads.

    python benchmarks/ray_speed.py FOLDER --images 1000

The same images, encoded by the model inside the package. Every run is a process of its own; its time goes from the
list of paths to the finished collection, Ray's start included, and without the imports. All collections are compared
with that of the plain run on one thread: keys, order and columns, and the bytes of the vectors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = {"plain, 1 thread": ("local", 1), "plain, 2 threads": ("local", 2), "ray, 2 actors of 1 thread": ("ray", 1)}


def work(listed: str, out: str, engine: str, threads: int) -> None:
    import torch

    import clipworks

    torch.set_num_threads(threads)
    paths = json.loads(Path(listed).read_text())
    encoder = clipworks.load()
    start = time.perf_counter()
    options = {"actors": 2} if engine == "ray" else {}
    report = clipworks.embed(paths, out, encoder=encoder, engine=engine, progress=False, **options)
    print(json.dumps({"seconds": round(time.perf_counter() - start, 2), "rows": report.n_rows}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="of images")
    options.add_argument("--images", type=int, default=1000)
    options.add_argument("--turns", type=int, default=1)
    options.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.work:
        return work(str(given.folder), given.work[0], given.work[1], int(given.work[2]))
    import numpy as np

    from clipworks.store.collection import Collection
    from common import record

    files = sorted(str(path.resolve()) for path in given.folder.rglob("*.jpg"))[: given.images]
    results: dict = {name: {"seconds": []} for name in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "paths.json"
        listed.write_text(json.dumps(files))
        made = {}
        for turn in range(given.turns):
            for name, (engine, threads) in ROWS.items():
                out = Path(folder) / f"{turn}-{engine}-{threads}"
                command = [sys.executable, __file__, str(listed), "--work", str(out), engine, str(threads)]
                environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                results[name]["seconds"].append(found["seconds"])
                results[name]["rows"] = found["rows"]
                made[name] = Collection.open(out)
                print(name, found, flush=True)
        first, *_ = made
        for name, other in made.items():
            same = made[first].keys == other.keys and made[first].column("digest") == other.column("digest")
            results[name]["same rows"] = bool(same)
            results[name]["same bytes"] = bool(np.array_equal(made[first].vectors, other.vectors))
        results["images"] = len(files)
    digest = hashlib.sha256(b"".join(hashlib.sha256(Path(f).read_bytes()).digest() for f in files)).hexdigest()
    print(json.dumps(results, indent=1))
    print(record("ray_speed", results, 0, digest))


if __name__ == "__main__":
    main()
