"""What the benchmarks of tuned towers share: photos as the stem of an image tower gives them, and pieces that are kept.

Two thirds of what `clipworks-small` computes for an image are the convolutions of its stem. A benchmark that compares
ways of training can leave them as they are: `keep` stores their maps, and `without_stem` gives the same encoder for
such maps in the place of pixels. All ways then have a frozen stem and no views, which the benchmark says.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clipworks.encoders.encoder import Encoder
from clipworks.encoders.layers import swap

WORK = Path(tempfile.gettempdir()) / "clipworks-benchmarks" / "kept"


class Pieces:
    """Runs a benchmark piece by piece, one file each, so that the same command goes on where it was stopped.

    Parameters
    ----------
    folder : of the files
    state : what decides a piece beside its name: the encoder and the settings
    minutes : after so long no further piece begins, and the program ends
    """

    def __init__(self, folder: Path, state: str, minutes: float = 1e9):
        self.folder, self.minutes, self.began = folder, minutes, time.monotonic()
        self.state = hashlib.sha256(state.encode()).hexdigest()[:12]

    def done(self, name: str) -> dict[str, Any] | None:
        """What an earlier run gave; None if there was none."""
        path = self._path(name)
        return json.loads(path.read_text()) if path.exists() else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.state}-{name.replace(' ', '_').replace('/', '_')}.json"

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gave, now or in an earlier run, with the seconds of the processor that it took."""
        path = self._path(name)
        if not path.exists():
            if time.monotonic() - self.began > 60 * self.minutes:
                raise SystemExit(f"stopped before {name!r}; the same command goes on")
            began, found = time.process_time(), make()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**found, "cpu_seconds": round(time.process_time() - began, 1)}))
            print(name, found, flush=True)
        return json.loads(path.read_text())

    def run(self, jobs: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        """All pieces that are finished, after as many of the others were made as the minutes allow."""
        for name, make in jobs.items():
            if self.done(name) is None and time.monotonic() - self.began > 60 * self.minutes:
                print(f"stopped before {name!r}; the same command goes on")
                break
            self.once(name, make)
        return {name: found for name in jobs if (found := self.done(name)) is not None}


def gathered(found: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The measures of several seeds, one list each."""
    return {name: [one[name] for one in found] for name in found[0]}


class KeptStem(nn.Module):
    """In the place of a stem: its maps, which come in the form of pixels (B, 3, H, w), as (B, width, h, w)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.reshape(len(maps), self.width, -1, maps.shape[3])


def without_stem(encoder: Encoder) -> Encoder:
    """A copy that takes what `keep` gave; its vectors are the same."""
    made = copy.deepcopy(encoder)
    swap(made, "visual.stem", KeptStem(encoder.config.vision.width))
    return made.eval()


def keep(encoder: Encoder, images: Sequence[Any], key: str, work: Path = WORK) -> torch.Tensor:
    """The stem's maps of images (n, 3, H, w), from a file if there is one.

    Parameters
    ----------
    images : as `Encoder.images` takes them
    key : says which images these are, for the name of the file
    """
    name = hashlib.sha256(f"{encoder.fingerprint} {key} {len(images)}".encode()).hexdigest()[:16]
    path = work / f"{name}.npy"
    if not path.exists():
        parts = []
        with torch.no_grad():
            for start in range(0, len(images), 16):
                pixels = torch.stack([encoder.preprocess(image) for image in images[start : start + 16]])
                maps = encoder.visual.stem(pixels)
                parts.append(maps.reshape(len(maps), 3, -1, maps.shape[3]))
        work.mkdir(parents=True, exist_ok=True)
        np.save(path, torch.cat(parts).numpy())
    return torch.from_numpy(np.load(path))


def coco_captions(folder: Path) -> tuple[list[Path], list[list[str]]]:
    """Photos of coco-mini that have captions, and five of these each, as sentences."""
    entries = [e for e in json.loads((folder / "coco_mini.json").read_text(encoding="utf-8")) if e["captions"]]
    texts = [[f"{' '.join(text.split()).rstrip('. ')}." for text in entry["captions"][:5]] for entry in entries]
    return [folder / entry["file"] for entry in entries], texts


def imagenet_sample(folder: Path) -> tuple[list[Path], list[str], np.ndarray, list[str]]:
    """A photo for each of ImageNet's classes, their distinct names (998), the number of each photo's name in these, and
    the classes' numbers in WordNet."""
    lines = (folder / "labels.csv").read_text(encoding="utf-8").splitlines()[1:]
    numbers, names = zip(*(line.split(",", 1) for line in lines), strict=True)
    distinct = list(dict.fromkeys(names))
    paths = [folder / "images" / f"{number}.jpg" for number in numbers]
    return paths, distinct, np.array([distinct.index(name) for name in names]), list(numbers)
