"""Step 6 of `clipworks-small`: other languages, by distillation from translated names (DC-CLIP's first stage).

A name in another language shall have the vector of the English one. The translations are the emoji names of Unicode's
CLDR (npm `cldr-annotations-full`) and the ImageNet names of Babel-ImageNet (package `clip-benchmark`), of which a fifth
of the classes is held out: the share of held-out names whose nearest English name, among ImageNet's 1000, is the right
one tells what was learned. English sentences are read again all the while, so that English stays what it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from texts import TEMPLATES, teacher_vectors
from train_text import SentenceRecipe

from clipworks.encoders.encoder import Encoder
from clipworks.training.loop import train
from clipworks.zeroshot.classifier import class_vectors

# CLDR's codes; the vocabulary of the text tower is Latin letters without accents
LANGUAGES = ("da", "de", "es", "fi", "fr", "it", "nl", "no", "pl", "pt", "ro", "sv", "tr")
PHOTO = {"da": "et foto af {}", "de": "ein Foto von {}", "es": "una foto de {}", "fi": "kuva: {}",
         "fr": "une photo de {}", "it": "una foto di {}", "nl": "een foto van {}", "no": "et bilde av {}",
         "pl": "zdjęcie: {}", "pt": "uma foto de {}", "ro": "o fotografie cu {}", "sv": "ett foto av {}",
         "tr": "{} fotoğrafı"}  # fmt: skip


def emoji_names(cldr: Path) -> dict[str, dict[str, str]]:
    """Return language -> English name -> translated name."""
    def read(language: str) -> dict[str, str]:
        text = (cldr / "annotations" / language / "annotations.json").read_text(encoding="utf-8")
        return {sign: entry["tts"][0] for sign, entry in json.loads(text)["annotations"]["annotations"].items()
                if "tts" in entry}  # fmt: skip

    english = read("en")
    return {code: {english[sign]: name for sign, name in read(code).items() if sign in english} for code in LANGUAGES}


def class_names(path: Path) -> dict[str, dict[int, str]]:
    """Return language -> ImageNet class -> translated name."""
    table = json.loads(path.read_text(encoding="utf-8"))
    return {code: dict(zip(*table[code.upper()], strict=True)) for code in LANGUAGES}


def held_out(classes: int = 1000, seed: int = 0) -> set[int]:
    """The classes whose translations are only for measuring."""
    return set(np.random.default_rng(seed).permutation(classes)[: classes // 5].tolist())


def measure(encoder: Encoder, names: dict[str, dict[int, str]], imagenet: Sequence[str]) -> dict[str, float]:
    """Percent of held-out translated names whose nearest English ImageNet name is the right one, by language."""
    english = encoder.texts([f"a photo of a {name}." for name in imagenet])
    found = {}
    for code, table in names.items():
        places = [i for i in table if i in held_out()]
        near = (encoder.texts([PHOTO[code].format(table[i]) for i in places]) @ english.T).argmax(1)
        found[code] = round(100 * float((near == torch.tensor(places)).float().mean()), 1)
    return found


def main(
    encoder: Encoder, parts: Path, texts: Path, out: Path, *, rehearsal: int = 15000, batch_size: int = 192,
    lr: float = 1e-4, **options: Any,
) -> Encoder:  # fmt: skip
    """Go on training the text tower with translated names; the image tower stays."""
    known = json.loads((texts / "sentences.json").read_text(encoding="utf-8"))[:rehearsal]
    rows = torch.from_numpy(np.load(texts / "targets.npy")[:rehearsal]).float()
    space = torch.load(texts / "space.pt", weights_only=True)
    imagenet = json.loads((parts / "en_classnames.json").read_text(encoding="utf-8"))["imagenet1k"]
    emoji, classes = emoji_names(parts / "cldr"), class_names(parts / "babel_imagenet.json")
    english = sorted({name for table in emoji.values() for name in table})
    read = F.normalize((teacher_vectors(english, parts / "mpnet") - space["mean"]) @ space["directions"], dim=-1)
    place = {name: i for i, name in enumerate(english)}
    distinct = list(dict.fromkeys(imagenet))
    said = dict(zip(distinct, class_vectors(distinct, encoder, templates=TEMPLATES), strict=True))
    more: dict[str, torch.Tensor] = {}
    for code in LANGUAGES:
        for name, word in emoji[code].items():
            more.setdefault(word, read[place[name]])
        for i, word in classes[code].items():
            if i not in held_out():
                more.setdefault(PHOTO[code].format(word), said[imagenet[i]])
                more.setdefault(word, said[imagenet[i]])
    for word in set(more) & set(known):
        del more[word]
    print(f"before: {measure(encoder, classes, imagenet)}")
    recipe = SentenceRecipe([*known, *more], torch.cat([rows, torch.stack(list(more.values()))]))
    pairs = [("", sentence) for sentence in recipe.place]
    report = train(pairs, encoder, out=out, recipe=recipe, epochs=1, batch_size=batch_size, lr=lr, weight_decay=0.01,
                   warmup=50, freeze=["visual.*", "log_scale"], clip=1.0, save_every=100, **options)  # fmt: skip
    print(f"after: {measure(report.encoder, classes, imagenet)}")
    return report.encoder
