"""IP-CLIP on two domains of PACS: what its prompts are worth at home and elsewhere, beside zero-shot CLIP and CoOp.

    python benchmarks/domain_protection.py [--minutes 10]          # goes on where it was stopped

Learned from `--shots` images of every class of the authorised domain and of the other, tested on further images of
both, drawn by seed; the method's defaults, nothing chosen. The claim (Wang et al. 2025): good at home, bad elsewhere.
CoOp learns from the authorised images alone and shows what an unprotected prompt keeps elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import clipworks
from clipworks.data.labelled import LabelledSet, read_labelled
from clipworks.prompts.coop import CoOp
from clipworks.prompts.ip_clip import IPCLIP, protection
from clipworks.zeroshot.classifier import class_vectors
from common import record
from few_shot import SHARED
from kept import WORK, Pieces, gathered

PAIRS = (("photo", "sketch"), ("art_painting", "cartoon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--work", type=Path, default=WORK.with_name("domain_protection"), help="what is done")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--test", type=int, default=15, help="images of every class and domain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing further after so long")
    given = parser.parse_args()
    model, data = clipworks.load(), read_labelled("pacs", given.data / "pacs-128")
    settings = {"shots": given.shots, "test": given.test, "epochs": given.epochs}
    pieces = Pieces(given.work, f"{model.fingerprint} {settings}", given.minutes)
    jobs = {f"{home} against {away} {seed}": partial(run, model, data, home, away, seed, settings)
            for home, away in PAIRS for seed in given.seeds}  # fmt: skip
    done, results = pieces.run(jobs), {}
    for home, away in PAIRS:
        title = f"{home} against {away}"
        if found := [done[f"{title} {seed}"] for seed in given.seeds if f"{title} {seed}" in done]:
            rows = gathered([{k: v for k, v in one.items() if k != "cpu_seconds"} for one in found])
            results[title] = {name: {"mean": round(float(np.mean(v)), 2), "spread": round(float(np.std(v)), 2),
                                     "seeds": v} for name, v in rows.items()}  # fmt: skip
    keys = hashlib.sha256("".join(item.key for item in data.items).encode()).hexdigest()
    print(record("domain_protection", {"settings": settings, "encoder": model.fingerprint[:12], **results},
                 given.seeds[0], keys))  # fmt: skip


def run(model: Any, data: LabelledSet, home: str, away: str, seed: int, settings: dict[str, int]) -> dict[str, float]:
    """Shares right in percent, of one draw."""
    draw, shots = np.random.default_rng(seed), settings["shots"]
    drawn = {}
    for domain in (home, away):
        of = [np.flatnonzero((data.y == c) & (data.domains == domain)) for c in range(len(data.classes))]
        taken = np.stack([draw.permutation(rows)[: shots + settings["test"]] for rows in of])
        drawn[domain] = taken[:, :shots].ravel(), taken[:, shots:].ravel()

    def images(numbers: np.ndarray) -> list:
        return [data.items[i] for i in numbers]

    (own, own_test), (other, other_test) = drawn[home], drawn[away]
    tests = {"home": own_test, "away": other_test}
    words = class_vectors(data.classes, model).numpy()
    before = {place: float(np.mean((model.images(images(test)).numpy() @ words.T).argmax(1) == data.y[test]))
              for place, test in tests.items()}  # fmt: skip
    coop = CoOp(data.classes, encoder=model, epochs=settings["epochs"], seed=seed)
    coop.fit(images(own), data.y[own], progress=False)
    ours = IPCLIP(data.classes, encoder=model, epochs=settings["epochs"], seed=seed)
    ours.fit(images(own), data.y[own], other=images(other), other_y=data.y[other], progress=False)
    plain = {place: coop.score(images(test), data.y[test]) for place, test in tests.items()}
    after = {place: ours.score(images(test), data.y[test]) for place, test in tests.items()}
    found = {f"{way}, {place}": shares[place] for way, shares in
             (("zero-shot", before), ("CoOp", plain), ("IP-CLIP", after)) for place in tests}  # fmt: skip
    found["protection"] = protection(after["home"], before["home"], after["away"], before["away"])
    return {name: round(100 * share, 2) for name, share in found.items()}


if __name__ == "__main__":
    main()
