"""What CLIP-DINOiser's two small heads bring: trained on photos without labels, judged on the masks of other photos.

    python benchmarks/dinoiser.py --minutes 10              # 3 seeds; the same command goes on
    python benchmarks/dinoiser.py --seeds 1 --learn 20 --steps 20 --coco 20 --pets 9

DINO is not here: both teachers are the tower's own. "stem": cosines of its stem's map at 16 pixels, and FOUND's rule on
its last block for objects. "answers": cosines of what the classifier in its memory answers to every patch, and for
objects the patches whose vector is longer than the image's mean. The heads learn from photos of coco-mini without masks
(291) and pets that are not judged (59); what tower and teachers say of a square of each is computed once. The teachers
and their thresholds were chosen on such photos.

Judged as in segmentation.py, but on every sixth pixel of every sixth row, on masks of coco-mini (200) and pets (90), in
an order of which any beginning is like the whole; a run that was stopped records what it has judged. Rows: MaskCLIP (no
pooling), pooling by the teachers themselves, pooling by the heads. Things against the background are asked three times:
without a background, with words for surroundings, with objectness (the heads'; where there are none, the rule). Figures
are mIoU in percent, mean and spread (largest less smallest) over seeds; intervals are percentiles of the difference to
MaskCLIP at the same question under 1,000 draws of the photos with replacement.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import clipworks
import segmentation as masks
from clipworks.data.item import Item
from clipworks.metrics.segmentation import confusion
from clipworks.segment.affinity import SIDE
from clipworks.segment.background import SURE, found_objects, long_objects
from clipworks.segment.clip_dinoiser import OWN, CLIPDINOiser
from clipworks.segment.common import Dense, Hidden, enter, interpolation, resample
from clipworks.segment.dinoiser_heads import Heads, HeadsRecipe, early, fresh, head_losses, train_heads
from clipworks.segment.maskclip import MaskCLIP
from clipworks.segment.segmenter import SCALE
from common import record

WORK = masks.WORK.parent / "dinoiser"
PETS, BATCH, LR, PART = 59, 8, 1e-3, 5
BASE, STEP = "maskclip", 6
TASKS = masks.TASKS | {f"{place}, {kind}": masks.TASKS[place] for place in ("things and background", "pets")
                       for kind in ("none", "objects")}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Whose map has the affinity (the finest of `view`'s answer), and whose patches are objects."""

    view: Callable[[Hidden], Hidden]
    objects: Callable[[Hidden], torch.Tensor]


def answered(hidden: Hidden) -> Hidden:
    """With the memory's logits for every patch, less their mean, as the one map."""
    logits = hidden.visual.memory.keys(hidden.embedded)
    maps = (logits - logits.mean(-1, keepdim=True)).transpose(1, 2).unflatten(2, hidden.grid)
    return dataclasses.replace(hidden, maps={hidden.images.shape[-1] // hidden.grid[1]: maps})


TEACHERS = {"stem": Teacher(lambda hidden: hidden, found_objects), "answers": Teacher(answered, long_objects)}


class Taught(CLIPDINOiser):
    """Pooling by a teacher itself, and its rule of objects."""

    def __init__(self, teacher: Teacher):
        super().__init__()
        self.teacher = teacher

    def features(self, hidden: Hidden) -> torch.Tensor:
        return super().features(self.teacher.view(hidden))

    def objects(self, hidden: Hidden) -> torch.Tensor:
        return self.teacher.objects(hidden).float()[:, None]


class KeptRecipe(HeadsRecipe):
    """A step on lessons that were kept; an item's key says which."""

    def __init__(self, heads: Heads, lessons: dict[str, torch.Tensor]):
        super().__init__(heads, threshold=OWN)
        self.lessons = lessons

    def batch(self, items: Any, step: int, rng: np.random.Generator) -> dict[str, Any]:
        rows = [int(item.key) for item in items]
        return {name: values[rows].float() for name, values in self.lessons.items()}

    def forward(self, encoder: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return head_losses(self.heads, **batch, threshold=self.threshold)


class Stopped(SystemExit):
    """The minutes are over."""


def in_time(stop: float, what: str) -> None:
    """Raise unless there is time left for a piece."""
    if time.monotonic() > stop:
        raise Stopped(f"stopped before {what}; the same command goes on")


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def unlabelled(data: Path) -> list[Path]:
    """Photos that are not judged: of coco-mini those without a mask, of the pets some of the others, evenly spaced."""
    known = {file.stem for file in (data / "coco-mini" / "semantic_masks").glob("*.png")}
    photos = [file for file in sorted((data / "coco-mini" / "images").glob("*.jpg")) if file.stem not in known]
    pets = sorted((data / "pets-600" / "images").glob("*.jpg"))
    judged = set(masks.spread(pets, 90))
    return shuffled(photos + masks.spread([file for file in pets if file not in judged], PETS))


def shuffled(things: list[Any]) -> list[Any]:
    """In an order of which any beginning is like the whole."""
    return [things[i] for i in np.random.default_rng(0).permutation(len(things))]


def lessons(encoder: Any, photos: list[Path], stop: float) -> dict[str, dict[str, torch.Tensor]]:
    """Teacher -> maps, target and objects of all photos; five at a time, from files where they are known."""
    source = [inspect.getsource(part) for part in (early, HeadsRecipe.batch, HeadsRecipe.lesson, answered)]
    found: dict[str, list[torch.Tensor]] = {}
    for first in range(0, len(photos), PART):
        part = photos[first : first + PART]
        file = WORK / f"lesson-{digest(encoder.fingerprint, source, [p.name for p in part])}.npz"
        if not file.exists():
            in_time(stop, f"photo {first} of {len(photos)} to learn from")
            np.savez(file, **lesson(encoder, part))
        with np.load(file) as kept:
            for name in kept.files:
                found.setdefault(name, []).append(torch.from_numpy(kept[name]))
    every = {name: torch.cat(parts) for name, parts in found.items()}
    return {name: {"maps": every["maps"], **{w: every[f"{name}, {w}"] for w in ("target", "objects")}}
            for name in TEACHERS}  # fmt: skip


@torch.no_grad()
def lesson(encoder: Any, photos: list[Path]) -> dict[str, Any]:
    """What tower and teachers say of a square of every photo, in half precision."""
    views = HeadsRecipe(Heads(1), side=2 * encoder.image_size)
    images = views.batch([Item(p.name, p) for p in photos], 0, np.random.default_rng(0))["images"]
    hidden = views.enter(encoder, images)
    made: dict[str, torch.Tensor] = {}
    for name, teacher in TEACHERS.items():
        said = HeadsRecipe(Heads(1), objects=teacher.objects).lesson(teacher.view(hidden))
        made |= {"maps": said.pop("maps"), **{f"{name}, {what}": values for what, values in said.items()}}
    return {name: values.half().numpy() for name, values in made.items()}


def trained(encoder: Any, own: dict[str, torch.Tensor], name: str, seed: int, steps: int, stop: float) -> Path:
    """File of the heads of one teacher and seed."""
    sums = [float(values.double().sum()) for values in own.values()]
    file = WORK / f"heads-{digest(encoder.fingerprint, sums, name, steps, BATCH, LR)}-{seed}.safetensors"
    if not file.exists():
        in_time(stop, f"the heads of {name!r}, seed {seed}")
        items, began = [Item(str(i), None) for i in range(len(own["maps"]))], time.process_time()
        recipe = KeptRecipe(fresh(encoder, seed), own)
        heads = train_heads(recipe, items, encoder, out=None, steps=steps, batch_size=BATCH, lr=LR, seed=seed,
                            progress=False)  # fmt: skip
        heads.save(file)
        print(f"heads of {name!r}, seed {seed}: {time.process_time() - began:.0f} s of the processor", flush=True)
    return file


def labelled(scores: torch.Tensor, objects: torch.Tensor, question: masks.Question, truth: np.ndarray) -> Iterator[Any]:
    """Task, truth and labels: those of `segmentation.Question`, and things without a background or by objectness."""
    yield from question.labels(scores, truth)
    count = min(masks.THINGS, question.count)
    best, thing = (SCALE * scores[:count]).softmax(0).max(0)
    if question.count > masks.THINGS:
        place, names = "things and background", thing + 1
        truth = np.where(truth == masks.IGNORE, masks.IGNORE, np.where(truth < masks.THINGS, truth + 1, 0))
    else:
        place, names = "pets", torch.ones_like(thing)
    yield f"{place}, none", truth, names.numpy()
    rest = (objects <= 0.5) & (best < SURE)
    yield f"{place}, objects", truth, torch.where(rest, 0, names).numpy()


def judged(encoder: Any, photo: tuple[Path, np.ndarray], question: masks.Question, rows: dict[str, Dense]) -> Any:
    """Right, true and predicted pixels of every name, (3, C), of one photo; by "row: task"."""
    image, kept = masks.prepared(encoder, photo[0])
    hidden = enter(encoder, image[None], blocks=3, sides=(SIDE,))
    truth = photo[1][:: STEP, :: STEP]

    def at_pixels(maps: torch.Tensor) -> torch.Tensor:
        lines = [interpolation(whole, cells, cells * share)[:: STEP]
                 for whole, cells, share in zip(photo[1].shape, maps.shape[1:], kept, strict=True)]  # fmt: skip
        return resample(maps.float(), *lines)

    found = {}
    for name, row in rows.items():
        scores = at_pixels(row.local(hidden, question.words)[0])
        for task, true, labels in labelled(scores, at_pixels(row.objects(hidden)[0])[0], question, truth):
            both = confusion(true, labels, TASKS[task])
            found[f"{name}: {task}"] = np.stack([both.diagonal(), both.sum(1), both.sum(0)])
    return found


@torch.no_grad()
def judge(encoder: Any, sets: dict[str, Any], rows: dict[str, Dense], state: str, stop: float) -> dict[str, Any]:
    """Of every set the counts (photos, 3, C) by "row: task"; five photos of each in turn, as far as the time goes."""
    questions = {place: masks.Question(encoder, names) for place, (_, names) in sets.items()}
    found: dict[str, dict[str, list[np.ndarray]]] = {place: {} for place in sets}
    for first in range(0, max(len(photos) for photos, _ in sets.values()), PART):
        for place, (photos, _) in sets.items():
            part = photos[first : first + PART]
            file = WORK / f"judged-{state}-{place}-{digest([p.name for p, _ in part])}.npz"
            if not part or (not file.exists() and time.monotonic() > stop):
                continue
            if not file.exists():
                every = [judged(encoder, photo, questions[place], rows) for photo in part]
                np.savez_compressed(file, **{name: np.stack([one[name] for one in every]) for name in every[0]})
            with np.load(file) as kept:
                for name in kept.files:
                    found[place].setdefault(name, []).append(kept[name])
    return {place: {name: np.concatenate(parts) for name, parts in counts.items()} for place, counts in found.items()}


def figures(counts: dict[str, np.ndarray], task: str) -> dict[str, dict[str, Any]]:
    """mIoU of every row in percent (of heads: mean and spread over the seeds), and the interval of the gain."""
    seeds: dict[str, list[np.ndarray]] = {}
    for key, values in counts.items():
        row, asked = key.split(": ")
        if asked == task:
            seeds.setdefault(row.split(", seed")[0], []).append(values)
    photos = len(seeds[BASE][0])
    draws = np.random.default_rng(0).multinomial(photos, np.full(photos, 1 / photos), 1000).astype(float)
    often = {row: np.mean([masks.miou(np.einsum("dp,pkc->dkc", draws, one, optimize=True)) for one in every], 0)
             for row, every in seeds.items()}  # fmt: skip
    made: dict[str, dict[str, Any]] = {}
    for row, every in seeds.items():
        values = [float(masks.miou(one.sum(0))) for one in every]
        made[row] = {"miou": round(float(np.mean(values)), 2)}
        if len(values) > 1:
            made[row]["spread"] = round(float(np.ptp(values)), 2)
        if row != BASE:
            made[row]["over maskclip, 95 %"] = np.percentile(often[row] - often[BASE], [2.5, 97.5]).round(2).tolist()
    return made


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=masks.SHARED, help="folder that holds coco-mini and pets-600")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--learn", type=int, default=350, help="photos to learn from")
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--coco", type=int, default=200, help="photos to judge")
    options.add_argument("--pets", type=int, default=90, help="photos to judge")
    options.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so long")
    given = options.parse_args()
    torch.set_num_threads(1)
    stop, encoder = time.monotonic() + 60 * given.minutes, clipworks.load()
    WORK.mkdir(parents=True, exist_ok=True)
    own = lessons(encoder, unlabelled(given.data)[: given.learn], stop)
    files = {f"heads of {name!r}, seed {seed}": trained(encoder, own[name], name, seed, given.steps, stop)
             for seed in range(given.seeds) for name in TEACHERS}  # fmt: skip
    rows: dict[str, Dense] = {BASE: MaskCLIP(), **{f"pooling by {n!r}": Taught(t) for n, t in TEACHERS.items()}}
    rows |= {name: CLIPDINOiser(Heads.load(file)) for name, file in files.items()}
    state = digest(encoder.fingerprint, [file.name for file in files.values()], STEP)
    coco, pets = given.data / "coco-mini", given.data / "pets-600"
    sets = {"coco": (shuffled(masks.coco(coco, given.coco)), list(masks.coco_names(coco).values())),
            "pets": (shuffled(masks.pets(pets, given.pets)), ["cat", "dog"])}  # fmt: skip
    sums = hashlib.sha256(b"".join(p.name.encode() + t.tobytes() for photos, _ in sets.values() for p, t in photos))
    settings = {"learn": given.learn, "steps": given.steps, "batch_size": BATCH, "lr": LR, "seeds": given.seeds}
    results: dict[str, Any] = {"settings": settings, "judged": {}}
    for place, counts in judge(encoder, sets, rows, state, stop).items():
        if counts:
            results["judged"][place] = len(next(iter(counts.values())))
            results |= {task: figures(counts, task) for task in TASKS if f"{BASE}: {task}" in counts}
    for task in (task for task in TASKS if task in results):
        for row, found in results[task].items():
            print(f"{task:32s} {row:28s} {found}")
    if given.seeds > 2 and set(results["judged"]) == set(sets):
        print(record("dinoiser", results, 0, sums.hexdigest()))


if __name__ == "__main__":
    main()
