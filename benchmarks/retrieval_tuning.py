"""Fine-tuning for image search with the bundled model: what each published way does to search by images and by words.

    python benchmarks/retrieval_tuning.py --data ../shared/data [--classes 24 --shots 6 --epochs 5]

Classes of Caltech-101 with 24 images or more: some images of each are learned, the others search one another (mean
average precision, recall at 1) and are named by the words of their classes. The claim: "gpr-ft" helps the first and
harms the second; "2sft" and "mcip" help the first and do not harm the second (Schall et al. 2024).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np

import clipworks
from clipworks.data.labelled import read_labelled
from clipworks.metrics.retrieval import image_retrieval
from clipworks.tuning.retrieval_finetuning import TEMPLATES, WAYS, RetrievalFinetuning
from clipworks.zeroshot.classifier import class_vectors
from common import record
from few_shot import SHARED

SEED, IMAGES = 5, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the real data")
    parser.add_argument("--classes", type=int, default=24)
    parser.add_argument("--shots", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=5, help="with the margin; the text tower takes three")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--only", default=",".join(WAYS), help="ways to run")
    parser.add_argument("--encoder", default="clipworks-small")
    given = parser.parse_args()
    model, data = clipworks.load(given.encoder), read_labelled("caltech101", given.data / "caltech101-128")
    draw = np.random.default_rng(SEED)
    many = np.flatnonzero(np.bincount(data.y, minlength=len(data.classes)) >= IMAGES)
    chosen = draw.permutation(many)[: given.classes]
    rows = np.stack([draw.permutation(np.flatnonzero(data.y == c))[:IMAGES] for c in chosen])
    names = [data.classes[c] for c in chosen]
    learned, held = rows[:, : given.shots], rows[:, given.shots :]
    images, others = ([data.items[i].source() for i in part.ravel()] for part in (learned, held))
    y, answers = (np.repeat(names, part.shape[1]) for part in (learned, held))
    vectors = model.images(others)
    right = (vectors @ class_vectors(names, model, templates=TEMPLATES).T).argmax(1).numpy()
    results = {"before": measures(image_retrieval(vectors, answers), float(np.mean(np.array(names)[right] == answers)))}
    for way in given.only.split(","):
        began = time.perf_counter()
        tuned = RetrievalFinetuning(names, encoder=model, way=way, lr=given.lr, epochs=given.epochs, text_epochs=3,
                                    batch_size=36, seed=SEED).fit(images, y)  # fmt: skip
        results[way] = measures(tuned.retrieval(others, answers), tuned.score(others, answers))
        results[way]["seconds"] = round(time.perf_counter() - began, 1)
        print(json.dumps({way: results[way]}))
    keys = "".join(data.items[i].key for i in rows.ravel())
    settings = {k: str(v) for k, v in vars(given).items() if k != "data"}
    record("retrieval_tuning", {"settings": settings, "encoder": model.fingerprint[:12], **results}, SEED,
           hashlib.sha256(keys.encode()).hexdigest())  # fmt: skip


def measures(found, accuracy: float) -> dict[str, float]:
    """What search by images and naming by words gave, in percent."""
    return {"image_to_image_map": round(100 * found.mean_average_precision, 2),
            "image_to_image_recall@1": round(100 * found.recall[1], 2),
            "zeroshot_accuracy": round(100 * accuracy, 2)}  # fmt: skip


if __name__ == "__main__":
    main()
