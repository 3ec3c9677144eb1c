"""Long captions: what stretching the text table and Long-CLIP's fine-tuning give on real photos and texts.

    python benchmarks/long_captions.py --data ../shared/data          # goes on where it was stopped

Photos of COCO with five captions of people each; a long text is the five in one paragraph (49 to 104 tokens of the
bundled model, median 61), a short one is the first. 160 photos are tested and never learned from; of the 203 others
each seed draws 160. Compared are the model with its own 77 tokens, its table stretched to 248 without training,
contrastive fine-tuning on the long texts alone (`m2_mix` with weight 0, on the stretched model), and Long-CLIP on long
and short texts, both with the learning rate that was best on 43 of the others. The claim (Zhang et al. 2024): better
search by long texts, not worse by short ones and on class names, where fine-tuning on long texts alone loses both.

Both towers learn but for the image tower's convolutional stem, whose maps are kept (`kept.py`).
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

import clipworks
from clipworks.encoders.encoder import Encoder
from clipworks.training.evaluate import recalls
from clipworks.tuning.long_clip import LongCLIP
from clipworks.tuning.m2_mix import M2Mix
from clipworks.zeroshot.classifier import class_vectors
from common import record
from few_shot import SHARED
from kept import WORK, Pieces, coco_captions, gathered, imagenet_sample, keep, without_stem

TESTED, LEARNED, PROBE, RATES = 160, 160, 300, (1e-5, 1e-4)
WAYS = ("long texts alone", "long_clip")


class Photos:
    """Maps and texts of all photos, and the probe by class names."""

    def __init__(self, data: Path, model: Encoder):
        paths, texts = coco_captions(data / "coco-mini")
        self.maps = keep(model, paths, "coco-mini with captions")
        self.captions = texts
        self.long, self.short = [" ".join(own) for own in texts], [own[0] for own in texts]
        self.order = np.random.default_rng(0).permutation(len(paths))
        probe, self.names, target, _ = imagenet_sample(data / "imagenet-sample-1000")
        rows = np.random.default_rng(0).permutation(len(probe))[:PROBE]
        self.classes = torch.from_numpy(target[rows])
        self.probe = keep(model, [probe[i] for i in rows], f"imagenet-sample {rows.tolist()}")
        self.digest = hashlib.sha256(" ".join([p.name for p in paths] + self.long).encode()).hexdigest()

    def measure(self, encoder: Encoder, rows: np.ndarray, probe: bool = True) -> dict[str, float]:
        """Recall by long and by short texts on some photos, accuracy on names of ImageNet's classes."""
        image, found = encoder.images(self.maps[rows]).numpy(), {}
        for name, texts in (("long", self.long), ("short", self.short)):
            values = recalls(image, encoder.texts([texts[i] for i in rows]).numpy(), np.arange(len(rows)), (1, 5))
            found |= {f"{name}_{key}": round(value, 2) for key, value in values.items()}
        if probe:
            words = class_vectors(self.names, encoder, templates="a photo of a {}.")
            hit = (encoder.images(self.probe) @ words.T).argmax(1) == self.classes
            found["class_names_accuracy"] = round(100 * hit.float().mean().item(), 2)
        return found


def fit(way: str, start: Encoder, photos: Photos, rows: np.ndarray, seed: int, lr: float, epochs: int) -> Any:
    """One of the ways of training, on some photos."""
    common: dict[str, Any] = {"lr": lr, "epochs": epochs, "batch_size": 40, "augment": "none", "seed": seed}
    if way == "long_clip":
        method: Any = LongCLIP(encoder=start, warmup=0.1, **common)
    else:
        method = M2Mix(encoder=start.resize(context_length=248), weight=0.0, **common)
    return method.fit(photos.maps[rows], [photos.long[i] for i in rows]).encoder_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the real data")
    parser.add_argument("--work", type=Path, default=WORK.with_name("long_captions"), help="folder of what is finished")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing further after so long")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = clipworks.load()
    photos = Photos(given.data, model)
    tested, pool = photos.order[:TESTED], photos.order[TESTED:]

    pieces = Pieces(given.work, f"{model.fingerprint} {given.epochs}", given.minutes)
    once = pieces.once
    results: dict[str, Any] = {
        "own context": once("own", lambda: photos.measure(without_stem(model), tested)),
        "stretched": once("stretched", lambda: photos.measure(without_stem(model).resize(context_length=248), tested)),
    }
    rates = {}
    for way in WAYS:
        tried = {}
        for lr in RATES:
            tried[lr] = once(f"{way} {lr}", lambda way=way, lr=lr: photos.measure(
                fit(way, without_stem(model), photos, pool[:LEARNED], 0, lr, given.epochs), pool[LEARNED:], probe=False
            ))  # fmt: skip
        rates[way] = max(RATES, key=lambda lr: sum(v for k, v in tried[lr].items() if "recall" in k))
        results[f"{way}, tried"] = {str(lr): found for lr, found in tried.items()}
    for way in WAYS:
        found = []
        for seed in given.seeds:
            rows = np.random.default_rng(seed).permutation(pool)[:LEARNED]
            found.append(once(f"{way} {rates[way]} seed {seed}", lambda way=way, seed=seed, rows=rows: photos.measure(
                fit(way, without_stem(model), photos, rows, seed, rates[way], given.epochs), tested
            )))  # fmt: skip
        results[way] = gathered(found)
    settings = {"tested": TESTED, "learned": LEARNED, "epochs": given.epochs, "seeds": given.seeds, "rates": rates,
                "encoder": model.fingerprint[:12]}  # fmt: skip
    print(record("long_captions", {"settings": settings, **results}, given.seeds[0], photos.digest))


if __name__ == "__main__":
    main()
