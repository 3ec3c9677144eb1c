"""IP-CLIP on two domains of PACS: what its prompts are worth at home and elsewhere, beside zero-shot CLIP and CoOp.

    python benchmarks/domain_protection.py [--shots 8 --seeds 1 2 3]

Learned from so many images of every class of the authorised domain and of the other, tested on further images of both,
drawn by seed; the method's defaults, nothing chosen. The claim (Wang et al. 2025): good at home, bad elsewhere. CoOp
learns from the authorised images alone and shows what an unprotected prompt keeps elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np

import clipworks
from clipworks.data.labelled import read_labelled
from clipworks.prompts.coop import CoOp
from clipworks.prompts.ip_clip import IPCLIP, protection
from clipworks.zeroshot.classifier import class_vectors
from common import record
from few_shot import SHARED

PAIRS = (("photo", "sketch"), ("art_painting", "cartoon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--test", type=int, default=20, help="images of every class and domain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=50)
    given = parser.parse_args()
    model, data = clipworks.load(), read_labelled("pacs", given.data / "pacs-128")
    words = class_vectors(data.classes, model).numpy()
    results, keys = {}, hashlib.sha256()
    for home, away in PAIRS:
        rows: dict[str, list[float]] = {}
        for seed in given.seeds:
            draw = np.random.default_rng(seed)
            drawn = {}
            for domain in (home, away):
                of = [np.flatnonzero((data.y == c) & (data.domains == domain)) for c in range(len(data.classes))]
                taken = np.stack([draw.permutation(r)[: given.shots + given.test] for r in of])
                drawn[domain] = taken[:, : given.shots].ravel(), taken[:, given.shots :].ravel()
                keys.update("".join(data.items[i].key for i in taken.ravel()).encode())

            def images(numbers: np.ndarray) -> list:
                return [data.items[i] for i in numbers]

            (own, own_test), (other, other_test) = drawn[home], drawn[away]
            tests = {"home": own_test, "away": other_test}
            before = {
                place: float(np.mean((model.images(images(test)).numpy() @ words.T).argmax(1) == data.y[test]))
                for place, test in tests.items()
            }
            coop = CoOp(data.classes, encoder=model, epochs=given.epochs, seed=seed)
            coop.fit(images(own), data.y[own], progress=False)
            ours = IPCLIP(data.classes, encoder=model, epochs=given.epochs, seed=seed)
            ours.fit(images(own), data.y[own], other=images(other), other_y=data.y[other], progress=False)
            after = {place: ours.score(images(test), data.y[test]) for place, test in tests.items()}
            found = {f"zero-shot, {place}": share for place, share in before.items()}
            found |= {f"CoOp, {place}": coop.score(images(test), data.y[test]) for place, test in tests.items()}
            found |= {f"IP-CLIP, {place}": share for place, share in after.items()}
            found["protection"] = protection(after["home"], before["home"], after["away"], before["away"])
            print(home, away, seed, {k: round(100 * v, 1) for k, v in found.items()}, flush=True)
            for name, value in found.items():
                rows.setdefault(name, []).append(round(100 * value, 2))
        results[f"{home} against {away}"] = {
            name: {"mean": round(float(np.mean(v)), 2), "spread": round(float(np.std(v)), 2), "seeds": v}
            for name, v in rows.items()
        }
    settings = {"shots": given.shots, "test": given.test, "epochs": given.epochs, "seeds": given.seeds}
    print(record("domain_protection", {"settings": settings, "encoder": model.fingerprint[:12], **results},
                 given.seeds[0], keys.hexdigest()))  # fmt: skip


if __name__ == "__main__":
    main()
