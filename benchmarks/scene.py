"""Names of points in space: a room whose walls are real photos, posed views of it, `clipworks-small`.

    python benchmarks/scene.py                # minutes on one core

Four photos of coco-mini with masks of all their pixels hang on the walls of a room of 3 x 3 x 2; views are traced
exactly, so poses, geometry and the name of every point are known. Asked are the names that cover a twentieth of one of
the photos or more. Ways: the pixel of one view, the mean over all views that see a point, OpenNeRF's field where the
shape of the room is known, and the field where shape and colour are learned from the posed photos alone, from all
views' features, and from half of them without and with rendered views. What was learned of the shape is judged from a
place where no photo was taken: error of the distances, and of the colours in decibels. No setting was chosen here.
Every room is kept in `--work`: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import clipworks
from clipworks.metrics.segmentation import IGNORE, confusion, mean_iou, pixel_accuracy
from clipworks.segment.opennerf import opennerf
from clipworks.segment.rays import Space, image_rays, look_at
from clipworks.segment.views import Views, dense_features, lift
from clipworks.zeroshot.classifier import class_vectors
from common import record
from segmentation import coco, coco_names

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
HALF = np.array([1.5, 1.5, 1.0])  # of the room
SIDE, FOCAL, VIEWS = 224, 194.0, 16
CAMERA = np.array([[FOCAL, 0, SIDE / 2], [0, FOCAL, SIDE / 2], [0, 0, 1]], np.float32)
SPACE = Space(near=0.2, far=3.2, samples=96, heaviest=8, radius=1.5)
LEARNING: dict[str, Any] = {"space": SPACE, "grids": [(6, 8, 64)], "rays": 256, "steps": 300}
WORK = Path(tempfile.gettempdir()) / "clipworks-benchmarks" / "scene"
COMMON = 0.05  # share of a photo
POINTS = 6000
SEED = 0


class Room:
    """Photos (rows, columns, 3) and labels on the walls at +x, +y, -x, -y."""

    def __init__(self, photos: list[np.ndarray], labels: list[np.ndarray]):
        self.photos, self.labels = photos, labels

    def place(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Wall of points (N, 3), 4 for floor and ceiling, and where on its photo, from the left and from above."""
        across = points / HALF
        axis = np.abs(across).argmax(1)
        front = np.take_along_axis(across, axis[:, None], 1)[:, 0] > 0
        wall = np.where(axis == 2, 4, axis + 2 * ~front)
        left = np.select([wall == 0, wall == 1, wall == 2], [-across[:, 1], across[:, 0], across[:, 1]], -across[:, 0])
        return wall, (left + 1) / 2, (1 - across[:, 2]) / 2

    def read(self, pages: list[np.ndarray], points: np.ndarray, other: Any) -> np.ndarray:
        """What pages say at points."""
        wall, left, top = self.place(points)
        found = np.empty((len(points), *pages[0].shape[2:]), pages[0].dtype)
        found[:] = other
        for number, page in enumerate(pages):
            here = wall == number
            row = (top[here] * page.shape[0]).astype(int).clip(0, page.shape[0] - 1)
            column = (left[here] * page.shape[1]).astype(int).clip(0, page.shape[1] - 1)
            found[here] = page[row, column]
        return found

    def geometry(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Thick walls around nothing."""
        where = points.numpy()
        density, colour = 60.0 * (np.abs(where / HALF) >= 1).any(1), self.read(self.photos, where, 128) / 255
        return torch.from_numpy(density).float(), torch.from_numpy(colour).float()

    def view(self, pose: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """A picture of the room, and the distance of what each pixel shows."""
        origins, ways = (r.numpy() for r in image_rays(torch.from_numpy(CAMERA), pose, SIDE, SIDE))
        with np.errstate(divide="ignore"):
            distance = ((np.sign(ways) * HALF - origins) / ways).min(1)
        picture = self.read(self.photos, origins + distance[:, None] * ways, 128)
        return picture.reshape(SIDE, SIDE, 3), torch.from_numpy(distance).float().reshape(SIDE, SIDE)


def poses() -> torch.Tensor:
    """Cameras all around that stand a little back from the middle."""
    turns = np.arange(VIEWS) * 2 * np.pi / VIEWS + 0.1
    ahead = np.stack([np.cos(turns), np.sin(turns), 0.05 * (-1.0) ** np.arange(VIEWS)], 1)
    return torch.stack([look_at(*(torch.from_numpy(f * a).float() for f in (-0.6, 1.0))) for a in ahead])


def measured(room: Room, encoder: Any, names: list[str]) -> dict[str, dict[str, float]]:
    """mIoU and accuracy over points of the walls, for each way."""
    draw = np.random.default_rng(SEED)
    counts = np.stack([np.bincount(m[m != IGNORE], minlength=len(names)) / m.size for m in room.labels])
    asked = np.flatnonzero((counts >= COMMON).any(0))
    text = class_vectors([names[n] for n in asked], encoder).numpy()
    wall = draw.integers(4, size=POINTS)
    points = draw.uniform(-1, 1, (POINTS, 3)) * HALF
    points[np.arange(POINTS), wall % 2] = np.where(wall < 2, 1.5, -1.5)
    table = np.full(256, IGNORE)
    table[asked] = np.arange(len(asked))
    truth = table[room.read(room.labels, points, IGNORE)]
    extract, places = dense_features(encoder), poses()
    pictures, depths = zip(*(room.view(pose) for pose in places), strict=True)
    features = np.stack([extract(picture) for picture in pictures])
    views = Views.of(np.stack(pictures), features, CAMERA, places.numpy())
    found: dict[str, dict[str, float]] = {}

    def score(way: str, vectors: np.ndarray) -> None:
        labels = (vectors @ text.T).argmax(1)
        table = confusion(truth, labels, len(asked))
        found[way] = {"miou": round(100 * mean_iou(table), 2), "accuracy": round(100 * pixel_accuracy(table), 2)}
        print(f"{way:42}", found[way], flush=True)

    x = torch.from_numpy(points).float()
    one = torch.zeros(POINTS, features.shape[-1])
    for number in draw.permutation(VIEWS):
        alone = Views.of(np.stack(pictures)[[number]], features[[number]], CAMERA, places.numpy()[[number]])
        mean, _, count = lift(x, alone, depths[number][None], 0.05)
        new = (count > 0) & ~one.any(1)
        one[new] = mean[new]
    score("one view", one.numpy())
    score("mean of the views", lift(x, views, torch.stack(depths), 0.05)[0].numpy())
    learn = (np.stack(pictures), features, CAMERA, places.numpy())
    half = features.copy()
    half[::2] = np.nan
    half[1:5:2] = np.nan  # one side of the room is seen by few
    halved = (learn[0], half, *learn[2:])
    score("field, known shape", opennerf(*learn, geometry=room.geometry, seed=SEED, **LEARNING).features(x).numpy())
    scene = opennerf(*learn, seed=SEED, **LEARNING)
    score("field, photos alone", scene.features(x).numpy())
    found["shape"] = shape(room, scene)
    print(found["shape"])
    score("field, photos alone, half of the views", opennerf(*halved, seed=SEED, **LEARNING).features(x).numpy())
    more = opennerf(*halved, seed=SEED, **LEARNING, extractor=extract, novel=6)
    score("field, photos alone, half, six rendered", more.features(x).numpy())
    return found | {"names": {"count": len(asked), "rendered": len(more.views.images) - VIEWS}}


def shape(room: Room, scene: Any) -> dict[str, float]:
    """Median share by which distances are wrong, and colours in decibels, seen from where no photo was taken."""
    pose = look_at(torch.tensor([0.3, 0.1, 0.1]), torch.tensor([-1.5, 0.7, -0.2]))
    picture, depth = room.view(pose)
    small = CAMERA / np.array([[4], [4], [1]], np.float32)
    seen = scene.render(small, pose, SIDE // 4, SIDE // 4, features=False)
    true = depth[2::4, 2::4]
    colour = torch.from_numpy(picture[2::4, 2::4] / np.float32(255))
    error = ((seen.colour - colour) ** 2).mean()
    return {"distance": round(float(((seen.depth - true).abs() / true).median()), 4),
            "decibels": round(float(-10 * error.log10()), 2)}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=SHARED, help="folder that holds coco-mini")
    options.add_argument("--rooms", type=int, default=2, help="of four photos each")
    options.add_argument("--work", type=Path, default=WORK)
    given = options.parse_args()
    folder = given.data / "coco-mini"
    encoder, names = clipworks.load(), list(coco_names(folder).values())
    found, began = {}, time.perf_counter()
    shown = list(coco(folder, 4 * given.rooms))
    given.work.mkdir(parents=True, exist_ok=True)
    for number in range(given.rooms):
        kept = given.work / f"{encoder.fingerprint[:16]}-{given.rooms}-{number}.json"
        if not kept.exists():
            part = shown[number :: given.rooms]
            labels = [truth.astype(np.uint8) for _, truth in part]
            photos = [np.array(Image.open(path).convert("RGB").resize(truth.shape[::-1])) for path, truth in part]
            kept.write_text(json.dumps(measured(Room(photos, labels), encoder, names)))
        found[f"room {number}"] = json.loads(kept.read_text())
    ways = [way for way in found["room 0"] if way not in ("names", "shape")]
    mean = {way: {k: round(float(np.mean([room[way][k] for room in found.values()])), 2)
                  for k in ("miou", "accuracy")} for way in ways}  # fmt: skip
    print("mean", mean, f"{time.perf_counter() - began:.0f} s")
    print(record("scene", {"encoder": encoder.fingerprint, "views": VIEWS, "points": POINTS, "mean": mean,
                           "rooms": found}, SEED))  # fmt: skip


if __name__ == "__main__":
    main()
