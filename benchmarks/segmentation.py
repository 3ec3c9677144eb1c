"""How well training-free segmentation finds things, and how fast: `clipworks-small` on real photos.

    python benchmarks/segmentation.py                       # all 200 masks of coco-mini, 90 pets: minutes
    python benchmarks/segmentation.py --coco 40 --pets 24 --sheet sheet.png

Nothing was trained on these sets, no setting was chosen on them: methods run with their defaults. One pass of the tower
per image serves all methods. Three questions of the same masks: all 133 names on all labelled pixels; the 80 things on
their own pixels; things against the background, where words for surroundings make the background. Pets: the animal
against the rest (trimap, border left out).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import clipworks
from clipworks.metrics.segmentation import boundary_counts, boundary_iou, confusion, mean_iou, pixel_accuracy
from clipworks.segment.background import background_words
from clipworks.segment.clearclip import ClearCLIP
from clipworks.segment.clip_dinoiser import CLIPDINOiser
from clipworks.segment.common import Dense, enter, interpolation, resample
from clipworks.segment.excel import ExCEL
from clipworks.segment.maskclip import MaskCLIP
from clipworks.segment.naclip import NACLIP
from clipworks.segment.patch_tokens import PatchTokens
from clipworks.segment.proxyclip import ProxyCLIP
from clipworks.segment.refine import pamr
from clipworks.segment.sclip import SCLIP
from clipworks.segment.segmenter import Segmenter
from clipworks.segment.trident import Trident
from clipworks.segment.windows import padded
from clipworks.zeroshot.classifier import class_vectors
from common import record

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
METHODS: dict[str, Dense] = {
    "patch-tokens": PatchTokens(), "maskclip": MaskCLIP(), "sclip": SCLIP(), "clearclip": ClearCLIP(),
    "naclip": NACLIP(), "proxyclip": ProxyCLIP(), "trident": Trident(), "excel": ExCEL(),
    "clip-dinoiser": CLIPDINOiser(), "clearclip, residual kept": ClearCLIP(residual=True),
    "naclip, residual kept": NACLIP(residual=True), "proxyclip, residual kept": ProxyCLIP(residual=True),
    "trident, residual kept": Trident(residual=True),
}  # fmt: skip
PAGE = Path(__file__).resolve().parents[1] / "docs" / "segmentation.md"
MARK, END = "<!-- measured: written by benchmarks/segmentation.py -->", "<!-- end -->"
UNREAD = ", memory not read"
EDGES = ("patch-tokens", "proxyclip", "proxyclip, residual kept")  # whose boundaries are compared too, which is slow
UNSEEN = {14: "parking meter", 21: "cow", 80: "toaster", 89: "hair drier"}
IGNORE = 255
SIDE = 448
THINGS = 80


def coco_names(folder: Path) -> dict[int, str]:
    """Label in the masks -> name in words, the 80 things first; four of these are in no mask and not in the file."""
    text = (folder / "docs" / "semantic_segmentation__config.yaml").read_text()
    pairs = {int(a): b.strip() for a, b in re.findall(r"^\s+(\d+):\s*(.+)$", text, re.M)} | UNSEEN
    endings = re.compile(r"-(merged|other|stuff)\b")
    return {label: endings.sub("", name).replace("-", " ") for label, name in sorted(pairs.items()) if label}


def coco(folder: Path, count: int) -> Iterator[tuple[Path, np.ndarray]]:
    """Image and labels from 0 to 132; 255 where no segment is."""
    table = np.full(256, IGNORE)
    table[list(coco_names(folder))] = np.arange(len(coco_names(folder)))
    for mask in spread(sorted((folder / "semantic_masks").glob("*.png")), count):
        yield folder / "images" / f"{mask.stem}.jpg", table[np.array(Image.open(mask))]


def pets(folder: Path, count: int) -> Iterator[tuple[Path, np.ndarray]]:
    """Image and labels: 0 the rest, 1 the animal, 255 its border."""
    table = np.array([IGNORE, 1, 0, IGNORE])
    for image in spread(sorted((folder / "images").glob("*.jpg")), count):
        yield image, table[np.array(Image.open(folder / "trimaps" / f"{image.stem}.png"))]


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


class Tally:
    """Counts of one method over a data set, for each of the questions."""

    def __init__(self, names: int):
        self.counts = np.zeros((names, names), np.int64)
        self.edges = np.zeros((names, 2), np.int64)

    def add(self, truth: np.ndarray, labels: np.ndarray, edges: bool = False) -> None:
        self.counts += confusion(truth, labels, len(self.counts))
        if edges:
            self.edges += boundary_counts(truth, labels, len(self.counts))

    def figures(self) -> dict[str, float]:
        made = {"miou": round(100 * mean_iou(self.counts), 2), "accuracy": round(100 * pixel_accuracy(self.counts), 2)}
        return made | ({"boundary_iou": round(100 * boundary_iou(self.edges), 2)} if self.edges.any() else {})


@torch.inference_mode()
def coco_scores(encoder: Any, folder: Path, count: int) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of every method with and without the tower's memory, for the three questions."""
    names = list(coco_names(folder).values())
    around = background_words("words", names[:THINGS])
    distinct = list(dict.fromkeys([*names, *around]))
    words, around_at = class_vectors(distinct, encoder), [distinct.index(word) for word in around]
    tallies: dict[str, dict[str, Tally]] = {}
    for number, (path, truth) in enumerate(coco(folder, count)):
        image, kept = prepared(encoder, path)
        own = torch.from_numpy(np.array(Image.open(path).convert("RGB").resize(truth.shape[::-1]))).permute(2, 0, 1)
        for name, scores in every_method(encoder, image, words):
            labelled(tallies, name, scores, kept, truth, around_at, edges=name in EDGES)
            if name == "proxyclip, residual kept":
                labelled(tallies, f"{name}, pamr", scores, kept, truth, around_at, own.float(), edges=True)
        if number % 10 == 9:
            print(number + 1, "images", time.strftime("%H:%M:%S"), flush=True)
    return {name: {task: tally.figures() for task, tally in found.items()} for name, found in tallies.items()}


def every_method(encoder: Any, image: torch.Tensor, words: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Cosines of every method, the tower's memory read and not read, from one pass of the tower."""
    hidden = enter(encoder, image[None], blocks=3, sides=(16,))
    for ending, seen in {"": hidden, UNREAD: dataclasses.replace(hidden, embedded=None)}.items():
        for name, method in METHODS.items():
            if not (ending and "," in name) and not (ending and name == "trident"):  # its guide is a further pass
                yield name + ending, method.whole(method.local(seen, words)[0].float(), image, encoder, words)


def labelled(
    tallies: dict[str, dict[str, Tally]], name: str, scores: torch.Tensor, kept: tuple[float, float],
    truth: np.ndarray, around_at: list[int], image: torch.Tensor | None = None, edges: bool = False,
) -> None:  # fmt: skip
    """Add one image's labels to the counts; `image` refines by PAMR first. Without edges every other pixel will do."""
    step = 1 if edges else 2
    found = tallies.setdefault(
        name, {"133 names": Tally(133), "80 things": Tally(133), "things and background": Tally(THINGS + 1)}
    )
    down = interpolation(truth.shape[0], scores.shape[1], scores.shape[1] * kept[0])[::step]
    right = interpolation(truth.shape[1], scores.shape[2], scores.shape[2] * kept[1])[::step]
    cosines, truth = resample(scores, down, right), truth[::step, ::step]

    def best(part: torch.Tensor) -> np.ndarray:
        if image is not None:
            likely = (40 * part).softmax(0)
            seen = likely.argmax(0).unique()
            return seen[pamr(image, likely[seen]).argmax(0)].numpy()
        return part.argmax(0).numpy()

    found["133 names"].add(truth, best(cosines[:133]), edges)
    things = np.where(truth < THINGS, truth, IGNORE)
    found["80 things"].add(things, best(cosines[:THINGS]))
    around = torch.cat([cosines[around_at].amax(0, keepdim=True), cosines[:THINGS]])
    known = np.where(truth == IGNORE, IGNORE, np.where(truth < THINGS, truth + 1, 0))
    found["things and background"].add(known, best(around))


@torch.inference_mode()
def pet_scores(encoder: Any, folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Animal (cat or dog) against words for surroundings."""
    around = background_words("words", [])
    words = class_vectors(["cat", "dog", *around], encoder)
    tallies: dict[str, Tally] = {}
    for path, truth in pets(folder, count):
        image, kept = prepared(encoder, path)
        for name, scores in every_method(encoder, image, words):
            down = interpolation(truth.shape[0], scores.shape[1], scores.shape[1] * kept[0])
            right = interpolation(truth.shape[1], scores.shape[2], scores.shape[2] * kept[1])
            found = resample(scores, down, right)
            labels = (found[:2].amax(0) > found[2:].amax(0)).long().numpy()
            tallies.setdefault(name, Tally(2)).add(truth, labels, name in EDGES)
    return {name: tally.figures() for name, tally in tallies.items()}


def speed(encoder: Any, folder: Path, turns: int, images: int) -> dict[str, Any]:
    """Milliseconds per megapixel of input: words once and windows in batches, against the naive form."""
    names = list(coco_names(folder).values())
    files = [path for path, _ in coco(folder, images)]
    pixels = sum(np.prod(Image.open(f).size) for f in files) / 1e6
    ready = Segmenter(names, encoder=encoder, window=224, stride=112)

    def ours() -> None:
        for file in files:
            ready(file)

    def naive() -> None:
        for file in files:
            Segmenter(names, encoder=encoder, window=224, stride=112, batch_size=1)(file)

    rows = {"words once, windows in batches": ours, "words for every image, one pass per window": naive}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for turn in range(turns + 1):
        for name, work in rows.items():
            start, busy = time.perf_counter(), time.process_time()
            work()
            if turn:
                taken[name].append((time.perf_counter() - start, time.process_time() - busy))
    made: dict[str, Any] = {"megapixels": round(float(pixels), 3), "images": len(files), "turns": turns}
    for name, values in taken.items():
        wall, cpu = (statistics.median(v[i] for v in values) for i in (0, 1))
        made[name] = {
            "ms_per_megapixel": round(1e3 * wall / pixels),
            "cpu_ms_per_megapixel": round(1e3 * cpu / pixels),
        }
    one, two = taken.values()
    made["ratio"] = round(statistics.median(b[1] / a[1] for a, b in zip(one, two, strict=True)), 2)
    return made


def sheet(encoder: Any, folder: Path, to: Path, count: int = 5) -> None:
    """Photo, plain tokens, two methods and a refined one, a row per photo."""
    names = list(coco_names(folder).values())
    rows = []
    settings = ("patch-tokens", "sclip", "proxyclip, residual kept", "proxyclip, residual kept, pamr")
    ready = {
        name: Segmenter(names, method=METHODS[name.removesuffix(", pamr")], encoder=encoder, smallest=0.02, window=1024,
                        refine="pamr" if "pamr" in name else None) for name in settings
    }  # fmt: skip
    for path, _ in coco(folder, count):
        photo = Image.open(path).convert("RGB")
        drawn = [photo, *(work(path).overlay(photo) for work in ready.values())]
        tall = max(page.height for page in drawn)
        row = Image.new("RGB", (sum(page.width + 8 for page in drawn), tall + 8), "white")
        for i, page in enumerate(drawn):
            row.paste(page, (sum(p.width + 8 for p in drawn[:i]), 0))
        rows.append(row)
    page = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for i, row in enumerate(rows):
        page.paste(row, (0, sum(r.height for r in rows[:i])))
    page.save(to)


def write_page(results: dict[str, Any], page: Path = PAGE) -> None:
    """Put the table between the marks of the guide; bold is better than plain tokens with the memory alike."""
    columns = {"133 names": "133 names", "80 things": "80 things", "things and background": "and background"}
    lines = [f"| method | {' | '.join(columns.values())} | pets |", "|---" * (len(columns) + 2) + "|"]

    def figures(name: str) -> list[float]:
        pet = results["pets"].get(name, {}).get("miou", math.nan)
        return [*(results["coco"][name][column]["miou"] for column in columns), pet]

    for name in results["coco"]:
        plain = figures(f"patch-tokens{UNREAD if UNREAD in name else ''}")
        pairs = zip(figures(name), plain, strict=True)
        shown = ["" if math.isnan(f) else f"**{f:.1f}**" if f > p else f"{f:.1f}" for f, p in pairs]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    settings, fast = results["settings"], results["speed"]
    once, naive = (fast[name]["cpu_ms_per_megapixel"] for name in fast if "words" in name)
    lines += [
        "",
        f"Bold beats plain tokens. COCO: {settings['coco']} photos, pets: {settings['pets']}; shorter side {SIDE}.",
        "",
        "Processor time per megapixel of input, 133 names, windows of 224 every 112 pixels:",
        f"{once:,} ms with the words encoded once and windows in batches, {naive:,} ms with the words encoded for each",
        f"image and one pass per window, {fast['ratio']} times as much.",
    ]
    head, rest = page.read_text(encoding="utf-8").split(MARK, 1)
    made = "\n".join([MARK, *lines, END])
    page.write_text(head + made + rest.split(END, 1)[1], encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="clipworks-small")
    options.add_argument("--data", type=Path, default=SHARED, help="folder that holds coco-mini and pets-600")
    options.add_argument("--coco", type=int, default=200, help="photos")
    options.add_argument("--pets", type=int, default=90, help="photos")
    options.add_argument("--turns", type=int, default=3, help="of the speed")
    options.add_argument("--sheet", type=Path, help="write a picture of some masks")
    options.add_argument("--name", default="segmentation", help="of the result file")
    given = options.parse_args()
    torch.set_num_threads(1)
    encoder = clipworks.load(given.model)
    folder = given.data / "coco-mini"
    if given.sheet:
        sheet(encoder, folder, given.sheet)
    results: dict[str, Any] = {"settings": {"model": given.model, "side": SIDE, "window": "whole image",
                                            "coco": given.coco, "pets": given.pets}}  # fmt: skip
    results["coco"] = coco_scores(encoder, folder, given.coco)
    for name, row in results["coco"].items():
        print(f"{name:40s} {row}")
    results["pets"] = pet_scores(encoder, given.data / "pets-600", given.pets)
    for name, figures in results["pets"].items():
        print(f"{name:40s} {figures}")
    results["speed"] = speed(encoder, folder, given.turns, 3)
    print(results["speed"])
    if given.name == "segmentation":
        write_page(results)
    digest = hashlib.sha256()
    for path, truth in [*coco(folder, given.coco), *pets(given.data / "pets-600", given.pets)]:
        digest.update(path.name.encode() + truth.tobytes())
    print(record(given.name, results, 0, digest.hexdigest()))


if __name__ == "__main__":
    main()
