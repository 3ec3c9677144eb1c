"""Finding photos by a word that is written in them: the plain search of the bundled model, beside chance.

    python benchmarks/scene_text.py --minutes 3          # piece by piece: the same command goes on

No set of photographed words is at hand, so 64 words are drawn on the photos of coco-mini, each on one, tilted and in
one of twelve fonts, and asked for by sentences that quote them. Of FDP (`retrieval/fdp.py`), which works around a
ResNet with an attention pool, only the larger pictures can be tried on the bundled model: small letters are asked for
at its own 224 pixels and at 448, large ones at 224. Besides, real writing: the few photos whose captions speak of a
stop sign, found by what is written on it and by what it is. Mean average precision in percent; nothing is trained.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import clipworks
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.tokenizers.bpe import MERGES, VOCABULARY, WORD_END
from clipworks.metrics.retrieval import image_retrieval
from clipworks.retrieval.word_images import draw_word
from clipworks.zeroshot.classifier import class_vectors
from common import record
from kept import WORK, Pieces, gathered
from segmentation import SHARED

SEEDS = (1, 2, 3)
WORDS, SIDE = 64, 448
PLAIN = {"small letters, 224": (224, (0.085, 0.13)), "small letters, 448": (448, (0.085, 0.13)),
         "large letters, 224": (224, (0.2, 0.3))}  # fmt: skip
FONTS = ("Sans", "Sans-Bold", "SansCondensed", "SansCondensed-Bold", "SansMono", "SansMono-Bold", "Serif",
         "Serif-Bold", "SerifCondensed", "SerifCondensed-Italic", "Sans-Oblique")  # fmt: skip
SENTENCES = ('a photo with the text "{}".', 'a sign that says "{}".', 'the word "{}" written in a photo.')
STOP = {"by what is written": ['a photo with the text "stop".', 'a sign that says "stop".'],
        "by what it is": ["a photo of a stop sign."], "another word": ['a sign that says "open".']}  # fmt: skip


def words() -> list[str]:
    """Words of three to six letters, frequent ones among CLIP's tokens, drawn once for all."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    whole = [line.replace(" ", "").removesuffix(WORD_END) for line in lines if line.endswith(WORD_END)]
    fitting = [word for word in whole if 3 <= len(word) <= 6 and word.isascii() and word.isalpha()][:2000]
    return [fitting[i] for i in np.random.default_rng(0).permutation(len(fitting))[WORDS : 2 * WORDS]]


class Drawer:
    """Draws words on every second photo of coco-mini, in the fonts of DejaVu and Pillow's own."""

    def __init__(self, given: argparse.Namespace):
        self.paths = sorted((given.data / "coco-mini" / "images").glob("*.jpg"))[1::2]
        self.photo = functools.cache(lambda path: Image.open(path).convert("RGB").resize((SIDE, SIDE)))
        self.fonts = [None, *(given.fonts / f"DejaVu{name}.ttf" for name in FONTS)]

    def __call__(self, word: str, rng: np.random.Generator, height: tuple[float, float]) -> Image.Image:
        photo, font = self.photo(self.paths[rng.integers(len(self.paths))]), self.fonts[rng.integers(len(self.fonts))]
        return draw_word(word, SIDE, int(rng.integers(2**31)), ground=photo, font=font, height=height).image


def plain(small: Encoder, given: argparse.Namespace, seed: int) -> dict[str, float]:
    """Mean average precision of one draw of pictures; image i shows word i."""
    asked, drawer, scores = words(), Drawer(given), {}
    told = class_vectors(asked, small, templates=SENTENCES).numpy()
    for name, (side, height) in PLAIN.items():
        rng = np.random.default_rng([2, seed])  # the same photos, fonts and places
        drawn = [drawer(word, rng, height) for word in asked]
        model = small if side == small.image_size else small.resize(image_size=side)
        made = image_retrieval(told, asked, gallery=model.images(drawn).numpy(), gallery_labels=asked)
        scores[name] = round(100 * made.mean_average_precision, 2)
    return scores


def stop_signs(small: Encoder, given: argparse.Namespace) -> dict[str, Any]:
    """Average precision of captioned photos whose captions speak of a stop sign."""
    entries = json.loads((given.data / "coco-mini" / "coco_mini.json").read_text(encoding="utf-8"))
    entries = [entry for entry in entries if entry["captions"]]
    there = ["stop sign" if "stop sign" in " ".join(entry["captions"]).lower() else "none" for entry in entries]
    images = small.images([given.data / "coco-mini" / entry["file"] for entry in entries])
    queries = F.normalize(torch.stack([small.texts(texts).mean(0) for texts in STOP.values()]), dim=-1)
    every = image_retrieval(queries.numpy(), ["stop sign"] * len(STOP), gallery=images.numpy(), gallery_labels=there)
    precision = dict(zip(STOP, (100 * every.average_precision).round(2).tolist(), strict=True))
    return {"photos": len(there), "with one": there.count("stop sign"), "average precision": precision}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=SHARED, help="folder that holds coco-mini")
    options.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts/truetype/dejavu"), help="of DejaVu")
    options.add_argument("--minutes", type=float, default=1e9, help="after which no further piece begins")
    given = options.parse_args()
    torch.set_num_threads(1)
    small = clipworks.load()
    settings = {"words": WORDS, "fonts": len(FONTS) + 1, "ways": PLAIN, "encoder": small.fingerprint}
    pieces = Pieces(WORK.with_name("scene_text"), json.dumps(settings), given.minutes)
    rows = [pieces.once(f"plain {seed}", lambda seed=seed: plain(small, given, seed)) for seed in SEEDS]
    by_chance = round(100 * float(np.mean(1 / np.arange(1, WORDS + 1))), 2)  # any place is as likely as another
    results = {"settings": settings, "seeds": list(SEEDS), "by chance": by_chance, "found": gathered(rows)}
    results["stop signs"] = pieces.once("stop signs", lambda: stop_signs(small, given))
    digest = hashlib.sha256((given.data / "coco-mini" / "coco_mini.json").read_bytes()).hexdigest()
    print(record("scene_text", results, SEEDS[0], digest))


if __name__ == "__main__":
    main()
