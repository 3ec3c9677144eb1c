"""What a teacher says about a data set, computed once and kept on disk.

The key of the cache is the teacher's fingerprint with everything that decides its input: keys, captions, times of
change, the views. It is written in shards of whole samples, so an interrupted pass goes on where it stopped, and
several processes share the work.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from ..atomic import write_atomically
from ..data.item import Item
from ..encoders.preprocess import Preprocess
from ..errors import BadImage, ClipworksError
from ..progress import Progress
from .augment import Augment, open_image
from .gather import processes, rank

SHARD = 512  # samples


@dataclass(frozen=True)
class Views:
    """K stored views of every sample, each given by a seed alone (dataset reinforcement).

    Parameters
    ----------
    count : views per sample
    augment : how they are drawn; None is the one plain view
    seed : of all views
    """

    count: int
    augment: Augment | None
    seed: int

    def draw(self, key: str, number: int) -> np.random.Generator:
        """Return the generator of one view of one sample; the same one every time."""
        digest = hashlib.sha256(key.encode()).digest()
        return np.random.default_rng([self.seed, number, *np.frombuffer(digest[:16], np.uint32).tolist()])


@dataclass
class TeacherRows:
    """A teacher's vectors.

    Attributes
    ----------
    image : float32 (n, views, dim) or None
    text : float32 (n, dim) or None
    good : bool (n,); False where the image could not be used (its rows are zero)
    """

    image: torch.Tensor | None
    text: torch.Tensor | None
    good: torch.Tensor


def teacher_rows(
    teacher: Any,
    items: Sequence[Item],
    views: Views,
    preprocess: Preprocess,
    folder: Path,
    *,
    batch_size: int = 32,
    on_error: str = "raise",
    progress: bool | None = None,
) -> TeacherRows:
    """Return the teacher's vectors for all samples, from disk where they are there.

    Parameters
    ----------
    teacher : object with `images(list of PIL images) -> (n, dim)`, `texts(list of str) -> (n, dim)`, or one of them
    items : the samples
    views : which views the teacher sees
    preprocess : the student's, which names size and limits of the views
    folder : where caches live
    batch_size : views per call of the teacher
    on_error : "raise", or "skip" to mark samples whose image cannot be used
    progress : show a bar

    Raises
    ------
    ClipworksError
        If the teacher has neither side, or its vectors are not one finite row per input.
    """
    sides = [side for side in ("images", "texts") if hasattr(teacher, side)]
    if not sides:
        raise ClipworksError(f"teacher must have images(), texts() or both. {type(teacher).__name__} has neither.")
    folder = folder / _cache_key(teacher, items, views, preprocess)
    starts = range(0, len(items), SHARD)
    missing = [s for s in starts if not _shard(folder, s).exists()]
    bar = Progress(missing[rank() :: processes()], None, "asking the teacher", enabled=False if rank() else progress)
    for start in bar:
        tensors = _ask(teacher, items[start : start + SHARD], views, preprocess, batch_size, on_error)
        write_atomically(_shard(folder, start), lambda path, t=tensors: save_file(t, path))  # type: ignore[misc]
    if processes() > 1:
        dist.barrier()
    shards = [load_file(_shard(folder, start)) for start in starts]
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    return TeacherRows(whole.get("image"), whole.get("text"), whole["good"])


def teacher_fingerprint(teacher: Any) -> str:
    """Return the teacher's own fingerprint, or the hash of its answers to a fixed picture and sentence."""
    own = getattr(teacher, "fingerprint", None)
    if own:
        return str(own)
    state = hashlib.sha256(type(teacher).__name__.encode())
    if hasattr(teacher, "images"):
        from PIL import Image

        ramp = np.linspace(0, 255, 64 * 64 * 3).astype(np.uint8).reshape(64, 64, 3)
        state.update(_rows(teacher.images([Image.fromarray(ramp)]), 1, "images").numpy().tobytes())
    if hasattr(teacher, "texts"):
        state.update(_rows(teacher.texts(["a photo of a cat beside a red chair"]), 1, "texts").numpy().tobytes())
    return state.hexdigest()


def _cache_key(teacher: Any, items: Sequence[Item], views: Views, preprocess: Preprocess) -> str:
    state = hashlib.sha256(f"{teacher_fingerprint(teacher)} {views!r} {preprocess.fingerprint}".encode())
    for item in items:
        state.update(repr((item.key, item.caption, item.mtime)).encode())
    return state.hexdigest()[:24]


def _shard(folder: Path, start: int) -> Path:
    return folder / f"rows-{start:09d}.safetensors"


def _ask(
    teacher: Any, items: Sequence[Item], views: Views, preprocess: Preprocess, batch_size: int, on_error: str
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {"good": torch.ones(len(items), dtype=torch.bool)}
    if hasattr(teacher, "images"):
        pictures = []
        for number, item in enumerate(items):
            try:
                image = open_image(item, preprocess)
            except BadImage as error:
                if on_error == "raise":
                    raise
                warnings.warn(f"{error}; left out", stacklevel=3)
                found["good"][number] = False
                continue
            pictures += [_view(image, item, views, k, teacher, preprocess) for k in range(views.count)]
        if not pictures:
            raise ClipworksError(f"none of {len(items)} images in a row can be used, from {items[0].key!r} on.")
        parts = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
        rows = torch.cat([_rows(teacher.images(part), len(part), "images") for part in parts])
        found["image"] = _spread(rows.unflatten(0, (-1, views.count)), found["good"])
    if hasattr(teacher, "texts"):
        words = [item.caption or "" for item in items]
        found["text"] = _rows(teacher.texts(words), len(words), "texts")
    return found


def _view(image: Any, item: Item, views: Views, number: int, teacher: Any, preprocess: Preprocess) -> Any:
    """Return the picture that the teacher sees: the student's view, at the teacher's own resolution."""
    if views.augment is None:
        return image
    size = int(getattr(teacher, "image_size", preprocess.config.size))
    return views.augment(image, size, views.draw(item.key, number), preprocess.config.interpolation)


def _rows(values: Any, count: int, side: str) -> torch.Tensor:
    rows = torch.as_tensor(values).detach().float().cpu().contiguous()
    if rows.ndim != 2 or len(rows) != count:
        shape = tuple(rows.shape)
        raise ClipworksError(f"teacher.{side}() must return one row per input ({count}). Got shape {shape}.")
    if not torch.isfinite(rows).all():
        raise ClipworksError(f"teacher.{side}() returned values that are not finite.")
    return rows


def _spread(rows: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    whole = rows.new_zeros(len(good), *rows.shape[1:])
    whole[good] = rows
    return whole
