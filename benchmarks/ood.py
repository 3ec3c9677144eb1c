"""Unknown classes across data sets: half of Caltech-101's classes are known; the others, pets and PACS are not.

    python benchmarks/ood.py

Known classes are the first half of the names in the split file. Compared are words alone (MSP, MaxLogit, energy, MCM),
CLIPN by both of its rules, and a reject option around a head on `--shots` images per class (energy, nearest image,
their mean rank), by AUROC, FPR at 95 % of known images kept, and AUPR, known images positive. "refused" is the share of
known test images that are turned away: by a threshold set at a rate of 5 % without unknown images, by CLIPN without a
threshold. CLIPN's "no" tower is taught on the captions of coco-mini, some hundred photos where the paper has three
million; both of its losses are measured on photos left out, before and after. Its control has no tower: sentences "a
photo without a ...". Unknown classes that are known classes under another name are left out (PACS: dog, elephant,
guitar, person). Images and shots are drawn by each seed; the mean and standard deviation over seeds are recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import clipworks
from clipworks.heads.nearest_mean import NearestMean
from clipworks.metrics.detection import aupr, auroc, fpr_at_tpr
from clipworks.ood.clipn import CLIPN, RULES, NoTower, itbo_loss, teach_no, tso_loss
from clipworks.ood.reject import Reject
from clipworks.zeroshot.classifier import class_vectors
from clipworks.zeroshot.open_set import SCORES, OpenSet
from common import record

WORK = Path(tempfile.gettempdir()) / "clipworks-benchmarks" / "ood"
RATE = 0.05
PACS = ("giraffe", "horse", "house")
LEFT_OUT = 60  # photos with captions that the "no" tower is not taught on


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


class Kept:
    """Vectors of images, made once and kept in a file."""

    def __init__(self, encoder: Any, file: Path):
        self.encoder, self.file = encoder, file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.rows = dict(np.load(file)) if file.exists() else {}

    def __call__(self, files: list[Path]) -> np.ndarray:
        new = [str(f) for f in files if str(f) not in self.rows]
        for start in range(0, len(new), 100):
            part = new[start : start + 100]
            self.rows.update(zip(part, self.encoder.images(part).numpy(), strict=True))
            np.savez(self.file, **self.rows)
        return np.stack([self.rows[str(f)] for f in files])


def no_tower(
    encoder: Any, folder: Path, vectors: Kept, epochs: int, seed: int
) -> tuple[NoTower, dict[str, list[float]]]:
    """A "no" tower taught on photos and captions, and its two losses on photos left out, before and after."""
    entries = [e for e in json.loads((folder / "coco_mini.json").read_text(encoding="utf-8")) if e["captions"]]
    order = np.random.default_rng(seed).permutation(len(entries))
    taught, out = order[LEFT_OUT:], order[:LEFT_OUT]
    x = torch.from_numpy(vectors([folder / e["file"] for e in entries]))
    captions = [e["captions"][seed % len(e["captions"])] for e in entries]
    image, yes = x[out], encoder.texts([captions[i] for i in out])

    def losses(tower: NoTower) -> list[float]:
        no = tower.texts([captions[i] for i in out])
        return [float(itbo_loss(image, yes, no, encoder.logit_scale)), float(tso_loss(yes, no))]

    before = losses(NoTower(encoder).eval())
    told = [captions[i] for i in taught]
    tower = teach_no(encoder, x[taught], told, epochs=epochs, batch_size=64, seed=seed)
    return tower, {"before": before, "after": losses(tower)}


def judge(known: np.ndarray, unknown: dict[str, np.ndarray], refused: np.ndarray) -> dict[str, Any]:
    """Metrics of scores of known images against those of every unknown lot."""
    found: dict[str, Any] = {"refused": float(refused.mean())}
    for name, scores in unknown.items():
        both, labels = np.concatenate([known, scores]), np.arange(len(known) + len(scores)) < len(known)
        found |= {f"{name}: AUROC": auroc(both, labels), f"{name}: FPR95": fpr_at_tpr(both, labels),
                  f"{name}: AUPR": aupr(both, labels)}  # fmt: skip
    return found


def one(encoder: Any, given: argparse.Namespace, vectors: Kept, seed: int) -> tuple[Any, Any, bytes]:
    """All methods on one draw, the losses of the "no" tower, and what the data are."""
    names, files, labels = lots(given.data, given.shots, given.size, seed)
    digest = hashlib.sha256(b"".join(f.read_bytes() for lot in files.values() for f in lot)).digest()
    x = {name: vectors(lot) for name, lot in files.items()}
    unknown = {name: x[name] for name in files if name not in ("shots", "known")}
    words, scale = class_vectors(names, encoder).numpy(), encoder.logit_scale
    tower, losses = no_tower(encoder, given.data / "coco-mini", vectors, given.epochs, seed)
    without = class_vectors(names, encoder, templates="a photo without a {}.").numpy()
    judges: dict[str, Any] = {
        f"words, {score}": OpenSet(words, score=score, rate=RATE, scale=scale).fit(x["shots"]) for score in SCORES
    }
    for rule in RULES:
        judges[f"CLIPN, {rule}"] = CLIPN(words, class_vectors(names, tower).numpy(), rule=rule, scale=scale)
        judges[f'"without a", {rule}'] = CLIPN(words, without, rule=rule, scale=scale)
    for scores in (["energy"], ["nearest"], ["energy", "nearest"]):
        head = Reject(NearestMean(text=words), scores=scores, rate=RATE)
        judges[f"head, {' + '.join(scores)}"] = head.fit(x["shots"], labels)
    found = {name: judge(j.score_samples(x["known"]), {n: j.score_samples(v) for n, v in unknown.items()},
                         j.predict(x["known"]) == -1) for name, j in judges.items()}  # fmt: skip
    return found, losses, digest


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    options.add_argument("--shots", type=int, default=4)
    options.add_argument("--size", type=int, default=100, help="images of every lot")
    options.add_argument("--epochs", type=int, default=5, help='of the "no" tower')
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--work", type=Path, default=WORK, help="vectors are kept here")
    given = options.parse_args()
    encoder = clipworks.load()
    vectors, runs, losses = Kept(encoder, given.work / f"{encoder.fingerprint[:16]}.npz"), {}, {}
    digest = hashlib.sha256()
    for seed in given.seeds:
        runs[seed], losses[seed], data = one(encoder, given, vectors, seed)
        digest.update(data)
        print(seed, losses[seed], flush=True)
    mean = {}
    for name in runs[given.seeds[0]]:
        values = {metric: [run[name][metric] for run in runs.values()] for metric in runs[given.seeds[0]][name]}
        mean[name] = {m: [round(float(np.mean(v)), 4), round(float(np.std(v)), 4)] for m, v in values.items()}
        print(name, {m: v for m, v in mean[name].items() if "AUROC" in m or m == "refused"})
    settings = {"fingerprint": encoder.fingerprint, "shots": given.shots, "images of every lot": given.size,
                "rate": RATE, "epochs": given.epochs, "seeds": given.seeds}  # fmt: skip
    results = {"settings": settings, "mean and spread": mean, "itbo and tso of photos left out": losses, "runs": runs}
    print(record("ood", results, given.seeds[0], digest.hexdigest()))


if __name__ == "__main__":
    main()
