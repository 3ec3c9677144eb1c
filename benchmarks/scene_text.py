"""Finding photos by a word that is written in them: plain search, and FDP beside the CLIP that it is built on.

    python benchmarks/scene_text.py --minutes 3          # piece by piece: the same command goes on

No set of photographed words is at hand, so words are drawn on the photos of coco-mini, tilted, in twelve fonts; half
the photos are for training, the words are asked for on the others. FDP works around a ResNet with an attention pool.
The bundled model has none, and no pretrained ResNet is at hand: of FDP only the larger pictures can be tried on it,
without training. Its plain search is measured, by sentences that quote the word, with small letters at its own 224
pixels and at 448, and with large ones. Besides, real writing: the few photos whose captions speak of a stop sign.

FDP itself stands on a small ResNet that learned here, from drawn words alone, to tell 64 words apart (its text tower
reads letter by letter): a stand-in that shows what the parts do, not how well CLIP reads. As in the paper the tower
comes from small pictures (64 pixels) and words stand in larger ones (128), with letters of the same pixels. Asked are
those words on new photos, and 64 that nothing was trained with. The reader's rates were chosen by its loss, nothing
else was chosen. All words count as content words, since no text tower at hand parts these from function words by its
vectors. What is compared:
    native, large       plain search of that tower in the pictures made small, and as they are
    untrained           FDP's pool with its positions for large pictures, before anything was learned, without probe
    plainly tuned       the layers that FDP has of CLIP tuned by contrast alone: no mask and no probe
    FDP                 as published, but for the kinds of words
All figures are mean average precision over 64 words, each on a photo of its own; what is finished is recorded.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import clipworks
from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.tokenizers.bpe import MERGES, VOCABULARY, WORD_END
from clipworks.encoders.toy import ToyTokenizer
from clipworks.losses.infonce import infonce
from clipworks.metrics.retrieval import image_retrieval
from clipworks.retrieval.fdp import SceneText
from clipworks.retrieval.word_images import WordImage, draw_word
from clipworks.training.schedule import learning_rate
from clipworks.zeroshot.classifier import class_vectors
from common import record
from kept import WORK, Pieces, gathered
from segmentation import SHARED

SEEDS = (1, 2, 3)
NATIVE, LARGE, HEIGHT = 64, 128, (11, 17)  # pixels: sides of the small reader's pictures, size of the letters
WORDS = 64  # trained, and as many not
READING = {"chapters": 4, "steps": 1500, "drawn": 200, "lr": 1e-3, "lr of the text tower": 3e-4}
STEPS = 100  # of FDP's training
PLAIN = {"small letters, 224": (224, (0.085, 0.13)), "small letters, 448": (448, (0.085, 0.13)),
         "large letters, 224": (224, (0.2, 0.3))}  # fmt: skip
FONTS = ("Sans", "Sans-Bold", "SansCondensed", "SansCondensed-Bold", "SansMono", "SansMono-Bold", "Serif",
         "Serif-Bold", "SerifCondensed", "SerifCondensed-Italic", "Sans-Oblique")  # fmt: skip
SENTENCES = ('a photo with the text "{}".', 'a sign that says "{}".', 'the word "{}" written in a photo.')
STOP = {"by what is written": ['a photo with the text "stop".', 'a sign that says "stop".'],
        "by what it is": ["a photo of a stop sign."], "another word": ['a sign that says "open".']}  # fmt: skip


class LetterTokenizer(ToyTokenizer):
    """A letter is a token, so that words which were never trained are made of tokens which were."""

    symbols, fingerprint = string.ascii_lowercase + " .", "letters"

    def encode(self, texts: str | Sequence[str], context_length: int, on_long: str = "truncate") -> tuple[Any, int]:
        """Ids (n, longest) and how many texts were cut."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[2 + self.symbols.index(letter) for letter in text] for text in texts]
        cut = sum(len(row) > context_length - 2 for row in rows)
        rows = [[1, *row[: context_length - 2], self.eot_id] for row in rows]
        longest = max(map(len, rows), default=1)
        return torch.tensor([row + [self.pad_id] * (longest - len(row)) for row in rows]), cut


def reader() -> Encoder:
    """A ResNet of four blocks and a text tower of three, with random weights."""
    vision = VisionConfig(kind="resnet", image_size=NATIVE, width=16, layers=(1, 1, 1, 1), heads=8, activation="relu",
                          pool="attention")  # fmt: skip
    text = TextConfig(vocab_size=64, eot_id=63, context_length=32, width=96, layers=3, heads=4, mlp_width=192)
    config = EncoderConfig("reader", 128, vision, text, PreprocessConfig(NATIVE))
    made = Encoder(config, LetterTokenizer(), seed=0)
    made.visual.to(memory_format=torch.channels_last)
    return made


def words_of(part: str) -> list[str]:
    """Words of three to six letters, frequent ones among CLIP's tokens, drawn once for all."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    whole = [line.replace(" ", "").removesuffix(WORD_END) for line in lines if line.endswith(WORD_END)]
    words = [word for word in whole if 3 <= len(word) <= 6 and word.isascii() and word.isalpha()][:2000]
    order = np.random.default_rng(0).permutation(len(words))
    return [words[i] for i in (order[:WORDS] if part == "trained" else order[WORDS : 2 * WORDS])]


class Drawer:
    """Draws words on the photos for training, or on the others."""

    def __init__(self, given: argparse.Namespace, training: bool, side: int = LARGE):
        self.paths = sorted((given.data / "coco-mini" / "images").glob("*.jpg"))[0 if training else 1 :: 2]
        self.photo = functools.cache(lambda path: Image.open(path).convert("RGB").resize((side, side)))
        self.fonts = [None, *(given.fonts / f"DejaVu{name}.ttf" for name in FONTS)]

    def __call__(self, word: str, size: int, rng: np.random.Generator, height: Any = None) -> WordImage:
        photo, font = self.photo(self.paths[rng.integers(len(self.paths))]), self.fonts[rng.integers(len(self.fonts))]
        height = height or (HEIGHT[0] / size, HEIGHT[1] / size)
        return draw_word(word, size, int(rng.integers(2**31)), ground=photo, font=font, height=height)


def pixels_of(drawn: Sequence[WordImage], size: int | None = None) -> torch.Tensor:
    images = [one.image if size is None else one.image.resize((size, size)) for one in drawn]
    made = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return made.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def learn_to_read(given: argparse.Namespace, pieces: Pieces) -> Encoder:
    """The reader, trained in chapters that are kept."""
    model, words, total = reader(), words_of("trained"), READING["chapters"] * READING["steps"]
    drawer, told = Drawer(given, training=True), model.tokenize([f"{word}." for word in words])
    names = ("lr", "lr of the text tower")
    learning = [*model.visual.parameters()], [*model.text.parameters(), model.log_scale]
    optimizer = torch.optim.AdamW([{"params": part} for part in learning], weight_decay=0.05)

    def file(number: int) -> Path:
        return pieces.folder / f"{pieces.state}-reader-{number}.pt"

    def chapter(number: int) -> dict[str, Any]:
        rng, losses = np.random.default_rng([0, number]), []
        if number:
            kept = torch.load(file(number - 1), weights_only=True)
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
        drawn = [pixels_of([drawer(word, NATIVE, rng) for word in words]) for _ in range(READING["drawn"])]
        model.train()
        for step in range(number * READING["steps"], (number + 1) * READING["steps"]):
            for group, name in zip(optimizer.param_groups, names, strict=True):
                group["lr"] = learning_rate(step, lr=READING[name], total=total, warmup=50)
            loss = infonce(*model(drawn[step % len(drawn)], told))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.log_scale.data.clamp_(max=4.6)
            losses.append(loss.item())
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file(number))
        return {"loss at the end": float(np.mean(losses[-50:]))}

    for number in range(READING["chapters"]):
        pieces.once(f"reader {number}", lambda number=number: chapter(number))
    model.load_state_dict(torch.load(file(READING["chapters"] - 1), weights_only=True)["model"])
    return model.eval()


def tuned(model: SceneText, drawer: Drawer, published: bool, seed: int) -> SceneText:
    """FDP's training, or of the same layers by contrast alone."""
    words, rng = words_of("trained"), np.random.default_rng([1, seed])
    optimizer = torch.optim.Adam(model.groups())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, STEPS // 2)  # x 0.1 half-way
    for _ in range(STEPS):
        drawn = [drawer(word, LARGE, rng) for word in words]
        if published:
            masks = torch.stack([torch.from_numpy(one.mask(*model.grid)).float() for one in drawn])
            loss = sum(model.losses(pixels_of(drawn), words, [False] * len(words), masks).values())
        else:
            told = model.words(words, [False] * len(words))
            loss = infonce(plain_vectors(model, pixels_of(drawn)), told, model.encoder.log_scale.detach().exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def plain_vectors(model: SceneText, pixels: torch.Tensor) -> torch.Tensor:
    """Vectors of the pool with the same mask for all cells, which is none."""
    cells = model.cells(pixels)
    return F.normalize(model.pooled(cells, cells.new_ones(cells.shape[:2])), dim=-1)


def found(queries: torch.Tensor, images: torch.Tensor, words: Sequence[str]) -> float:
    """Mean average precision in percent; image i shows word i."""
    made = image_retrieval(queries.detach().numpy(), words, gallery=images.detach().numpy(), gallery_labels=words)
    return round(100 * made.mean_average_precision, 2)


def plain(small: Encoder, given: argparse.Namespace, seed: int) -> dict[str, float]:
    """The bundled model on one draw of pictures of words that no part of this script was trained with."""
    words, drawer = words_of("new"), Drawer(given, training=False, side=448)
    told = class_vectors(words, small, templates=SENTENCES)
    scores = {}
    for name, (side, height) in PLAIN.items():
        rng = np.random.default_rng([2, seed])  # the same photos, fonts and places
        drawn = [drawer(word, 448, rng, height).image for word in words]
        model = small if side == small.image_size else small.resize(image_size=side)
        scores[name] = found(told, model.images(drawn), words)
    return scores


def stop_signs(small: Encoder, given: argparse.Namespace) -> dict[str, Any]:
    """Average precision, in percent, of captioned photos whose captions speak of a stop sign."""
    entries = json.loads((given.data / "coco-mini" / "coco_mini.json").read_text(encoding="utf-8"))
    entries = [entry for entry in entries if entry["captions"]]
    there = ["stop sign" if "stop sign" in " ".join(entry["captions"]).lower() else "none" for entry in entries]
    images = small.images([given.data / "coco-mini" / entry["file"] for entry in entries])
    queries = F.normalize(torch.stack([small.texts(texts).mean(0) for texts in STOP.values()]), dim=-1)
    every = image_retrieval(queries.numpy(), ["stop sign"] * len(STOP), gallery=images.numpy(), gallery_labels=there)
    precision = dict(zip(STOP, (100 * every.average_precision).round(2).tolist(), strict=True))
    return {"photos": len(there), "with one": there.count("stop sign"), "average precision": precision}


def compared(model: Encoder, given: argparse.Namespace, seed: int) -> dict[str, float]:
    """FDP and what it is built on, on one draw of pictures."""
    training = Drawer(given, training=True)
    bare = SceneText(model, LARGE, probe=False, seed=seed).eval()
    drawer, rng, scores = Drawer(given, training=False), np.random.default_rng([2, seed]), {}
    pictures = {part: [drawer(word, LARGE, rng) for word in words_of(part)] for part in ("trained", "new")}
    with torch.no_grad():
        for part, drawn in pictures.items():
            told = model.texts([f"{word}." for word in words_of(part)])
            ways = {"native": model.images(pixels_of(drawn, NATIVE)), "large": model.images(pixels_of(drawn)),
                    "untrained": plain_vectors(bare, pixels_of(drawn))}  # fmt: skip
            scores |= {f"{name}, {part} words": found(told, seen, words_of(part)) for name, seen in ways.items()}
    bare = tuned(bare, training, published=False, seed=seed)
    fdp = tuned(SceneText(model, LARGE, seed=seed), training, published=True, seed=seed)
    with torch.no_grad():
        for part, drawn in pictures.items():
            words, none = words_of(part), [False] * WORDS
            asked = fdp.words(words, none)
            ways = {"plainly tuned": (bare.words(words, none), plain_vectors(bare, pixels_of(drawn))),
                    "FDP": (asked, fdp.images(pixels_of(drawn))[0])}  # fmt: skip
            scores |= {f"{name}, {part} words": found(*way, words) for name, way in ways.items()}
    return scores


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=SHARED, help="folder that holds coco-mini")
    options.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts/truetype/dejavu"), help="of DejaVu")
    options.add_argument("--minutes", type=float, default=1e9, help="after which no further piece begins")
    given = options.parse_args()
    torch.set_num_threads(1)
    small = clipworks.load()
    settings = {"words": WORDS, "fonts": len(FONTS) + 1, "reader's sides": [NATIVE, LARGE],
                "letters": HEIGHT, "reading": READING, "FDP's steps": STEPS, "encoder": small.fingerprint}  # fmt: skip
    pieces = Pieces(WORK.with_name("scene_text"), json.dumps(settings), given.minutes)
    pieces.folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256((given.data / "coco-mini" / "coco_mini.json").read_bytes()).hexdigest()
    rows = [pieces.once(f"plain {seed}", lambda seed=seed: plain(small, given, seed)) for seed in SEEDS]
    by_chance = round(100 * float(np.mean(1 / np.arange(1, WORDS + 1))), 2)  # any place is as likely as another
    results: dict[str, Any] = {"settings": settings, "seeds": list(SEEDS), "by chance": by_chance}
    results["clipworks-small"] = gathered(rows)
    record("scene_text", results, SEEDS[0], digest)
    results["stop signs"] = pieces.once("stop signs", lambda: stop_signs(small, given))
    print(record("scene_text", results, SEEDS[0], digest))
    model = learn_to_read(given, pieces)
    rows = [pieces.once(f"compared {seed}", lambda seed=seed: compared(model, given, seed)) for seed in SEEDS]
    results["small reader"] = gathered(rows)
    print(record("scene_text", results, SEEDS[0], digest))


if __name__ == "__main__":
    main()
