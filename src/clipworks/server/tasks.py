"""Classes, masks, defects and differences for the routes: what the library's own functions say, shaped for JSON."""

from __future__ import annotations

import base64
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ClipworksError
from . import schemas as s
from .engine import Ask
from .pictures import encoded
from .service import SIDE, Service
from .shelf import View

NONE = "none of these"
REFERENCE = 2000  # images of the collection that set the threshold of "none of these"
FEWEST = 20  # with fewer there is no threshold
COUNTED = 2000  # images of a selection that words are tried on
SHOWN = 15  # words of each side
TOLD = 60  # words with the largest difference that are tried on single images


async def classified(service: Service, request: s.Classify) -> s.Answers:
    """Zero-shot classes of images, with a threshold from the collection below which it is none of them."""
    from ..zeroshot.classifier import check_names

    if not request.images and not request.ids:
        raise ClipworksError("give images or ids, at least one.")
    names = check_names(request.names)
    if NONE in names and request.none:
        raise ClipworksError(f"names must not hold {NONE!r}; leave it out, or set none to false.")
    if len(names) * len(request.templates or [""]) > s.NAMES:
        raise ClipworksError(f"names times templates must be at most {s.NAMES}.")
    view = service.shelf.view()
    rows = [service.row(view, item) for item in request.ids]
    pixels = await service.pixels(request.images)
    seen = (await service.ask(Ask((), pixels))).vectors if pixels else np.empty((0, view.collection.dim), np.float32)
    kept = np.asarray(view.collection.vectors[rows], np.float32)
    x = np.concatenate([seen, kept])
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    words, scale = await service.call(lambda encoder: _words(service, encoder, names, request.templates))
    cosines = x @ words.T
    logits = scale * cosines
    odds = np.exp(logits - logits.max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    threshold = await service.read(lambda: _threshold(view, words)) if request.none else None
    fit = cosines.max(1)
    answers = []
    for i, item in enumerate([None] * len(seen) + list(request.ids)):
        label = names[int(odds[i].argmax())]
        if threshold is not None and fit[i] <= threshold:
            label = NONE
        answers.append(s.Classified(
            id=item, label=label, scores={n: round(float(p), 6) for n, p in zip(names, odds[i], strict=True)},
            cosines={n: round(float(c), 6) for n, c in zip(names, cosines[i], strict=True)},
            fit=round(float(fit[i]), 6)))  # fmt: skip
    return s.Answers(answers=answers, threshold=None if threshold is None else round(threshold, 6))


def _words(service: Service, encoder: Any, names: list[str], templates: list[str] | None) -> tuple[np.ndarray, float]:
    from ..zeroshot.classifier import class_vectors

    key = ("words", tuple(names), tuple(templates or ()))
    made = service.engine.remember(key, lambda: class_vectors(names, encoder, templates=templates or "default").numpy())
    return made, float(encoder.logit_scale)


def _threshold(view: View, words: np.ndarray) -> float | None:
    """The cosine with the best name that parts the collection's images into those that fit and others; None for few.

    The collection is a mixed lot, so it is the point between two normal curves fitted to its scores.
    """
    from ..zeroshot.open_set import OpenSet

    if len(view) < FEWEST:
        return None
    rows = np.unique(np.linspace(0, len(view) - 1, min(len(view), REFERENCE)).astype(int))
    known = np.asarray(view.collection.vectors[rows], np.float32)
    known /= np.maximum(np.linalg.norm(known, axis=1, keepdims=True), 1e-12)
    try:
        return float(OpenSet(words, score="max_logit", scale=1.0, rate=None).fit(known).threshold_)
    except ClipworksError:  # all images are the same to these names
        return None


async def segmented(service: Service, request: s.Segment) -> s.Segmented:
    """Masks of names in one image."""
    from ..zeroshot.classifier import check_names

    names = check_names(request.names)
    pixels = await service.picture(service.shelf.view(), request.image, request.id)

    def work(encoder: Any) -> Any:
        from ..segment.segmenter import Segmenter

        made = service.engine.remember(
            ("segment", tuple(names), request.background),
            lambda: Segmenter(names, encoder=encoder, background=request.background),
        )
        return made(pixels)

    mask = await service.call(work)
    codes = {c["name"]: c["segmentation"] for c in mask.as_coco()} if request.masks else {}
    found = [s.Region(name=r["name"], share=r["share"], mean=r["mean"], largest=r["largest"], mask=codes.get(r["name"]))
             for r in mask.as_rows()]  # fmt: skip
    overlay = await service.read(lambda: _address(mask.overlay(pixels)), service.decoders)
    return s.Segmented(width=pixels.shape[1], height=pixels.shape[0], names=found, overlay=overlay)


async def inspected(service: Service, request: s.Inspect) -> s.Inspected:
    """Defects of one image."""
    view = service.shelf.view()
    pixels = await service.picture(view, request.image, request.id)
    good = [await service.picture(view, None, item) for item in request.normal]
    good += [await service.picture(view, image, None) for image in request.normal_images]
    method = "patch_memory" if good else "winclip"
    key = ("inspect", method, request.name, view.collection.version, tuple(request.normal),
           tuple(hash(i) for i in request.normal_images))  # fmt: skip

    def work(encoder: Any) -> Any:
        from ..registry import get_method

        def fitted() -> Any:
            options = {} if good else {"name": request.name}
            return get_method(f"anomaly/{method}")(encoder, **options).fit(good or None)

        return service.engine.remember(key, fitted, most=8).score_map(pixels, "image")

    found = await service.call(work)
    row = found.as_row()
    regions = [{k: float(v) for k, v in region.items()} for region in row["regions"][:50]]
    overlay = await service.read(lambda: _address(found.draw()), service.decoders)
    return s.Inspected(method=method, defective=row["defective"], score=row["score"], threshold=row["threshold"],
                       regions=regions, overlay=overlay)  # fmt: skip


def _address(image: Any) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(encoded(image, 2 * SIDE, 88)).decode()


async def compared(service: Service, request: s.Compare) -> s.Differences:
    """Words that fit one selection better than the other."""
    view = service.shelf.view()
    a = sorted({service.row(view, item) for item in request.a})
    chosen = set(a)
    b = sorted({service.row(view, item) for item in request.b} - chosen if request.b is not None
               else set(range(len(view))) - chosen)  # fmt: skip
    if not b:
        raise ClipworksError("the second selection must hold an image that the first has not.")
    words = vocabulary()
    vectors = await service.call(lambda encoder: _words(service, encoder, list(words), ["a photo of {}"])[0])
    sides = await service.read(lambda: _differences(view, a, b, vectors))
    shown = [
        [s.Telling(word=words[i], difference=round(d, 5), auroc=round(u, 4)) for i, d, u in side] for side in sides
    ]
    return s.Differences(a=shown[0], b=shown[1], counts=[len(a), len(b)])


def _differences(view: View, a: list[int], b: list[int], words: np.ndarray) -> list[list[tuple[int, float, float]]]:
    """For either side words (number, difference of the mean cosines, AUROC), the most telling first."""
    one, two = (_sample(view, rows) @ words.T for rows in (a, b))
    gap = one.mean(0) - two.mean(0)
    sides = []
    for sign, left, right in ((1, one, two), (-1, two, one)):
        best = np.argsort(-sign * gap, kind="stable")[:TOLD]
        told = [(int(i), float(sign * gap[i]), auroc(left[:, i], right[:, i])) for i in best if sign * gap[i] > 0]
        sides.append(sorted(told, key=lambda t: -t[2])[:SHOWN])
    return sides


def _sample(view: View, rows: list[int]) -> np.ndarray:
    some = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), COUNTED)).astype(int))]
    x = np.asarray(view.collection.vectors[some], np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def auroc(above: np.ndarray, below: np.ndarray) -> float:
    """How often a value of the first is above one of the second, ties counted half."""
    ordered = np.sort(below)
    lower, upper = np.searchsorted(ordered, above, "left"), np.searchsorted(ordered, above, "right")
    return float((lower + upper).mean() / 2 / len(below))


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """The words of `words.txt`, in its order."""
    text = Path(__file__).with_name("words.txt").read_text(encoding="utf-8")
    lines = (line.split("#")[0] for line in text.splitlines())
    return tuple(dict.fromkeys(word.strip() for line in lines for word in line.split(",") if word.strip()))
