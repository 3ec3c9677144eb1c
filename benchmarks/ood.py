"""Unknown classes across data sets: half of Caltech-101's classes are known; the others, pets and PACS are not.

    python benchmarks/ood.py

Known classes are the first half of the names in the split file. Words alone (MSP, MaxLogit, energy, MCM) and a reject
option around a head on `--shots` images per class (energy, nearest image, their mean rank) are compared by AUROC, FPR
at 95 % of known images kept, and AUPR, known images positive. "refused" is the share of known test images that the
threshold, set at a rate of 5 % without unknown images, turns away. Unknown classes that are known classes under another
name are left out (PACS: dog, elephant, guitar, person).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

import clipworks
from clipworks.heads.nearest_mean import NearestMean
from clipworks.metrics.detection import aupr, auroc, fpr_at_tpr
from clipworks.ood.reject import Reject
from clipworks.zeroshot.classifier import class_vectors
from clipworks.zeroshot.open_set import SCORES, OpenSet
from common import record

RATE = 0.05
PACS = ("giraffe", "horse", "house")


def sample(files: list[Path], n: int, seed: int) -> list[Path]:
    """n of the files, or all, in an order drawn by the seed."""
    return [files[i] for i in np.random.default_rng(seed).permutation(len(files))[:n]]


def lots(data: Path, shots: int, size: int, seed: int) -> tuple[list[str], dict[str, list[Path]], np.ndarray]:
    """Names of the known classes, files of every lot, and labels of the shots."""
    root = data / "caltech101-128"
    split = json.loads((root / "split_zhou_Caltech101.json").read_text())
    names = sorted({name for _, _, name in split["train"]})
    names = names[: len(names) // 2]
    folder = root / "101_ObjectCategories"
    train = {n: [folder / f for f, _, name in split["train"] if name == n] for n in names}
    shot_files = [(f, i) for i, n in enumerate(names) for f in sample(train[n], shots, seed)]
    test = split["test"]
    found = {
        "shots": [f for f, _ in shot_files],
        "known": sample([folder / f for f, _, n in test if n in train], size, seed),
        "other Caltech classes": sample([folder / f for f, _, n in test if n not in train], size, seed),
        "pets": sample(sorted((data / "pets-600" / "images").glob("*.jpg")), size, seed),
        "PACS": sample(sorted(f for c in PACS for f in (data / "pacs-128").glob(f"*/{c}/*")), size, seed),
    }
    return [n.replace("_", " ") for n in names], found, np.array([i for _, i in shot_files])


def judge(known: np.ndarray, unknown: dict[str, np.ndarray]) -> dict[str, Any]:
    """Metrics of scores of known images against those of every unknown lot."""
    found = {}
    for name, scores in unknown.items():
        both, labels = np.concatenate([known, scores]), np.arange(len(known) + len(scores)) < len(known)
        values = {"AUROC": auroc(both, labels), "FPR95": fpr_at_tpr(both, labels), "AUPR": aupr(both, labels)}
        found[name] = {k: round(v, 4) for k, v in values.items()}
    return found


def run(args: argparse.Namespace) -> None:
    encoder = clipworks.load(args.model)
    names, files, labels = lots(args.data, args.shots, args.size, args.seed)
    digest = hashlib.sha256(b"".join(f.read_bytes() for lot in files.values() for f in lot))
    x = {name: encoder.images([str(f) for f in lot]).numpy() for name, lot in files.items()}
    unknown = {name: x[name] for name in files if name not in ("shots", "known")}
    words = class_vectors(names, encoder).numpy()
    results: dict[str, Any] = {
        "settings": {"model": encoder.config.name, "fingerprint": encoder.fingerprint, "known classes": len(names),
                     "images": {name: len(lot) for name, lot in files.items()}, "rate": RATE}
    }  # fmt: skip
    for score in SCORES:
        fitted = OpenSet(words, score=score, rate=RATE, scale=encoder.logit_scale).fit(x["shots"])
        results[f"words, {score}"] = {
            **judge(fitted.score_samples(x["known"]), {n: fitted.score_samples(v) for n, v in unknown.items()}),
            "refused": round(float((fitted.predict(x["known"]) == -1).mean()), 4),
        }
    for scores in (["energy"], ["nearest"], ["energy", "nearest"]):
        reject = Reject(NearestMean(text=words), scores=scores, rate=RATE).fit(x["shots"], labels)
        results[f"head, {' + '.join(scores)}"] = {
            **judge(reject.score_samples(x["known"]), {n: reject.score_samples(v) for n, v in unknown.items()}),
            "refused": round(float((reject.predict(x["known"]) == -1).mean()), 4),
        }
    for name, found in results.items():
        print(name, found)
    print(record("ood", results, args.seed, digest.hexdigest()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--model", default="clipworks-small")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--size", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args())
