"""Fine-tuning on captions: geodesic mixup, CLIP-Refine, CLIP-MoE and LLM2CLIP beside plain contrast, on real photos.

    python benchmarks/caption_tuning.py --data ../shared/data --language-model MINILM     # goes on where it was stopped

Photos of COCO with captions of people, split as in `long_captions.py`: 160 are tested by their first caption, by all
five in one paragraph, and by the vectors' geometry; of the others each seed draws 160 with one caption each. Photos of
100 classes of ImageNet are named, for what is forgotten. MINILM is the folder of a sentence encoder
(sentence-transformers/all-MiniLM-L6-v2). The ways, with 12 steps of 40 pairs but where another number is said:

    contrastive   fine-tuning with InfoNCE, both towers (`m2_mix` with weight 0)
    m2_mix        and the mixed negatives
    clip_refine   random references and distillation
    clip_moe      4 steps for each of two further experts, 4 for the routers
    llm2clip      24 steps of the adapter alone on the frozen sentence encoder, into the encoder's own space
    llm2clip, own the same on the encoder's own frozen text tower

Rates are those that the pages of the methods recommend for a few hundred pairs, 3e-5 for whole towers; none was chosen
on these photos. The image tower's convolutional stem stays (`kept.py`).
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import clipworks
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.experts import parameter_counts
from clipworks.tuning.clip_moe import CLIPMoE
from clipworks.tuning.clip_refine import CLIPRefine
from clipworks.tuning.llm2clip import LLM2CLIP
from clipworks.tuning.m2_mix import M2Mix
from clipworks.zeroshot.classifier import class_vectors
from common import record
from few_shot import SHARED
from kept import WORK, Pieces, gathered, without_stem
from long_captions import LEARNED, TESTED, Photos

NAMED = 100
WAYS = ("contrastive", "m2_mix", "clip_refine", "clip_moe", "llm2clip", "llm2clip, own")


def method(way: str, start: Encoder, seed: int, language_model: Path | None) -> Any:
    """The method of a way, with its settings."""
    common: dict[str, Any] = {"encoder": start, "batch_size": 40, "augment": "none", "seed": seed}
    if way in ("contrastive", "m2_mix"):
        return M2Mix(weight=0.05 * (way == "m2_mix"), lr=3e-5, epochs=3, **common)
    if way == "clip_refine":
        return CLIPRefine(normalise=True, lr=3e-5, epochs=3, **common)
    if way == "clip_moe":
        return CLIPMoE(experts=3, clusters=2, lr=1e-4, router_lr=1e-3, warmup=0, **common)
    model = None if way == "llm2clip, own" else str(language_model)
    return LLM2CLIP(language_model=model, projection="kept", vision=False, lr=1e-3, epochs=6, **common)


def geometry(image: torch.Tensor, text: torch.Tensor) -> dict[str, float]:
    """Distance of the means of both sides, mean cosine of pairs, and the uniformity of both sides together."""
    both = torch.cat([image, text])
    spread = torch.pdist(both).square().mul(-2).exp().mean().log()
    gap, alignment = (image.mean(0) - text.mean(0)).norm(), (image * text).sum(1).mean()
    return {"gap": round(gap.item(), 4), "cosine_of_pairs": round(alignment.item(), 4),
            "uniformity": round(spread.item(), 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the real data")
    parser.add_argument("--language-model", type=Path, help="folder of the sentence encoder; without it one way less")
    parser.add_argument("--work", type=Path, default=WORK.with_name("caption_tuning"), help="what is finished")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--minutes", type=float, default=1e9, help="then record what is there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = clipworks.load()
    photos = Photos(given.data, model)
    texts = photos.captions
    tested, pool = photos.order[:TESTED], photos.order[TESTED:]
    pieces = Pieces(given.work, model.fingerprint, given.minutes)

    shown, answers = np.unique(photos.classes[:NAMED], return_inverse=True)
    names = [photos.names[i] for i in shown]

    def measure(encoder: Encoder) -> dict[str, float]:
        image, text = encoder.images(photos.maps[tested]), encoder.texts([photos.short[i] for i in tested])
        words = class_vectors(names, encoder, templates="a photo of a {}.")
        hit = (encoder.images(photos.probe[:NAMED]) @ words.T).argmax(1).numpy() == answers
        named = {"class_names_accuracy": round(100 * float(hit.mean()), 2)}
        return {**photos.measure(encoder, tested, probe=False), **named, **geometry(image, text)}

    def learn(way: str, seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        rows = rng.permutation(pool)[:LEARNED]
        pairs = [(i, texts[i][c]) for i in rows for c in rng.permutation(5)[:1]]
        made = method(way, without_stem(model), seed, given.language_model)
        made.fit(photos.maps[[i for i, _ in pairs]], [text for _, text in pairs])
        found: dict[str, Any] = measure(made.encoder_)
        if way == "clip_moe":
            found["parameters"] = parameter_counts(made.encoder_)
        return found

    ways = WAYS if given.language_model else [way for way in WAYS if way != "llm2clip"]
    jobs = {f"{way} {seed}": partial(learn, way, seed) for seed in given.seeds for way in ways}
    done = pieces.run({"before": lambda: measure(without_stem(model)), **jobs})
    results: dict[str, Any] = {"settings": {"tested": TESTED, "learned": LEARNED, "encoder": model.fingerprint[:12]},
                               "before": done["before"]}  # fmt: skip
    for way in ways:
        if there := [seed for seed in given.seeds if f"{way} {seed}" in done]:
            results[way] = {"seeds": there, **gathered([done[f"{way} {seed}"] for seed in there])}
    print(record("caption_tuning", results, given.seeds[0], photos.digest))


if __name__ == "__main__":
    main()
