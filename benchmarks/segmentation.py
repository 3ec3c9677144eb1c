"""How well training-free segmentation finds things: `clipworks-small` on real photos.

    python benchmarks/segmentation.py --minutes 10          # 200 masks of coco-mini, 90 pets; as often as it says so
    python benchmarks/segmentation.py --coco 20 --pets 9

Nothing was trained on these sets, no setting was chosen on them: methods run with their defaults (those of the tower's
own affinity, and ExCEL's share of calibrated blocks, were chosen on pets that are not among the 90 and on COCO photos
that have outlines of things and no mask here). One pass of the tower per photo serves all methods. Counts of five
photos at a time are kept, so a run that was stopped goes on, and only a method that changed runs again.

Three questions of the same masks: all 133 names on all labelled pixels; the 80 things on their own pixels; things
against the background, where words for surroundings make the background. Pets: the animal against the rest (trimap,
border left out). Every third pixel of every third row counts. Intervals are percentiles of the difference to plain
tokens under 1,000 draws of the photos with replacement.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import math
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import clipworks
from clipworks.metrics.segmentation import boundary_counts, boundary_iou, confusion
from clipworks.segment.background import background_words
from clipworks.segment.clearclip import ClearCLIP
from clipworks.segment.clip_dinoiser import CLIPDINOiser
from clipworks.segment.common import Dense, Hidden, enter, interpolation, resample
from clipworks.segment.excel import ExCEL
from clipworks.segment.maskclip import MaskCLIP
from clipworks.segment.naclip import NACLIP
from clipworks.segment.patch_tokens import PatchTokens
from clipworks.segment.proxyclip import ProxyCLIP
from clipworks.segment.refine import pamr
from clipworks.segment.sclip import SCLIP
from clipworks.segment.trident import Trident
from clipworks.segment.windows import padded
from clipworks.zeroshot.classifier import class_vectors
from common import record

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WORK = Path(tempfile.gettempdir()) / "clipworks-benchmarks" / "segmentation"
UNREAD, REFINED = ", memory not read", ", pamr"
METHODS: dict[str, Dense] = {
    "patch-tokens": PatchTokens(), "maskclip": MaskCLIP(), "sclip": SCLIP(), "clearclip": ClearCLIP(),
    "naclip": NACLIP(), "proxyclip": ProxyCLIP(), "trident": Trident(), "excel": ExCEL(),
    "clip-dinoiser": CLIPDINOiser(), "clearclip, residual kept": ClearCLIP(residual=True),
    "naclip, residual kept": NACLIP(residual=True), "proxyclip, residual kept": ProxyCLIP(residual=True),
    "trident, residual kept": Trident(residual=True),
}  # fmt: skip
METHODS |= {name + UNREAD: METHODS[name] for name in ("patch-tokens", "sclip", "proxyclip", "excel")}
METHODS |= {name + REFINED: METHODS[name] for name in ("proxyclip, residual kept",)}
EDGES = tuple(name for name in METHODS if name.removesuffix(REFINED) + REFINED in METHODS)  # with boundaries
UNSEEN = {14: "parking meter", 21: "cow", 80: "toaster", 89: "hair drier"}
BORDERS = ("133 names", "pets")
TASKS = {"133 names": 133, "80 things": 133, "things and background": 81, "pets": 2}
IGNORE, SIDE, THINGS, STEP, PIECE = 255, 448, 80, 3, 5
PAGE = Path(__file__).resolve().parents[1] / "docs" / "segmentation.md"
MARK, END = "<!-- measured: written by benchmarks/segmentation.py -->", "<!-- end -->"

Photos = list[tuple[Path, np.ndarray]]


def coco_names(folder: Path) -> dict[int, str]:
    """Label in the masks -> name in words, the 80 things first; four of these are in no mask and not in the file."""
    text = (folder / "docs" / "semantic_segmentation__config.yaml").read_text()
    pairs = {int(a): b.strip() for a, b in re.findall(r"^\s+(\d+):\s*(.+)$", text, re.M)} | UNSEEN
    endings = re.compile(r"-(merged|other|stuff)\b")
    return {label: endings.sub("", name).replace("-", " ") for label, name in sorted(pairs.items()) if label}


def coco(folder: Path, count: int) -> Photos:
    """Images and labels from 0 to 132; 255 where no segment is."""
    table = np.full(256, IGNORE)
    table[list(coco_names(folder))] = np.arange(len(coco_names(folder)))
    files = spread(sorted((folder / "semantic_masks").glob("*.png")), count)
    return [(folder / "images" / f"{mask.stem}.jpg", table[np.array(Image.open(mask))]) for mask in files]


def pets(folder: Path, count: int) -> Photos:
    """Images and labels: 0 the rest, 1 the animal, 255 its border."""
    table = np.array([IGNORE, 1, 0, IGNORE])
    files = spread(sorted((folder / "images").glob("*.jpg")), count)
    return [(image, table[np.array(Image.open(folder / "trimaps" / f"{image.stem}.png"))]) for image in files]


def spread(files: list[Path], count: int) -> list[Path]:
    """Evenly spaced files, so that a part is like the whole."""
    return [files[i] for i in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)]


def prepared(encoder: Any, path: Path) -> tuple[torch.Tensor, tuple[float, float]]:
    """The image as `Segmenter` sees it, and the share of both sides that is no padding."""
    image = Image.open(path).convert("RGB")
    factor = SIDE / min(image.size)
    wide, tall = (round(n * factor) for n in image.size)
    pixels = torch.from_numpy(np.array(image.resize((wide, tall), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    whole = padded(pixels, encoder.config.vision.patch_size)
    return whole, (tall / whole.shape[1], wide / whole.shape[2])


class Question:
    """Words of a data set, and which label they give to every pixel for each task."""

    def __init__(self, encoder: Any, names: Sequence[str]):
        around = background_words("words", names[:THINGS])
        distinct = list(dict.fromkeys([*names, *around]))
        file = WORK / f"{encoder.fingerprint[:12]}-{len(names)}-words.npy"
        if not file.exists():
            WORK.mkdir(parents=True, exist_ok=True)
            np.save(file, class_vectors(distinct, encoder).numpy())
        self.words, self.count = torch.from_numpy(np.load(file)), len(names)
        self.around = [distinct.index(word) for word in around]

    def labels(self, cosines: torch.Tensor, truth: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Task, truth and labels, of the words' cosines (or probabilities) at the truth's pixels."""
        things, thing = cosines[: min(THINGS, self.count)].max(0)
        around = cosines[self.around].amax(0)
        if self.count <= THINGS:
            yield "pets", truth, (things > around).long().numpy()
            return
        rest, other = cosines[THINGS : self.count].max(0)
        yield "133 names", truth, torch.where(things >= rest, thing, THINGS + other).numpy()
        yield "80 things", np.where(truth < THINGS, truth, IGNORE), thing.numpy()
        known = np.where(truth == IGNORE, IGNORE, np.where(truth < THINGS, truth + 1, 0))
        yield "things and background", known, torch.where(things > around, thing + 1, 0).numpy()


def counted(
    encoder: Any, question: Question, photos: Photos, wanted: Sequence[str], methods: dict[str, Dense] = METHODS
) -> dict[str, list[Any]]:
    """Of every photo the right, true and predicted pixels of every name, (3, C); by "method: task"."""
    found: dict[str, list[Any]] = {}
    for path, truth in photos:
        image, kept = prepared(encoder, path)
        hidden: Hidden = enter(encoder, image[None], blocks=3, sides=(16,))
        small = truth[::STEP, ::STEP]
        for name in wanted:
            method, seen = methods[name], dataclasses.replace(hidden, embedded=None) if UNREAD in name else hidden
            scores = method.whole(method.local(seen, question.words)[0].float(), image, encoder, question.words)
            down = interpolation(truth.shape[0], scores.shape[1], scores.shape[1] * kept[0])[::STEP]
            right = interpolation(truth.shape[1], scores.shape[2], scores.shape[2] * kept[1])[::STEP]
            cosines = resample(scores, down, right)
            if REFINED in name:
                cosines = refined(cosines, path)
            for task, true, labels in question.labels(cosines, small):
                if REFINED in name and task not in BORDERS:
                    continue
                both = confusion(true, labels, TASKS[task])
                found.setdefault(f"{name}: {task}", []).append(np.stack([both.diagonal(), both.sum(1), both.sum(0)]))
                if name in EDGES and task in BORDERS:
                    edges = boundary_counts(true, labels, TASKS[task])
                    found.setdefault(f"{name}: {task}: edges", []).append(edges)
    return found


def refined(cosines: torch.Tensor, path: Path) -> torch.Tensor:
    """Probabilities after PAMR on the photo at the same size, of the words that are somewhere the best."""
    size = cosines.shape[1:]
    photo = torch.from_numpy(np.array(Image.open(path).convert("RGB").resize((size[1], size[0])))).permute(2, 0, 1)
    likely = (40 * cosines).softmax(0)
    seen = likely.argmax(0).unique()
    likely[seen] = pamr(photo.float(), likely[seen])
    return likely


def pieces(encoder: Any, question: Question, photos: Photos, stop: float) -> dict[str, np.ndarray]:
    """Counts of all methods, from files where they are known, five photos at a time."""
    keys = {name: hashlib.sha256(repr((
        encoder.fingerprint, sorted(str(v) for v in vars(method).items()), inspect.getsource(inspect.getmodule(method)),
        SIDE, STEP, name, question.count)).encode()).hexdigest()[:12] for name, method in METHODS.items()}  # fmt: skip
    WORK.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(photos), PIECE):
        part = photos[first : first + PIECE]
        digest = hashlib.sha256(b"".join(p.name.encode() + t.tobytes() for p, t in part)).hexdigest()[:12]
        files = {name: WORK / f"{keys[name]}-{digest}.npz" for name in METHODS}
        missing = [name for name, file in files.items() if not file.exists()]
        if missing and time.monotonic() > stop:
            raise SystemExit(f"stopped at photo {first} of {len(photos)}; the same command goes on")
        if missing:
            made = counted(encoder, question, part, missing)
            for name in missing:
                arrays = {k: np.stack(v) for k, v in made.items() if k.split(":")[0] == name}
                np.savez_compressed(files[name], **arrays)  # type: ignore[arg-type]
            print(f"{first + len(part)} of {len(photos)} photos", time.strftime("%H:%M:%S"), flush=True)
        for file in files.values():
            with np.load(file) as kept:
                for name in kept.files:
                    rows.setdefault(name, []).append(kept[name])
    return {name: np.concatenate(found) for name, found in rows.items()}


def miou(sums: np.ndarray) -> np.ndarray:
    """Mean IoU in percent, from right, true and predicted pixels (..., 3, C), of the names that are in either."""
    right, true, predicted = np.moveaxis(sums.astype(float), -2, 0)
    either = true + predicted - right
    return 100 * np.divide(right, either, out=np.zeros_like(right), where=either > 0).sum(-1) / (either > 0).sum(-1)


def figures(counts: dict[str, np.ndarray], task: str) -> dict[str, dict[str, Any]]:
    """mIoU, accuracy and boundary IoU of every method in percent, and the interval of its gain over plain tokens."""
    each = {k.split(":")[0]: v for k, v in counts.items() if k.endswith(f": {task}")}
    photos = len(each["patch-tokens"])
    draws = np.random.default_rng(0).multinomial(photos, np.full(photos, 1 / photos), 1000).astype(float)
    often = {name: miou(np.einsum("dp,pkc->dkc", draws, found, optimize=True)) for name, found in each.items()}
    made: dict[str, dict[str, Any]] = {}
    for name, found in each.items():
        plain = f"patch-tokens{UNREAD}" if UNREAD in name else "patch-tokens"
        right, true = found.sum((0, 2))[:2]
        made[name] = {"miou": round(float(miou(found.sum(0))), 2), "accuracy": round(100 * float(right / true), 2)}
        if name != plain:
            made[name]["over plain, 95 %"] = np.percentile(often[name] - often[plain], [2.5, 97.5]).round(2).tolist()
        edges = counts.get(f"{name}: {task}: edges")
        if edges is not None:
            made[name]["boundary_iou"] = round(100 * boundary_iou(edges.sum(0)), 2)
    return made


def write_page(results: dict[str, Any], page: Path = PAGE) -> None:
    """Put the table between the marks of the guide."""
    columns = {"133 names": "133 names", "80 things": "80 things", "things and background": "and background",
               "pets": "pets"}  # fmt: skip
    lines = [f"| method | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for name in METHODS:
        cells = []
        for task in columns:
            found = results[task].get(name)
            if found is None:
                cells.append("")
                continue
            low, high = found.get("over plain, 95 %", (math.nan, math.nan))
            plain = results[task]["patch-tokens" + UNREAD * (UNREAD in name)]["miou"]
            cell = f"**{found['miou']:.1f}**" if found["miou"] > plain else f"{found['miou']:.1f}"
            cells.append(cell + (" +" if low > 0 else " -" if high < 0 else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    settings = results["settings"]
    lines += [
        "",
        "mIoU in percent; bold is more than plain tokens; + and -: the 95 % interval of the difference leaves out 0.",
        f"COCO: {settings['coco']} photos, pets: {settings['pets']}; shorter side {SIDE}.",
    ]
    head, rest = page.read_text(encoding="utf-8").split(MARK, 1)
    page.write_text(head + "\n".join([MARK, *lines, END]) + rest.split(END, 1)[1], encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="clipworks-small")
    options.add_argument("--data", type=Path, default=SHARED, help="folder that holds coco-mini and pets-600")
    options.add_argument("--coco", type=int, default=200, help="photos")
    options.add_argument("--pets", type=int, default=90, help="photos")
    options.add_argument("--minutes", type=float, default=1e9, help="stop after so long; the same command goes on")
    given = options.parse_args()
    torch.set_num_threads(1)
    stop = time.monotonic() + 60 * given.minutes
    encoder = clipworks.load(given.model)
    sets = [coco(given.data / "coco-mini", given.coco), pets(given.data / "pets-600", given.pets)]
    lists = [list(coco_names(given.data / "coco-mini").values()), ["cat", "dog"]]
    counts: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        for photos, names in zip(sets, lists, strict=True):
            counts |= pieces(encoder, Question(encoder, names), photos, stop)
    settings = {"model": given.model, "side": SIDE, "window": "whole image", "coco": len(sets[0]), "pets": len(sets[1])}
    results = {"settings": settings, **{task: figures(counts, task) for task in TASKS}}
    if (given.coco, given.pets) == (200, 90):
        write_page(results)
        digest = hashlib.sha256(b"".join(p.name.encode() + t.tobytes() for photos in sets for p, t in photos))
        print(record("segmentation", results, 0, digest.hexdigest()))
    for task in TASKS:
        for name, row in results[task].items():
            print(f"{task:22s} {name:40s} {row}")


if __name__ == "__main__":
    main()
