"""Any method of `prompts/` and `tuning/` on a labelled folder: draw shots, fit, measure what was learned and lost.

Of every class some images are drawn to learn; the others are held out and measured before (zero-shot) and after. A
probe set, on which the model was good before, is measured the same way: its difference is what was forgotten. Of a
method for search (it has `vectors`) the precision of image-to-image search is measured too.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..atomic import write_json
from ..data.item import Item
from ..data.loader import readable
from ..data.shots import draw
from ..encoders.loading import resolve
from ..errors import BadImage, ClipworksError, check_choice, check_range, closest
from ..metrics.retrieval import image_retrieval
from ..registry import MethodInfo, get_method, methods
from ..training.evaluate import Probe, change_rows, recalls, zeroshot
from ..training.feed import open_items
from ..zeroshot.classifier import check_names, class_vectors
from .common import TEMPLATE

AREAS = ("prompts", "tuning")


@dataclass
class TuneReport:
    """What a method learned, and what it forgot.

    Attributes
    ----------
    method, settings : its name, and the settings that it was fitted with
    out : its file
    shots : images of a class that were drawn (None: all); `images`, `held_out` : how many were learned and measured
    task, probe : name of a measure -> (before, after), in percent
    forgotten : name of a measure of the probe -> points lost (negative: gained)
    alpha : share of the change that was kept, where the method has one
    left_out : images that cannot be read, each as {"key": ..., "reason": ...}
    fitted : the fitted method
    """

    method: str
    settings: dict[str, Any]
    out: str
    shots: int | None
    images: int
    held_out: int
    task: dict[str, tuple[float, float]] = field(default_factory=dict)
    probe: dict[str, tuple[float, float]] = field(default_factory=dict)
    forgotten: dict[str, float] = field(default_factory=dict)
    alpha: float | None = None
    left_out: list[dict[str, str]] = field(default_factory=list)
    fitted: Any = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the fitted method, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name != "fitted"}

    def as_rows(self) -> list[dict[str, Any]]:
        """One dictionary per measure: where, what, before, after, change."""
        return change_rows(task=self.task, probe=self.probe)


def tune(
    data: Any,
    method: str,
    *,
    out: str | Path,
    model: str | Any = "clipworks-small",
    names: Sequence[str] | Mapping[str, str] | None = None,
    shots: int | None = 16,
    validation: str | Any = None,
    choose_alpha: bool = False,
    probe: str | Any = None,
    probe_names: Sequence[str] | Mapping[str, str] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **settings: Any,
) -> TuneReport:
    """Fit a method on a labelled set (or on captions) and measure it before and after.

    Parameters
    ----------
    data : images with labels, or with captions for a method on pairs; anything `open_source` takes. A method that
        takes them is given the captions of labelled images too, and the column "domain" of a table
    method : name of a method of `prompts/` or `tuning/`
    out : file for what was learned; the report is written beside it as .json
    model : name, path or encoder
    names : class names, or label -> name (default: the labels)
    shots : images of every class that are drawn to learn; 0 or None: all of them
    validation : set that is measured before and after (default: the images that were not drawn)
    choose_alpha : choose the share of the change that is kept on half of the held-out images, and measure on the rest
    probe : set on which the model should stay good: labels give zero-shot accuracy, captions recall
    probe_names : class names of the probe's labels
    seed : of the draw and of the method
    progress : show a bar (default: on a terminal)
    settings : of the method

    Returns
    -------
    TuneReport

    Raises
    ------
    ClipworksError
        If the method or a setting is unknown, or the data does not suit the method.
    """
    info = find(method)
    method, kind = info.name, get_method(f"{info.area}/{info.name}")
    known = set(inspect.signature(kind).parameters) - {"names", "encoder", "seed"}
    for name in settings:
        if name not in known:
            shown = ", ".join(sorted(known))
            raise ClipworksError(f"{method} has no setting {name!r}. It takes {shown}.{closest(name, known)}")
    if choose_alpha and "alpha" not in known:
        raise ClipworksError(f"choose_alpha needs a method with alpha. {method} has none.")
    if Path(out).is_dir():
        raise ClipworksError(f"out must be a file. {str(out)!r} is a folder.")
    left_out: list[BadImage] = []
    every = open_items(data)
    items = _usable(every, "data", left_out)
    labels = [item.label for item in every]
    encoder = resolve(model, "model")
    if all(labels):
        table = _names([str(label) for label in labels], names)
        learned, rest = _drawn(items, list(table), shots, seed)
        y: list[str] = [table[str(item.label)] for item in learned]
    elif getattr(kind, "pairs", False) and all(item.caption for item in items):
        table, learned, rest = {str(n): str(n) for n in names or ()}, items, []
        y = [str(item.caption) for item in items]
    else:
        pairs = " or every image a caption" if getattr(kind, "pairs", False) else ""
        raise ClipworksError(f"data must give every image a label{pairs}. {sum(not v for v in labels)} have none.")
    rest = rest if validation is None else _usable(open_items(validation, "validation"), "validation", left_out)
    held: dict[str, Any] = {}
    if choose_alpha:
        chosen, rest = rest[::2], rest[1::2]
        if not chosen or not rest:
            raise ClipworksError("choose_alpha needs held-out images: draw fewer shots or give validation.")
        held = {"validation": ([i.source() for i in chosen], [table[str(i.label)] for i in chosen])}
        settings = {**settings, "alpha": None}
    if "captions" in inspect.signature(kind.fit).parameters and all(item.caption for item in learned):
        held["captions"] = [str(item.caption) for item in learned]
    if "domains" in inspect.signature(kind.fit).parameters and all("domain" in item.columns for item in learned):
        held["domains"] = [str(item.columns["domain"]) for item in learned]
        settings = {"domains": sorted({str(item.columns["domain"]) for item in items}), **settings}
    made = kind(names=list(table.values()) or None, encoder=encoder, seed=seed, **settings)
    probes = {
        "task": Probe.open(rest, table or None) if rest else None,
        "probe": None if probe is None else Probe.open(probe, probe_names, argument="probe"),
    }
    if (kept := probes["probe"]) is not None:
        kept.items = _usable(kept.items, "probe", left_out)
    templates = getattr(made, "templates", TEMPLATE)
    before = {name: _zero_shot(encoder, p, templates) for name, p in probes.items() if p is not None}
    if searches := hasattr(made, "vectors"):
        for name, found in before.items():
            found |= _search(encoder.images, probes[name])
    made.fit([item.source() for item in learned], y, progress=progress, **held)
    after = {name: _measured(made, p, templates) for name, p in probes.items() if p is not None}
    if searches:
        for name, found in after.items():
            found |= _search(made.vectors, probes[name])
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    taken = {k: v for k, v in made.get_params(deep=False).items() if k not in ("encoder", "names")}
    report = TuneReport(method, taken, str(path), shots or None, len(learned), len(rest), fitted=made,
                        alpha=getattr(made, "alpha_", None),
                        left_out=[{"key": e.key, "reason": e.reason} for e in left_out])  # fmt: skip
    for name in before:
        setattr(report, name, {k: (v, after[name][k]) for k, v in before[name].items() if k in after[name]})
    report.forgotten = {name: one - two for name, (one, two) in report.probe.items()}
    write_json(path.with_suffix(".json"), report.as_dict())
    return report


def tunable() -> list[MethodInfo]:
    """Return the methods that `tune` knows: the classes of `prompts/` and `tuning/`."""
    return [info for area in AREAS for info in methods(area) if info.object[0].isupper()]


def find(method: str) -> MethodInfo:
    """Return the method of a name such as "lora", "clip-svd" or "prompts/coop"."""
    name = check_choice("method", method.rpartition("/")[2].replace("-", "_"), [info.name for info in tunable()])
    return next(info for info in tunable() if info.name == name)


def _usable(items: list[Item], argument: str, left_out: list[BadImage]) -> list[Item]:
    """Return the images that can be read, and add the others to those left out."""
    found, errors = readable(items)
    if not found:
        raise ClipworksError(f"{argument} must hold images that can be used. Got none: {errors[0]}.")
    left_out += errors
    return found


def _names(labels: Sequence[str], names: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """Return label -> class name for every class."""
    if isinstance(names, Mapping):
        table = {str(label): str(name) for label, name in names.items()}
    else:
        table = {name: name for name in check_names(names or sorted(set(labels)))}
    if unknown := sorted(set(labels) - set(table)):
        raise ClipworksError(
            f"names must hold every label of data. Missing: {unknown[0]!r}.{closest(unknown[0], table)}"
        )
    return table


def _drawn(items: list[Item], labels: list[str], shots: int | None, seed: int) -> tuple[list[Item], list[Item]]:
    """Return the images that are drawn to learn, and the others."""
    if not shots:
        return items, []
    check_range("shots", shots, 1)
    codes = np.array([labels.index(str(item.label)) for item in items])
    rows = draw(codes, np.arange(len(items)), int(shots), random.Random(seed))
    taken = set(rows.tolist())
    return [items[i] for i in rows], [item for i, item in enumerate(items) if i not in taken]


def _zero_shot(encoder: Any, probe: Probe, templates: Any) -> dict[str, float]:
    """Measure an encoder by the words of the classes, or by captions."""
    image = encoder.images([item.source() for item in probe.items])
    if probe.names is None:
        return _recall(encoder, image, probe)
    words = class_vectors(list(probe.names.values()), encoder, templates=templates)
    return zeroshot(image.numpy(), words.numpy(), _targets(probe))


def _measured(fitted: Any, probe: Probe, templates: Any) -> dict[str, float]:
    """Measure a fitted method: on its own classes as it classifies, on other names as it reads them."""
    if probe.names is None:
        encoder = getattr(fitted, "encoder_", None)  # learned inputs change no encoder
        return {} if encoder is None else _zero_shot(encoder, probe, templates)
    names = list(probe.names.values())
    reads = fitted if names == list(fitted.names_ or ()) else fitted.to_new(names)
    logits = reads.logits([item.source() for item in probe.items])
    return zeroshot(logits, np.eye(len(names)), _targets(probe))


def _search(vectors: Any, probe: Probe | None) -> dict[str, float]:
    """Search every image of a labelled probe among the others by the vectors of a method that has its own."""
    labels = [] if probe is None else [str(item.label) for item in probe.items]
    if probe is None or probe.names is None or len(set(labels)) == len(labels):
        return {}
    found = image_retrieval(vectors([item.source() for item in probe.items]), np.array(labels), cutoffs=(1,))
    return {"image_to_image_map": 100 * found.mean_average_precision, "image_to_image_recall@1": 100 * found.recall[1]}


def _targets(probe: Probe) -> np.ndarray:
    place = {label: i for i, label in enumerate(probe.names or ())}
    return np.array([place[str(item.label)] for item in probe.items])


def _recall(encoder: Any, image: torch.Tensor, probe: Probe) -> dict[str, float]:
    captions = list(dict.fromkeys(str(item.caption) for item in probe.items))
    place = {caption: i for i, caption in enumerate(captions)}
    owner = np.array([place[str(item.caption)] for item in probe.items])
    return recalls(image.numpy(), encoder.texts(captions).numpy(), owner)
