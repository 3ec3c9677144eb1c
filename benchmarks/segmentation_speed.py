"""What `Segmenter` saves: words encoded once, windows in batches, against the naive form, on real photos.

    python benchmarks/segmentation_speed.py                 # 8 photos, 133 names: two minutes on one free core

The same arithmetic three ways, in turns within one run: words once and eight windows per pass (the library's way);
words once and one window per pass; words encoded for every image and one window per pass (what a loop over `segment`
does). Windows of 224 every 112 pixels, shorter side 448. The last figure is one pass over the whole photo, the default.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import clipworks
from clipworks.segment.segmenter import Segmenter
from common import record
from segmentation import SHARED, coco, coco_names

WINDOWS: dict[str, Any] = {"window": 224, "stride": 112, "side": 448}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=SHARED, help="folder that holds coco-mini")
    options.add_argument("--photos", type=int, default=8)
    options.add_argument("--turns", type=int, default=2)
    given = options.parse_args()
    torch.set_num_threads(1)
    encoder, folder = clipworks.load(), given.data / "coco-mini"
    names = list(coco_names(folder).values())
    files = [path for path, _ in coco(folder, given.photos)]
    megapixels = [float(np.prod(Image.open(file).size)) / 1e6 for file in files]
    batched = Segmenter(names, encoder=encoder, batch_size=8, **WINDOWS)
    single = Segmenter(names, encoder=encoder, batch_size=1, **WINDOWS)
    whole = Segmenter(names, encoder=encoder)
    ways = {
        "words once, windows in batches of 8": batched,
        "words once, one window per pass": single,
        "words for every image, one window per pass":
            lambda file: Segmenter(names, encoder=encoder, batch_size=1, **WINDOWS)(file),
        "words once, the whole photo in one window": whole,
    }  # fmt: skip
    labels = {name: way(files[0]).labels for name, way in list(ways.items())[:3]}
    first = next(iter(labels.values()))
    agree = min(float((first == other).mean()) for other in labels.values())
    taken: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in range(given.turns):
        for number, file in enumerate(files):
            for name, way in ways.items():
                start, busy = time.perf_counter(), time.process_time()
                way(file)
                wall, cpu = time.perf_counter() - start, time.process_time() - busy
                taken[name].append([1e3 * wall / megapixels[number], 1e3 * cpu / megapixels[number]])
    base = np.array(taken["words once, windows in batches of 8"])
    results: dict[str, Any] = {"photos": len(files), "megapixels": round(sum(megapixels), 3), "turns": given.turns,
                               "names": len(names), **WINDOWS, "pixels alike, least": round(agree, 5)}  # fmt: skip
    for name, values in taken.items():
        found = np.array(values)
        results[name] = {
            "ms_per_megapixel": round(statistics.median(found[:, 0])),
            "cpu_ms_per_megapixel": round(statistics.median(found[:, 1])),
            "times the first, cpu": round(float(np.median(found[:, 1] / base[:, 1])), 2),
            "quartiles": np.percentile(found[:, 1] / base[:, 1], [25, 75]).round(2).tolist(),
        }
        print(f"{name:45s} {results[name]}")
    print(record("segmentation_speed", results, 0))


if __name__ == "__main__":
    main()
