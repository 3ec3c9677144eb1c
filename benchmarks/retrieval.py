"""Retrieval methods with the bundled model on real data: what each of them changes against its own baseline.

    python benchmarks/retrieval.py --data ../shared/data [--only linking,comclip]

linking   emoji in several drawing styles with their names: image, text and both; tuned on other emoji (CLIPPINGS)
comclip   SugarCrepe items whose photos have boxes: plain scores and scores with sub-images (ComCLIP)
inversion Caltech-101 validation images as queries: image against image, and inverted query against image (OTI)
texts     COCO captions as queries: text against text, and inverted query against text (OVI)
visdiff   every two domains of PACS: where the name of the domain comes among all that is ranked (VisDiff)
search    Caltech-101 validation images: plain, expanded, ordered anew by reciprocal neighbours
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import clipworks
from clipworks.metrics.retrieval import image_retrieval
from clipworks.retrieval.captions import named_boxes
from clipworks.retrieval.clippings import link_records, tune_links
from clipworks.retrieval.comclip import match
from clipworks.retrieval.common import group_scores, ngram_jaccard
from clipworks.retrieval.differ import differ
from clipworks.retrieval.oti import textual_inversion
from clipworks.retrieval.ovi import visual_inversion
from clipworks.retrieval.query_expansion import expand_query
from clipworks.retrieval.rerank import reciprocal_distances
from clipworks.types import Features
from common import record
from few_shot import SHARED

SEED = 0
SYNONYMS = {"person": ["man", "woman", "boy", "girl", "child", "lady", "player", "rider"], "cell phone": ["phone"],
            "dining table": ["table"], "couch": ["sofa"], "sports ball": ["ball"], "tv": ["television", "monitor"],
            "potted plant": ["plant"], "wine glass": ["glass"], "motorcycle": ["motorbike"], "airplane": ["plane"],
            "bicycle": ["bike"], "donut": ["doughnut"], "traffic light": ["light"]}  # fmt: skip


def linking(model: Any, data: Path) -> dict[str, Any]:
    """Half of 300 emoji, drawn in four styles, are linked with what was tuned on the other half."""
    folder = data / "emoji-styles-64"
    table = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    rng = np.random.default_rng(SEED)
    chosen = [table["emoji"][i] for i in rng.permutation(len(table["emoji"]))[:300]]
    styles = ["noto", "twemoji", "openmoji", "emojione-v1"]
    records, labels = [], []
    for number, entry in enumerate(chosen):
        for place, style in enumerate(styles):
            # every style has another text for it: the name, or some of the keywords, as catalogues of one thing do
            words = entry["annotations"]["en"]["keywords"]
            told = entry["name"] if place == 0 else " ".join(rng.permutation(words)[: 1 + place])
            records.append((folder / style / f"{entry['code']}.png", told))
            labels.append(number)
    image = model.images([path for path, _ in records]).numpy()
    text = model.texts([told for _, told in records]).numpy()
    labels = np.array(labels)
    tune, test = labels < 150, labels >= 150
    found = {}
    for name, weights in {"image": [1.0], "text": [0.0], "both": None}.items():
        for linkage in ("single", "average"):
            more = {} if weights is None else {"weights": weights}
            tuned = tune_links(image[tune], text[tune], labels[tune], linkage=linkage, **more)
            groups = link_records(
                image[test], text[test], weight=tuned.weight, threshold=tuned.threshold, linkage=linkage
            )
            found[f"{name}, {linkage}"] = {"weight": tuned.weight, "threshold": tuned.threshold,
                                           **group_scores(labels[test], groups)}  # fmt: skip
    strings = [told for _, told in records]
    likeness = [ngram_jaccard([s for s, kept in zip(strings, part, strict=True) if kept]) for part in (tune, test)]
    best = max(np.linspace(0.1, 0.95, 18), key=lambda t: group_scores(labels[tune], _graph(likeness[0], t))["ari"])
    found["3-grams of the text"] = {"threshold": best, **group_scores(labels[test], _graph(likeness[1], best))}
    return found


def _graph(likeness: np.ndarray, threshold: float) -> np.ndarray:
    from scipy.sparse.csgraph import connected_components

    return connected_components(likeness >= threshold)[1]


def compositions(model: Any, data: Path) -> dict[str, Any]:
    """SugarCrepe: is the true caption nearer than the changed one, with and without sub-images."""
    folder = data / "coco-mini"
    entries = json.loads((folder / "coco_mini.json").read_text(encoding="utf-8"))
    by_name = {Path(e["file"]).name: e for e in entries if e["instances"]}
    items = json.loads((folder / "sugarcrepe_subset.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for kind, rows in items.items():
        rows = [row for row in rows if row["filename"] in by_name]
        if not rows:
            continue
        pairs, boxes = [], {}
        for row in rows:
            entry = by_name[row["filename"]]
            image = Image.open(folder / entry["file"]).convert("RGB")
            boxes[id(image)] = [(i["category"], (i["bbox"][0], i["bbox"][1], i["bbox"][0] + i["bbox"][2],
                                 i["bbox"][1] + i["bbox"][3])) for i in entry["instances"]]  # fmt: skip
            pairs += [(image, row["caption"]), (image, row["negative_caption"])]
        regions = named_boxes(lambda image, boxes=boxes: boxes[id(image)], SYNONYMS)
        own = {"items": len(rows)}
        for name, options in {"black": {}, "blur": {"fill": "blur"}, "half": {"strength": 0.5}}.items():
            seen = match(pairs, model, regions, **options)
            own["plain"] = float(np.mean(seen.plain[::2] > seen.plain[1::2]))
            own[name] = float(np.mean(seen.scores[::2] > seen.scores[1::2]))
            own["with regions"] = float(np.mean(seen.found > 0))
        found[kind] = own
    total = sum(own["items"] for own in found.values())
    found["all"] = {key: sum(own["items"] * own[key] for own in found.values()) / total
                    for key in ("plain", "black", "blur", "half", "with regions")} | {"items": total}  # fmt: skip
    return found


def caltech(model: Any, data: Path, per_class: int, classes: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Vectors, classes and class names of validation images of some classes of Caltech-101, drawn once for all."""
    folder = data / "caltech101-128"
    split = json.loads((folder / "split_zhou_Caltech101.json").read_text(encoding="utf-8"))["val"]
    names = {number: name for _, number, name in split}
    some = sorted(np.random.default_rng(SEED).permutation(sorted(names))[:classes].tolist())
    chosen = [row for number in some for row in [r for r in split if r[1] == number][:per_class]]
    vectors = model.images([folder / "101_ObjectCategories" / path for path, _, _ in chosen]).numpy()
    return vectors, np.array([number for _, number, _ in chosen]), [names[n] for n in some]


def inversion(model: Any, data: Path) -> dict[str, Any]:
    """Image queries as they are and inverted to texts; the control is zero-shot accuracy, which has to fall."""
    vectors, labels, names = caltech(model, data, 3, 40)
    told = model.texts([f"a photo of a {name.replace('_', ' ')}." for name in names]).numpy()
    numbers = np.unique(labels)
    plain = image_retrieval(vectors, labels)
    found: dict[str, Any] = {"queries": len(labels), "image to image": plain.mean_average_precision,
                             "zero-shot": float(np.mean(numbers[(vectors @ told.T).argmax(1)] == labels))}  # fmt: skip
    rng = np.random.default_rng(SEED)
    for steps in (10, 30, 100):
        began = time.perf_counter()
        inverted = textual_inversion(vectors, model, steps=steps, seed=SEED).vectors
        across = image_retrieval(inverted, labels, gallery=vectors, gallery_labels=labels, ignore=np.eye(len(labels)))
        gain = across.average_precision - plain.average_precision
        gain = gain[~np.isnan(gain)]
        draws = gain[rng.integers(0, len(gain), (1000, len(gain)))].mean(1)
        found[f"inverted, {steps} steps"] = {
            "inverted to image": across.mean_average_precision,
            "gain": float(gain.mean()), "interval": np.percentile(draws, [2.5, 97.5]).tolist(),
            "zero-shot": float(np.mean(numbers[(inverted @ told.T).argmax(1)] == labels)),
            "seconds per query": (time.perf_counter() - began) / len(labels),
        }  # fmt: skip
    return found


def inverted_texts(model: Any, data: Path) -> dict[str, Any]:
    """One caption of each of 60 COCO photos asks for the other four of its photo, as it is and inverted to an image."""
    entries = json.loads((data / "coco-mini" / "coco_mini.json").read_text(encoding="utf-8"))
    five = [e["captions"] for e in entries if len(e["captions"]) == 5][:60]
    asked = model.texts([captions[0] for captions in five]).numpy()
    gallery = model.texts([caption for captions in five for caption in captions[1:]]).numpy()
    labels = np.arange(len(five))
    stock = {"gallery": gallery, "gallery_labels": labels.repeat(4)}
    found: dict[str, Any] = {"queries": len(five)}
    found["text to text"] = image_retrieval(asked, labels, **stock).mean_average_precision
    for steps in (50, 200):
        inverted = visual_inversion(asked, model, tokens=4, steps=steps, seed=SEED)
        across = image_retrieval(inverted.vectors, labels, **stock)
        found[f"inverted, {steps} steps"] = {"inverted to text": across.mean_average_precision,
                                             "loss": float(inverted.losses[:, -1].mean())}  # fmt: skip
    return found


def searching(model: Any, data: Path) -> dict[str, Any]:
    """Every image asks for the others of its class: plain, expanded, ordered anew."""
    vectors, labels, _ = caltech(model, data, 6, 60)
    score = vectors @ vectors.T
    np.fill_diagonal(score, -np.inf)
    every = np.eye(len(labels))
    found = {"queries": len(labels), "plain": image_retrieval(vectors, labels).mean_average_precision}
    for count in (1, 3, 5):
        near = np.argsort(-score, axis=1)[:, :count]
        moved = np.stack([expand_query(v, vectors[n], s[n]) for v, n, s in zip(vectors, near, score, strict=True)])
        ranked = image_retrieval(moved, labels, gallery=vectors, gallery_labels=labels, ignore=every)
        found[f"expanded by {count}"] = ranked.mean_average_precision
    from sklearn.metrics import average_precision_score

    precision = []
    for i in range(len(labels)):
        order = np.argsort(-score[i])[:-1]
        first = order[:100]
        distance = reciprocal_distances(vectors[i : i + 1], vectors[first], k1=7, k2=3)[0]
        order = np.r_[first[np.argsort(distance, kind="stable")], order[100:]]
        truth = labels[order] == labels[i]
        if truth.any():
            precision.append(average_precision_score(truth, -np.arange(len(order))))
    found["reciprocal neighbours of the first 100"] = float(np.mean(precision))
    return found


def differences(model: Any, data: Path) -> dict[str, Any]:
    """PACS: the best phrases for each ordered pair of domains, and the place of a phrase that names the domain."""
    folder, found = data / "pacs-128", {}
    words = {
        "art_painting": ("painting", "brush strokes", "watercolour"),
        "cartoon": ("cartoon", "comic", "illustration"),
        "photo": ("photo",),
        "sketch": ("sketch", "drawing", "outlines"),
    }
    sets = {}
    for domain in words:
        files = [f for kind in sorted((folder / domain).iterdir()) for f in sorted(kind.iterdir())[:10]]
        sets[domain] = Features(model.images(files).numpy(), fingerprint=model.fingerprint)
    for one in words:
        for other in words:
            if one != other:
                for way in ("centred", "plain"):
                    ranked = differ(sets[one], sets[other], encoder=model, seed=SEED, centre=way == "centred")
                    named = [i for i, phrase in enumerate(ranked.phrases, 1) if any(w in phrase for w in words[one])]
                    found[f"{one} against {other}, {way}"] = {
                        "place of the domain": named[0] if named else None,
                        "best": [f"{row['phrase']} ({row['auroc']})" for row in ranked.as_rows(5)],
                    }
    for way in ("centred", "plain"):
        places = [entry["place of the domain"] for name, entry in found.items() if name.endswith(f", {way}")]
        found[f"all {way}"] = {"first": float(np.mean([p == 1 for p in places])),
                               "among five": float(np.mean([p is not None and p <= 5 for p in places]))}  # fmt: skip
    return found


PARTS: dict[str, Callable[[Any, Path], dict[str, Any]]] = {
    "linking": linking,
    "comclip": compositions,
    "inversion": inversion,
    "texts": inverted_texts,
    "visdiff": differences,
    "search": searching,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the real data")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run; the others keep their result")
    parser.add_argument("--encoder", default="clipworks-small")
    given = parser.parse_args()
    model = clipworks.load(given.encoder)
    path = Path(__file__).parent / "results" / "retrieval.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    results = {k: v for k, v in kept.items() if k in PARTS and v.get("encoder") == model.fingerprint[:12]}
    for name in given.only.split(","):
        began = time.perf_counter()
        found = PARTS[name](model, given.data)
        results[name] = {"encoder": model.fingerprint[:12], "seconds": round(time.perf_counter() - began, 1), **found}
        print(json.dumps({name: results[name]}, indent=1))
        digest = hashlib.sha256("".join(sorted(str(p.name) for p in given.data.iterdir())).encode()).hexdigest()
        record("retrieval", results, SEED, digest)


if __name__ == "__main__":
    main()
