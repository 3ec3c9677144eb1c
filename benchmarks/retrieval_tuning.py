"""Fine-tuning for image search with the bundled model: what each published way does to search by images and by words.

    python benchmarks/retrieval_tuning.py --data ../shared/data [--classes 24 --shots 6 --epochs 5]

Classes of Caltech-101 with 24 images or more: some images of each are learned, the others search one another (mean
average precision, recall at 1) and are named by the words of their classes. The claim: "gpr-ft" helps the first and
harms the second; "2sft" and "mcip" help the first and do not harm the second (Schall et al. 2024). The tower is trained
behind its convolutional stem, which stays (`kept.py`); every seed draws its own classes and images, and no setting was
chosen on them.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch

import clipworks
from clipworks.data.labelled import LabelledSet, read_labelled
from clipworks.encoders.encoder import Encoder
from clipworks.metrics.retrieval import image_retrieval
from clipworks.tuning.retrieval_finetuning import TEMPLATES, WAYS, RetrievalFinetuning
from clipworks.zeroshot.classifier import class_vectors
from common import record
from few_shot import SHARED
from kept import WORK, Pieces, gathered, keep, without_stem

IMAGES = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the real data")
    parser.add_argument("--classes", type=int, default=24)
    parser.add_argument("--shots", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=5, help="with the margin; the text tower takes three")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--work", type=Path, default=WORK.with_name("retrieval_tuning"), help="what is finished")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing further after so long")
    parser.add_argument("--encoder", default="clipworks-small")
    given = parser.parse_args()
    model, data = clipworks.load(given.encoder), read_labelled("caltech101", given.data / "caltech101-128")
    settings = {k: v for k, v in vars(given).items() if k not in ("data", "work", "minutes")}
    pieces = Pieces(given.work, f"{model.fingerprint} {settings}", given.minutes)
    found, keys = [], ""
    for seed in given.seeds:
        one, drawn = compare(model, data, given, seed, pieces)
        found.append(one)
        keys += drawn
    results = {way: gathered([one[way] for one in found]) for way in found[0]}
    record("retrieval_tuning", {"settings": settings, "encoder": model.fingerprint[:12], **results}, given.seeds[0],
           hashlib.sha256(keys.encode()).hexdigest())  # fmt: skip


def compare(
    model: Encoder, data: LabelledSet, given: argparse.Namespace, seed: int, pieces: Pieces
) -> tuple[dict[str, dict[str, float]], str]:  # fmt: skip
    """All ways on one draw, and the keys of its images."""
    draw = np.random.default_rng(seed)
    many = np.flatnonzero(np.bincount(data.y, minlength=len(data.classes)) >= IMAGES)
    chosen = draw.permutation(many)[: given.classes]
    rows = np.stack([draw.permutation(np.flatnonzero(data.y == c))[:IMAGES] for c in chosen])
    names = [data.classes[c] for c in chosen]
    keys = "".join(data.items[i].key for i in rows.ravel())
    maps = keep(model, [data.items[i].source() for i in rows.ravel()], keys).unflatten(0, rows.shape)
    images, others = (part.flatten(0, 1) for part in (maps[:, : given.shots], maps[:, given.shots :]))
    y, answers = np.repeat(names, given.shots), np.repeat(names, IMAGES - given.shots)
    start = without_stem(model)

    def before() -> dict[str, float]:
        vectors = start.images(others)
        right = (vectors @ class_vectors(names, start, templates=TEMPLATES).T).argmax(1).numpy()
        return measures(image_retrieval(vectors, answers), float(np.mean(np.array(names)[right] == answers)))

    def after(way: str) -> dict[str, float]:
        tuned = RetrievalFinetuning(names, encoder=start, way=way, lr=given.lr, epochs=given.epochs, text_epochs=3,
                                    batch_size=36, augment="none", seed=seed).fit(images, y)  # fmt: skip
        return measures(tuned.retrieval(others, answers), tuned.score(others, answers))

    results = {"before": pieces.once(f"before {seed}", before)}
    for way in WAYS:
        results[way] = pieces.once(f"{way} {seed}", lambda way=way: after(way))
    return results, keys


def measures(found, accuracy: float) -> dict[str, float]:
    """What search by images and naming by words gave, in percent."""
    return {"image_to_image_map": round(100 * found.mean_average_precision, 2),
            "image_to_image_recall@1": round(100 * found.recall[1], 2),
            "zeroshot_accuracy": round(100 * accuracy, 2)}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
