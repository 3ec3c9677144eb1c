"""How fast classifiers of features and words are made, against the usual way, in turns within one run.

    python benchmarks/head_speed.py [--shots 16] [--threads 1] [--repeats 2] [--cache FOLDER]

Three comparisons, on Caltech-101 in CoOp's split and encoded by `clipworks-small` (features are kept in --cache):

tip_adapter   the search of alpha and beta: `TipAdapter.fit` with `validation=`, all that it does, beside the release's
              form, which computes similarities, votes and zero-shot logits anew for each of 200 x 20 pairs (torch)
probes        ridge, linear and cross-modal probe with all their choices, beside scikit-learn's LogisticRegressionCV
              over the same nine values of C and as many folds; and both as they are without any argument
text          80 templates x 1000 class names: `class_vectors`, beside a pass over all 77 positions of every sentence in
              the order given, of which a sample is timed. Second encoder: CLIP ViT-B/32's shape with random weights

Ratios are medians over turns of (usual) / (row): above 1 is faster; by the clock, and by the processor time of this
process, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import clipworks
from clipworks.encoders.config import EncoderConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.precision import fast_matmul
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.heads.common import zero_shot
from clipworks.heads.cross_modal import CrossModalProbe
from clipworks.heads.linear_probe import GRID, LinearProbe
from clipworks.heads.ridge import Ridge
from clipworks.heads.tip_adapter import TipAdapter
from clipworks.zeroshot.classifier import class_vectors
from clipworks.zeroshot.templates import resolve_templates
from common import record
from small_model import SHARED, caltech

SEED = 0
Part = tuple[np.ndarray, np.ndarray]  # features and class numbers
BETAS = tuple(0.1 + 11.9 * k / 200 for k in range(200))  # the release's grid for Caltech-101
ALPHAS = tuple(0.1 + 4.9 * k / 20 for k in range(20))


def turns(work: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Results of the last turn, and seconds by the clock and of the processor of every turn: (repeats, 2) each."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    results = {}
    for _ in range(repeats):
        for name, call in work.items():
            start = time.perf_counter(), time.process_time()
            results[name] = call()
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            print(f"{name:40s} {seconds[name][-1][0]:8.2f} s  {seconds[name][-1][1]:8.2f} s of processor", flush=True)
    return results, {name: np.array(taken) for name, taken in seconds.items()}


def times(taken: np.ndarray, usual: np.ndarray, per: float = 1.0) -> dict[str, float]:
    """Medians: seconds by the clock and of the processor, and how many times as fast as the usual way."""
    clock, processor = (np.median(taken, 0) / per).tolist()
    ratio, ratio_processor = np.median(usual / taken, 0).round(2).tolist()
    return {"seconds": round(clock, 6), "seconds_processor": round(processor, 6), "ratio": ratio,
            "ratio_processor": ratio_processor}  # fmt: skip


def features(cache: Path, encoder: Encoder, data: Path, per_class: dict[str, int]) -> dict[str, Part]:
    """So many images of every class, or all where there are fewer, of the parts of Caltech-101; cached or encoded."""
    found = {}
    for part, count in per_class.items():
        images, labels, _ = caltech(data / "caltech101-128", part)
        y = np.array(labels)
        order = np.random.default_rng(SEED).permutation(len(y))
        kept = np.concatenate([order[y[order] == c][:count] for c in np.unique(y)])
        path = cache / f"caltech101-{part}-{count}-{encoder.fingerprint[:16]}.npy"
        if not path.exists():
            print("encoding", len(kept), "images of", part, flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, encoder.images([images[i] for i in kept], batch_size=64).numpy())
        found[part] = np.load(path), y[kept]
    return found


def few(part: Part, per_class: int) -> Part:
    """The first so many images of every class."""
    x, y = part
    kept = np.concatenate([np.flatnonzero(y == c)[:per_class] for c in np.unique(y)])
    return x[kept], y[kept]


def upstream(shots: Part, validation: Part, words: np.ndarray) -> tuple[float, float, float]:
    """The release's search: every pair from the features anew, kept where better than all before."""
    keys, features, weights = (torch.tensor(a, dtype=torch.float32) for a in (shots[0], validation[0], words))
    values = F.one_hot(torch.tensor(shots[1])).float()
    labels = torch.tensor(validation[1])
    best = (-1.0, 0.0, 0.0)
    for beta in BETAS:
        for alpha in ALPHAS:
            affinity = features @ keys.T
            votes = ((-1) * (beta - beta * affinity)).exp() @ values
            logits = 100.0 * features @ weights.T + votes * alpha
            accuracy = float((logits.topk(1, 1)[1][:, 0] == labels).float().mean())
            if accuracy > best[0]:
                best = (accuracy, beta, alpha)
    return best


def tip_adapter(parts: dict[str, Part], words: np.ndarray, keys: int, repeats: int) -> dict[str, Any]:
    train, validation = few(parts["train"], keys), parts["val"]

    def ours() -> tuple[float, float, float]:
        head = TipAdapter(text=words, alphas=ALPHAS, betas=BETAS).fit(*train, validation=validation)
        return head.score(*validation), head.beta_, head.alpha_

    def faster() -> tuple[float, float, float]:
        with fast_matmul(torch.device("cpu")):
            return upstream(train, validation, words)

    work = {"release": lambda: upstream(train, validation, words), "release, fast products": faster, "clipworks": ours}
    results, seconds = turns(work, repeats)
    rows: dict[str, Any] = {"keys": len(train[1]), "validation_images": len(validation[1])}
    for name, (accuracy, beta, alpha) in results.items():
        rows[name] = {**times(seconds[name], seconds["release"]), "accuracy": round(100 * accuracy, 3),
                      "beta": round(beta, 4), "alpha": round(alpha, 4)}  # fmt: skip
    found = [results[name] for name in ("release", "clipworks")]
    rows["identical_optimum"] = bool(np.allclose(*found, atol=1e-6))
    return rows


def probes(parts: dict[str, Part], words: np.ndarray, repeats: int) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegressionCV

    train, test = parts["train"], parts["test"]
    folds = min(5, int(np.bincount(train[1]).min()))
    heads: dict[str, Callable[[], Any]] = {
        "LogisticRegressionCV": lambda: LogisticRegressionCV(Cs=GRID, cv=folds, max_iter=1000),
        "linear_probe": lambda: LinearProbe(folds=folds),
        "ridge": Ridge,
        "cross_modal": lambda: CrossModalProbe(text=words, folds=folds),
        "linear_probe with words": lambda: LinearProbe(text=words, folds=folds),
        "ridge with words": lambda: Ridge(text=words),
        "LogisticRegressionCV, its defaults": lambda: LogisticRegressionCV(max_iter=1000),
        "linear_probe, its defaults": LinearProbe,
        "cross_modal, its defaults": lambda: CrossModalProbe(text=words),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results, seconds = turns({name: lambda make=make: make().fit(*train) for name, make in heads.items()}, repeats)
    rows: dict[str, Any] = {"shots": len(train[1]), "folds": folds, "test_images": len(test[1])}
    for name, head in results.items():
        accuracy = round(100 * float(np.mean(head.predict(test[0]) == test[1])), 2)
        usual = "LogisticRegressionCV" + ", its defaults" * name.endswith(", its defaults")
        rows[name] = {**times(seconds[name], seconds[usual]), "accuracy": accuracy}
    rows["zero_shot_accuracy"] = round(100 * float(np.mean(zero_shot(test[0], words).argmax(1) == test[1])), 2)
    return rows


def text(encoder: Encoder, names: list[str], templates: list[str], sample: int) -> dict[str, Any]:
    """Four templates a turn: all names through `class_vectors`, a sample of the same sentences at full length."""
    dice, seconds, cosines, count = np.random.default_rng(SEED), [], [], 0

    def full(sentences: list[str]) -> torch.Tensor:
        with torch.inference_mode():
            tokens = encoder.tokenize(sentences)
            tokens = F.pad(tokens, (0, encoder.context_length - tokens.shape[1]), value=encoder.config.text.pad_id)
            return torch.cat([encoder.encode_text(part, cut=False) for part in tokens.split(256)])

    def fast(sentences: list[str]) -> torch.Tensor:
        with fast_matmul(encoder.device):
            return full(sentences)

    for begin in range(0, len(templates), 4):
        chosen = templates[begin : begin + 4]
        drawn = [
            chosen[dice.integers(len(chosen))].replace("{}", names[i]) for i in dice.permutation(len(names))[:sample]
        ]
        work = {"full length": lambda d=drawn: full(d), "full length, fast products": lambda d=drawn: fast(d),
                "clipworks": lambda c=chosen: class_vectors(names, encoder, templates=c)}  # fmt: skip
        results, taken = turns(work, 1)
        number = len(names) * len(chosen)
        seconds.append([taken[name][0] / (number if name == "clipworks" else len(drawn)) for name in work])
        count += number
        exact = results["full length"].double()
        cosines.append(float((exact * encoder.texts(drawn).double()).sum(1).min()))
    each = dict(zip(work, np.array(seconds).swapaxes(0, 1), strict=True))
    rows: dict[str, Any] = {"sentences": count, "sample_a_turn": sample, "turns": len(seconds)}
    rows |= {name: times(taken, each["full length"]) for name, taken in each.items()}
    rows["ratio_at_equal_precision"] = times(each["clipworks"], each["full length, fast products"])["ratio_processor"]
    return {**rows, "seconds_are_per": "sentence", "min_cosine": min(cosines)}


def imagenet_names(data: Path) -> list[str]:
    """A thousand distinct class names."""
    names = [row["name"] for row in csv.DictReader((data / "imagenet-sample-1000" / "labels.csv").open())]
    return [name if names.index(name) == i else f"{name} ({i})" for i, name in enumerate(names)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shots", type=int, default=16, help="per class, for the probes")
    options.add_argument("--keys", type=int, default=16, help="shots per class of the Tip-Adapter search")
    options.add_argument("--validation", type=int, default=4, help="images per class that it searches on")
    options.add_argument("--test", type=int, default=10, help="images per class on which the probes are compared")
    options.add_argument("--templates", type=int, default=4, help="of the 80, for the text")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--data", type=Path, default=SHARED)
    options.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "clipworks-benchmarks")
    options.add_argument("--only", choices=["tip_adapter", "probes", "text"], help="one comparison, not recorded")
    options.add_argument("--name", default="head_speed", help="of the result file")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    encoder = clipworks.load()
    per_class = {"train": given.shots, "val": given.validation, "test": given.test}
    parts = features(given.cache, encoder, given.data, per_class)
    words = class_vectors(caltech(given.data / "caltech101-128")[2], encoder).numpy()
    every = resolve_templates("imagenet")
    templates = [every[k] for k in np.linspace(0, len(every) - 1, given.templates).round().astype(int)]
    names = imagenet_names(given.data)
    work: dict[str, Callable[[], Any]] = {
        "tip_adapter": lambda: tip_adapter(parts, words, given.keys, given.repeats),
        "probes": lambda: probes(parts, words, given.repeats),
        "text": lambda: {
            "clipworks-small": text(encoder, names, templates, 256),
            "CLIP ViT-B/32": text(Encoder(EncoderConfig(), CLIPTokenizer()), names[::10], templates[:4], 64),
        },
    }
    results = {name: call() for name, call in work.items() if given.only in (None, name)}
    print(json.dumps(results, indent=1))
    if given.only is None:
        settings = {k: v for k, v in vars(given).items() if k not in ("data", "cache", "only", "name")}
        digest = hashlib.sha256(b"".join(x.tobytes() + y.tobytes() for x, y in parts.values())).hexdigest()
        print(record(given.name, {"settings": settings, "fingerprint": encoder.fingerprint, **results}, SEED, digest))


if __name__ == "__main__":
    main()
