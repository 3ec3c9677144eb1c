"""Few-shot inspection on the data of its paper: textiles, 10 to 350 images of each class, with two encoders.

    python benchmarks/inspection_curve.py --packages PACKAGES [--second second.safetensors]

PACKAGES holds textiles/, the unpacked wheel of `conformal-clip-data` 0.1.4 (see few_shot.py). Good textiles
against defective ones (local and global defects, half of each), images drawn by seed, 100 of both classes tested, none
of them ever learned. Beside the paper's nearest image a linear probe on the same images, which chooses its penalty
among them. The paper (ViT-L/14): accuracy 0.90 and AUC 0.983
at 10 images, 0.975 and 0.996 at 50, 0.97 and 0.994 at 350; ViT-B/32 0.72 and 0.754 at 10, 0.735 and 0.694 at 350.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

import clipworks
from clipworks.heads.few_shot_inspection import FewShotInspection
from clipworks.heads.linear_probe import LinearProbe
from clipworks.metrics.inspection import inspection_report
from common import record
from few_shot import SHARED, sets
from kept import WORK

SIZES, TEST, LOCAL_AND_GLOBAL = (10, 20, 50, 100, 200, 350), 100, 2
WAYS = {"nearest image": FewShotInspection, "linear probe": LinearProbe}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--second", type=Path, help="the second encoder, made by second_encoder.py")
    parser.add_argument("--work", type=Path, default=WORK.with_name("inspection"), help="vectors are kept here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    textiles = sets(SHARED, given.packages, ["textiles"])["textiles"]
    files = [str(item.image) for item in textiles.items]
    found = {}
    for name in ["clipworks-small", *([str(given.second)] if given.second else [])]:
        encoder = clipworks.load(name)
        vectors = encoded(encoder, files, given.work)
        title = "clipworks-small" if name == "clipworks-small" else "second encoder"
        found[title] = means([curve(vectors, textiles.y, seed) for seed in given.seeds])
        for way, rows in found[title].items():
            print(title, way, *(f"{size}: {row['accuracy'][0]:.3f} {row['auc'][0]:.3f}" for size, row in rows.items()))
    digest = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
    settings = {"seeds": given.seeds, "tested of each class": TEST}
    print(record("inspection_curve", {"settings": settings, **found}, given.seeds[0], digest))


def encoded(encoder: Any, files: list[str], folder: Path) -> np.ndarray:
    """Vectors of the images, kept in the folder."""
    kept = folder / f"{encoder.fingerprint[:16]}.npy"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(kept, encoder.images(files).numpy())
    return np.load(kept)


def curve(x: np.ndarray, kind: np.ndarray, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Way -> images per class -> figures, of one draw. Kinds: 0 good, 1 local, 2 global defects."""
    draw = np.random.default_rng(seed)
    good, *bad = (draw.permutation(np.flatnonzero(kind == k)) for k in range(1 + LOCAL_AND_GLOBAL))
    mixed = np.stack([part[: (TEST + max(SIZES)) // 2] for part in bad], axis=1).reshape(-1)  # local, global, local ...
    test = np.concatenate([good[:TEST], mixed[:TEST]])
    truth = kind[test] > 0
    rows: dict[str, dict[str, dict[str, float]]] = {way: {} for way in WAYS}
    for size in SIZES:
        taken = np.concatenate([good[TEST : TEST + size], mixed[TEST : TEST + size]])
        for way, head in WAYS.items():
            p = head().fit(x[taken], (kind[taken] > 0).astype(int)).predict_proba(x[test])
            rows[way][str(size)] = inspection_report(truth, p[:, 1])
    return rows


def means(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the draws of every figure."""
    return {way: {size: {figure: [round(float(f([d[way][size][figure] for d in draws])), 4) for f in (np.mean, np.std)]
                         for figure in row} for size, row in draws[0][way].items()} for way in WAYS}  # fmt: skip


if __name__ == "__main__":
    main()
