"""Step 2 of `clipworks-small`: which images it learns from, how often and in which styles.

A set is a folder with `pairs.tsv` (path of an image, tab, a caption or the name of its class; several lines per image
are several captions). Sets that are missing are left out with a word, so the recipe runs on what is there; your own
pairs in a folder `own` are added to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from views import View


@dataclass(frozen=True)
class Plan:
    """How a set is used.

    Parameters
    ----------
    named : whether texts are names of classes
    photo : whether these are photographs, of which the ImageNet classifier knows something
    most : images taken of each class (named) or of all
    plain : undisturbed views per image
    styles : further views by style, as a share of the images
    """

    named: bool
    photo: bool
    most: int = 1_000_000
    plain: int = 1
    styles: dict[str, float] = field(default_factory=dict)


PLANS = {
    "own": Plan(named=False, photo=True, plain=2, styles={"thumbnail": 0.2, "sketch": 0.2, "cartoon": 0.2}),
    "flickr8k": Plan(False, True, plain=2, styles={"sketch": 0.2, "cartoon": 0.15, "grey": 0.1, "thumbnail": 0.1}),
    "mini-imagenet": Plan(True, True, most=180, styles={"thumbnail": 0.2, "sketch": 0.2, "cartoon": 0.15}),
    "tiny-imagenet": Plan(True, True, most=100, styles={"sketch": 0.1, "cartoon": 0.07}),
    "imagenette": Plan(True, True, most=300, styles={"thumbnail": 0.3, "sketch": 0.4, "cartoon": 0.3, "grey": 0.1}),
    "imagewoof": Plan(True, True, most=300, styles={"thumbnail": 0.3, "sketch": 0.4, "cartoon": 0.3, "grey": 0.1}),
    "quickdraw": Plan(True, False),
    "openclipart": Plan(False, False, styles={"sketch": 0.25}),
    "emoji": Plan(False, False, styles={"sketch": 0.3}),
    "museum": Plan(False, False, plain=4),
    "tf-flowers": Plan(True, True, most=300),
    "grocery": Plan(True, True, most=40),
    "fruits-360": Plan(True, True, most=30),
    "trashnet": Plan(True, True, most=150),
    "textures-dtd": Plan(True, True, most=120),
}


def read_pairs(folder: Path) -> dict[str, list[str]]:
    """Return the texts of every image of `pairs.tsv`."""
    found: dict[str, list[str]] = {}
    for line in (folder / "pairs.tsv").read_text(encoding="utf-8").splitlines():
        path, _, text = line.partition("\t")
        if text.strip():
            found.setdefault(path, []).append(text.strip()[:160])
    return found


def plan_views(root: Path, seed: int = 0) -> list[View]:
    """Return the views of all sets under `root`, shuffled."""
    draw = np.random.default_rng(seed)
    views: list[View] = []
    for name, plan in PLANS.items():
        if not (root / name / "pairs.tsv").exists():
            print(f"{name}: not there, left out")
            continue
        images = list(_chosen(read_pairs(root / name), plan, draw))
        before = len(views)
        for path, texts in images:
            styles = ["plain"] * plan.plain + [s for s, share in plan.styles.items() if draw.random() < share]
            views += [View(f"{name}/{path}", style, texts, plan.named, plan.photo) for style in styles]
        print(f"{name}: {len(images)} images, {len(views) - before} views")
    draw.shuffle(views)  # type: ignore[arg-type]
    return views


def _chosen(pairs: dict[str, list[str]], plan: Plan, draw: np.random.Generator) -> Iterable[tuple[str, list[str]]]:
    """Yield at most `plan.most` images per class, or in all."""
    groups: dict[str, list[str]] = {}
    for path, texts in pairs.items():
        groups.setdefault(texts[0] if plan.named else "", []).append(path)
    for group in groups.values():
        for i in draw.permutation(len(group))[: plan.most]:
            yield group[i], pairs[group[i]]
