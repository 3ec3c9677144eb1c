"""Queries made of parts, hits unlike each other, and near-copies: the bundled model on real photos.

    python benchmarks/queries.py --data ../shared/data [--only queries,diverse]

queries   COCO photos that show one thing and not another, or both: words, words away, words with an image
diverse   PACS by class names: domains among the first hits, and how many of these are right, by diversity
headlines COCO photos copied with changes, each copy under another caption: groups and pairs of captions (HEADLINES)
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
from PIL import Image, ImageEnhance, ImageOps
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import average_precision_score

import clipworks
from clipworks.retrieval.common import group_scores, ngram_jaccard
from clipworks.retrieval.diversity import diverse_order
from clipworks.retrieval.headlines import reprints
from clipworks.retrieval.queries import compose
from common import record
from few_shot import SHARED

SEED = 0


def asking(model: Any, data: Path) -> dict[str, Any]:
    """Pairs of things that often stand in one photo: what is asked for is one without the other, or both."""
    folder = data / "coco-mini"
    entries = [e for e in json.loads((folder / "coco_mini.json").read_text(encoding="utf-8")) if e["instances"]]
    shown = [{i["category"] for i in e["instances"]} for e in entries]
    gallery = model.images([folder / e["file"] for e in entries]).numpy()
    names = sorted(set.union(*shown))
    has = np.array([[name in some for name in names] for some in shown])
    vectors = model.texts([f"a photo of a {name}" for name in names]).numpy()
    rng = np.random.default_rng(SEED)
    without: dict[str, list[float]] = {"words": [], "negative": [], "minus": []}
    both: dict[str, list[float]] = {"words": [], "image": [], "words and image": []}
    for a, b in np.argwhere(has.T.astype(int) @ has >= 4):
        if a == b:
            continue
        alone, together = has[:, a] & ~has[:, b], has[:, a] & has[:, b]
        if alone.sum() >= 4:
            for way, weight in (("words", 0.0), ("negative", -0.5), ("minus", -1.0)):
                without[way].append(_precision(compose(vectors[[a, b]], [1.0, weight]), gallery, alone))
        asked = rng.choice(np.flatnonzero(has[:, a] & ~has[:, b])) if alone.any() else -1
        if asked >= 0:  # a photo of a without b, and the word for b
            rest = np.arange(len(gallery)) != asked
            word, image = vectors[b], gallery[asked]
            for way, parts in (("words", [word]), ("image", [image]), ("words and image", [word, image])):
                query = compose(np.stack(parts), [1.0] * len(parts))
                both[way].append(_precision(query, gallery[rest], together[rest]))
    return {
        "photos": len(entries),
        "one thing without another": {"pairs": len(without["words"]), **_means(without)},
        "a photo of one thing, and the word for another": {"pairs": len(both["words"]), **_means(both)},
    }


def _precision(query: np.ndarray, gallery: np.ndarray, right: np.ndarray) -> float:
    return float(average_precision_score(right, gallery @ query))


def _means(found: dict[str, list[float]]) -> dict[str, Any]:
    """Mean average precision of each way, and its gain over the first with an interval over the pairs."""
    rng = np.random.default_rng(SEED)
    first, *_ = found
    out: dict[str, Any] = {way: float(np.mean(values)) for way, values in found.items()}
    for way in [way for way in found if way != first]:
        gain = np.array(found[way]) - np.array(found[first])
        draws = gain[rng.integers(0, len(gain), (1000, len(gain)))].mean(1)
        out[f"{way}: gain over {first}"] = [float(gain.mean()), *np.percentile(draws, [2.5, 97.5]).tolist()]
    return out


def diversity(model: Any, data: Path) -> dict[str, Any]:
    """Twelve hits of each class name over four domains of PACS."""
    folder, places = data / "pacs-128", []
    for domain in sorted(folder.iterdir()):
        for kind in sorted(domain.iterdir()):
            places += [(f, domain.name, kind.name) for f in sorted(kind.iterdir())[:40]]
    vectors = model.images([f for f, _, _ in places]).numpy()
    kinds = sorted({kind for _, _, kind in places})
    words = model.texts([f"a {kind}" for kind in kinds]).numpy()
    found: dict[str, Any] = {"images": len(places), "queries": len(kinds), "hits": 12}
    for share in (0.0, 0.3, 0.5, 0.7):
        domains, right = [], []
        for kind, word in zip(kinds, words, strict=True):
            scores = vectors @ word
            first = np.argsort(-scores)[:120]  # as `search` does with ten times the hits asked for
            hits = first[diverse_order(vectors[first], scores[first], 12, share)] if share else first[:12]
            domains.append(len({places[i][1] for i in hits}))
            right.append(np.mean([places[i][2] == kind for i in hits]))
        found[f"diversity {share}"] = {"domains of 4": float(np.mean(domains)), "precision": float(np.mean(right))}
    return found


def copies(model: Any, data: Path) -> dict[str, Any]:
    """Five altered copies of a photo, each under another of its captions; the threshold is chosen on other photos."""
    folder = data / "coco-mini"
    entries = [e for e in json.loads((folder / "coco_mini.json").read_text(encoding="utf-8"))
               if len(e["captions"]) == 5][:240]  # fmt: skip
    rng = np.random.default_rng(SEED)
    pictures = [_altered(Image.open(folder / e["file"]).convert("RGB"), way, rng) for e in entries for way in range(5)]
    vectors = model.images(pictures).numpy()
    titles = [caption for e in entries for caption in e["captions"]]
    labels = np.arange(len(entries)).repeat(5)
    half = labels < len(entries) // 2
    own, truth = [title for title, chosen in zip(titles, half, strict=True) if not chosen], labels[~half]
    found: dict[str, Any] = {"photos to choose on": int(half.sum()) // 5, "photos": int((~half).sum()) // 5}
    for way in ("louvain", "components"):
        tuned = {}
        for t in np.arange(0.7, 0.99, 0.01).round(2).tolist():
            tried = reprints(vectors[half], threshold=t, communities=way)
            tuned[t] = group_scores(labels[half], tried.groups)["ari"]
        best = max(tuned, key=lambda t: tuned[t])
        for name, threshold in (("", best), (" at the paper's 0.94", 0.94)):
            groups = reprints(vectors[~half], threshold=threshold, communities=way)
            pairs = list(groups.pairs(own))
            right = float(np.mean([truth[i] == truth[j] for i, j in pairs])) if pairs else None
            scores = group_scores(truth, groups.groups)
            found[f"{way}{name}"] = {"threshold": threshold, **scores, "pairs": len(pairs), "right pairs": right}
    likeness = ngram_jaccard(own)
    tried = [group_scores(truth, connected_components(likeness >= t)[1]) for t in np.linspace(0.2, 0.9, 15)]
    found["3-grams of the captions, at their best threshold"] = max(tried, key=lambda scores: scores["ari"])
    return found


def _altered(image: Image.Image, way: int, rng: np.random.Generator) -> Image.Image:
    """As it is, cut by up to a quarter, small and grainy, darker or lighter with other colours, mirrored and cut."""
    wide, tall = image.size
    if way in (1, 4):
        share = rng.uniform(0.75, 0.95)
        left, top = rng.uniform(0, 1 - share, 2)
        image = image.crop((int(left * wide), int(top * tall), int((left + share) * wide), int((top + share) * tall)))
    if way == 2:
        image = image.resize((max(1, wide // 6), max(1, tall // 6)))
        grains = np.asarray(image, np.float32) + rng.normal(0, 12, (*image.size[::-1], 3))
        return Image.fromarray(np.clip(grains, 0, 255).astype(np.uint8))
    if way == 3:
        return ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(rng.uniform(0.5, 1.5))).enhance(0.4)
    return ImageOps.mirror(image) if way == 4 else image


PARTS: dict[str, Callable[[Any, Path], dict[str, Any]]] = {
    "queries": asking, "diverse": diversity, "headlines": copies,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the real data")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run; the others keep their result")
    given = parser.parse_args()
    model = clipworks.load()
    path = Path(__file__).parent / "results" / "queries.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    results = {k: v for k, v in kept.items() if v.get("encoder") == model.fingerprint[:12]}
    names = hashlib.sha256("".join(sorted(str(p.name) for p in given.data.iterdir())).encode()).hexdigest()
    for name in given.only.split(","):
        began = time.perf_counter()
        found = PARTS[name](model, given.data)
        results[name] = {"encoder": model.fingerprint[:12], "seconds": round(time.perf_counter() - began, 1), **found}
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        record("queries", results, SEED, names)


if __name__ == "__main__":
    main()
