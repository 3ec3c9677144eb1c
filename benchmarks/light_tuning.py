"""Four ways of tuning with a task of their own, on real data: SAM-CLIP, CLIP-SCGI, GM-DF, TIP-CLIP.

    python benchmarks/light_tuning.py --data ../shared/data --packages PACKAGES --nouns data.noun   # goes on

The bundled model at 128 pixels, whole towers with their stems; three seeds, each with its own draw; settings were
chosen by nothing. PACKAGES is that of `few_shot.py`, data.noun WordNet's (Debian: wordnet-base). What is finished is
recorded, part by part and seed by seed. What is done:

    sam_clip    A teacher is tuned to tell three kinds of textile apart. It is merged into the model that it came from,
                from 90 textiles without labels, with rehearsal on 90 photos and without. Measured: textiles by the new
                head and the teacher's words, photos of 150 classes of ImageNet by their names.
    clip_scgi   Identities are emoji, of which each has a picture in nine drawing styles; 24 are learned, 30 others
                search one another. No pictures of people. Captions are keywords. Beside it: the same without captions,
                and the margin loss of `retrieval_finetuning` ("gpr-ft").
    gm_df       Good or damaged, over three sources: tiles, textiles, solar cells. No forgeries: a stand-in. One
                detector with domains and meta step, one without, and three of one source each.
    tip_clip    Photos of ImageNet's classes with WordNet's definition of the class, and definitions of abstract nouns
                as texts without a picture. Measured on other definitions: macro F1 at the threshold that is best on
                further ones, and the mean reciprocal rank of photos by definitions.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score

import clipworks
from clipworks.data.labelled import LabelledSet
from clipworks.encoders.encoder import Encoder
from clipworks.metrics.retrieval import image_retrieval
from clipworks.tuning.clip_scgi import CLIPSCGI
from clipworks.tuning.gm_df import GMDF
from clipworks.tuning.retrieval_finetuning import RetrievalFinetuning
from clipworks.tuning.sam_clip import SAMCLIP
from clipworks.tuning.tip_clip import TIPCLIP, add_null, best_threshold, visualness
from clipworks.tuning.vr_lwf import VRLwF
from clipworks.zeroshot.classifier import class_vectors
from common import record
from few_shot import SHARED, sets, things
from kept import WORK, Pieces, gathered, imagenet_sample

SIZE = 128
NAMES = ("an undamaged surface", "a damaged surface")
GOOD = {"defects": "good", "textiles": "woven textile with no defects", "elpv": "solar cell without defects"}
ABSTRACT = {"07", "09", "16", "24", "26"}  # WordNet's files of attributes, cognition, motives, relations and states
Found = dict[str, dict[str, Any]]


def pixels(model: Encoder, images: list[Any]) -> torch.Tensor:
    """Preprocessed images (n, 3, SIZE, SIZE)."""
    return torch.stack([model.preprocess(image) for image in images])


def accuracy(encoder: Encoder, maps: torch.Tensor, names: list[str], y: np.ndarray) -> float:
    """By class words, in percent."""
    words = class_vectors(names, encoder, templates="a photo of a {}.")
    return round(100 * float(np.mean((encoder.images(maps) @ words.T).argmax(1).numpy() == y)), 2)


def per_class(data: LabelledSet, rng: np.random.Generator, *counts: int) -> list[np.ndarray]:
    """Rows of a set, drawn: so many of every class for each count, no row twice."""
    mixed = [rng.permutation(np.flatnonzero(data.y == c)) for c in range(len(data.classes))]
    ends = np.cumsum((0, *counts))
    return [np.concatenate([own[a:b] for own in mixed]) for a, b in itertools.pairwise(ends)]


def sam_clip(model: Encoder, given: argparse.Namespace, seed: int) -> Found:
    rng, data = np.random.default_rng(seed), sets(given.data, given.packages, ["textiles"])["textiles"]
    photos, names, target, _ = imagenet_sample(given.data / "imagenet-sample-1000")
    taught, seen, held = per_class(data, rng, 30, 30, 30)
    order = rng.permutation(len(photos))
    probe, rehearsal = target[order[:150]], pixels(model, [photos[i] for i in order[150:240]])
    other = pixels(model, [photos[i] for i in order[:150]])
    names, answers = [names[i] for i in np.unique(probe)], np.unique(probe, return_inverse=True)[1]
    own, unlabelled, test = (pixels(model, [data.items[i].source() for i in r]) for r in (taught, seen, held))
    plain = VRLwF(data.classes, encoder=model, image_weight=0, text_weight=0, lr=1e-4, steps=16, batch_size=30,
                  augment="none", seed=seed).fit(own, data.y[taught])  # fmt: skip
    teacher = plain.encoder_
    found = {name: {"textiles": accuracy(encoder, test, data.classes, data.y[held]),
                    "class_names": accuracy(encoder, other, names, answers)}
             for name, encoder in (("before", model), ("teacher", teacher))}  # fmt: skip
    for way, weight in (("with rehearsal", 10.0), ("without", 0.0)):
        tuner = SAMCLIP(encoder=model, teacher=teacher, keep_weight=weight, head_layers=1, lr=1e-4, backbone_rate=1.0,
                        probe_rate=8.0, probe_epochs=4, epochs=3, batch_size=30, augment="none", seed=seed)  # fmt: skip
        tuner.fit(unlabelled, rehearsal=rehearsal)
        right = tuner.teacher_logits(test, data.classes).argmax(1) == data.y[held]
        found[way] = {"textiles": round(100 * float(right.mean()), 2),
                      "class_names": accuracy(tuner.merge(), other, names, answers)}  # fmt: skip
    return found


def clip_scgi(model: Encoder, given: argparse.Namespace, seed: int) -> Found:
    rng, folder = np.random.default_rng(seed), given.data / "emoji-styles-64"
    data = things(sets(given.data, None, ["emoji_styles"])["emoji_styles"], folder)
    many = rng.permutation(np.flatnonzero(np.bincount(data.y) == 9))
    learned, held = (np.flatnonzero(np.isin(data.y, part)) for part in (many[:24], many[24:54]))
    table = {e["name"]: e for e in json.loads((folder / "emoji.json").read_text(encoding="utf-8"))["emoji"]}
    names = [data.classes[c] for c in data.y[learned]]
    words = {name: table[name]["annotations"]["en"]["keywords"] for name in set(names)}
    captions = [" ".join(word for word in words[name] if word not in name) or "a thing" for name in names]
    images, others = (pixels(model, [data.items[i].source() for i in rows]) for rows in (learned, held))

    def measures(vectors: torch.Tensor) -> dict[str, float]:
        report = image_retrieval(vectors, data.y[held], cutoffs=(1,))
        return {"map": round(100 * report.mean_average_precision, 2), "rank_1": round(100 * report.recall[1], 2)}

    found, common = {"before": measures(model.images(others))}, {"epochs": 3, "augment": "none", "seed": seed}
    for way, texts in (("captions", captions), ("no captions", None)):
        tuner = CLIPSCGI(encoder=model, subject="thing", lr=2e-5, module_rate=25.0, batch_size=32, **common)
        tuner.fit(images, names, captions=texts)
        for reading in ("fused", "visual"):
            found[f"{way}, {reading}"] = measures(tuner.vectors(others, reading=reading))
    margin = RetrievalFinetuning(encoder=model, way="gpr-ft", lr=2e-5, batch_size=32, **common).fit(images, names)
    return {**found, "gpr-ft": measures(margin.vectors(others))}


def gm_df(model: Encoder, given: argparse.Namespace, seed: int) -> Found:
    rng, images, y, held, answers = np.random.default_rng(seed), [], [], {}, {}
    for source, data in sets(given.data, given.packages, list(GOOD)).items():
        bad = np.array([name != GOOD[source] for name in data.classes])[data.y].astype(int)
        mixed = [rng.permutation(np.flatnonzero(bad == k)) for k in (0, 1)]
        rows, test = (np.concatenate([own[a:b] for own in mixed]) for a, b in ((0, 20), (20, 60)))
        images.append(pixels(model, [data.items[i].source() for i in rows]))
        held[source], answers[source] = pixels(model, [data.items[i].source() for i in test]), bad[test]
        y.append(bad[rows])
    common: dict[str, Any] = {"encoder": model, "lr": 1e-3, "augment": "none", "batch_size": 30, "seed": seed,
                              "sentence": ("a", "showing signs of damage"), "templates": "a photo of {}."}  # fmt: skip
    plain = {"inner_lr": 0.0, "sentence_weight": 0.0, "alignment_weight": 0.0, "pixel_weight": 0.0}
    joined, labels = torch.cat(images), np.concatenate(y)
    sources = np.repeat(list(GOOD), [len(part) for part in images])
    words = class_vectors(NAMES, model, templates="a photo of {}.")
    right = {s: (model.images(held[s]) @ words.T).argmax(1).numpy() == answers[s] for s in held}
    found = {"before": {s: round(100 * float(hit.mean()), 2) for s, hit in right.items()}}
    whole = GMDF(NAMES, domains=tuple(GOOD), epochs=4, **common).fit(joined, labels, domains=sources)
    joint = GMDF(NAMES, epochs=4, **common, **plain).fit(joined, labels)
    apart = [GMDF(NAMES, epochs=4, **common, **plain).fit(x, own) for x, own in zip(images, y, strict=True)]
    for way, detectors in (("gm_df", [whole] * 3), ("joint", [joint] * 3), ("apart", apart)):
        found[way] = {s: round(100 * d.score(held[s], answers[s]), 2) for s, d in zip(held, detectors, strict=True)}
    return {way: {**own, "mean": round(float(np.mean(list(own.values()))), 2)} for way, own in found.items()}


def tip_clip(model: Encoder, given: argparse.Namespace, seed: int) -> Found:
    photos, _, _, numbers = imagenet_sample(given.data / "imagenet-sample-1000")
    defined, abstract, rng = {}, [], np.random.default_rng(seed)
    for line in given.nouns.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            gloss = line.partition(" | ")[2].split(";")[0].strip()
            defined[f"n{line[:8]}"] = gloss
            if line.split(" ", 2)[1] in ABSTRACT and 4 <= len(gloss.split()) <= 20:
                abstract.append(gloss)
    order, texts = rng.permutation(len(photos)), [abstract[i] for i in rng.permutation(len(abstract))[:600]]
    learned, chosen, held = order[:240], order[240:400], order[400:650]
    told = [defined[number] for number in numbers]
    tests = [[told[i] for i in rows] + own for rows, own in ((chosen, texts[240:400]), (held, texts[400:]))]
    truth = [np.arange(len(own)) < n for own, n in zip(tests, (len(chosen), len(held)), strict=True)]
    seen = pixels(model, [photos[i] for i in held])

    def measures(encoder: Encoder) -> dict[str, float]:
        threshold = best_threshold(visualness(tests[0], encoder), truth[0])
        called = visualness(tests[1], encoder) > threshold
        scores = encoder.texts(tests[1][: len(held)]) @ encoder.images(seen).T
        rank = (scores > scores.diagonal()[:, None]).sum(1) + 1
        return {"macro_f1": round(float(f1_score(truth[1], called, average="macro")), 4),
                "mrr": round((1 / rank).mean().item(), 4)}  # fmt: skip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_null(model)
    tuner = TIPCLIP(encoder=model, non_visual=texts[:240], epochs=3, batch_size=40, seed=seed)
    tuner.fit(pixels(model, [photos[i] for i in learned]), [told[i] for i in learned])
    return {"before": measures(model), "tip_clip": measures(tuner.encoder_)}


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What several seeds gave, one list per way and measure."""
    ways = {way: gathered([one[way] for one in found]) for way in found[0] if way != "cpu_seconds"}
    return {**ways, "cpu_seconds": [one["cpu_seconds"] for one in found]}


PARTS = {part.__name__: part for part in (sam_clip, clip_scgi, gm_df, tip_clip)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the real data")
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--nouns", type=Path, required=True, help="WordNet's data.noun")
    parser.add_argument("--work", type=Path, default=WORK.with_name("light_tuning"), help="folder of what is finished")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--minutes", type=float, default=1e9, help="then record what is there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    fingerprint = clipworks.load().fingerprint
    pieces = Pieces(given.work, fingerprint, given.minutes)
    wanted = {f"{name} {seed}": (name, seed) for seed in given.seeds for name in given.only}
    pieces.run({key: lambda name=name, seed=seed: PARTS[name](clipworks.load().resize(image_size=SIZE), given, seed)
                for key, (name, seed) in wanted.items()})  # fmt: skip
    results: dict[str, Any] = {"settings": {"image_size": SIZE, "encoder": fingerprint[:12]}}
    for name in PARTS:
        there = {seed: found for seed in (1, 2, 3) if (found := pieces.done(f"{name} {seed}"))}
        if there:
            results[name] = {"seeds": list(there), **joined(list(there.values()))}
    print(record("light_tuning", results, 1, hashlib.sha256(given.nouns.read_bytes()).hexdigest()))


if __name__ == "__main__":
    main()
