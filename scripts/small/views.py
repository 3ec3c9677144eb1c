"""Step 3 of `clipworks-small`: views of the images, each taken once through the frozen half of the image tower.

Of every image some views are drawn: a crop, the same at the resolution of a thumbnail, as a drawing of its edges, or in
few colours, so that the tower meets more than sharp photographs. What is kept of a view is the last feature map at a
sixteenth of the image's side, in half precision. What the ImageNet classifier says of the image is kept too, always of
the undisturbed view: the tower learns to say the same of the disturbed ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from clipworks.encoders.efficientnet import EfficientNetLiteStem
from clipworks.progress import Progress

MEAN, STD = 127 / 255, 128 / 255  # with which EfficientNet-Lite was trained


@dataclass
class View:
    """One row of the cache: which image, how it is changed, what is said of it."""

    path: str
    style: str  # key of STYLES
    texts: list[str]  # the name of the class, or what people wrote about it
    named: bool  # whether `texts` is a name
    photo: bool  # whether the ImageNet classifier is asked


def crop(image: Image.Image, size: int, draw: np.random.Generator, least: float) -> Image.Image:
    """A square of `least` to all of the largest square, somewhere, flipped half of the time."""
    side = min(image.size) * np.sqrt(draw.uniform(least, 1.0))
    left, top = (draw.uniform(0, length - side) for length in image.size)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return ImageOps.mirror(image) if draw.random() < 0.5 else image


def plain(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    return image


def thumbnail(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """What is left of an image at 28 to 64 pixels."""
    side = int(draw.integers(28, 65))
    small = image.resize((side, side), Image.Resampling.BICUBIC)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def sketch(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Dark lines on white where the blurred image changes."""
    grey = ImageOps.autocontrast(image.convert("L").filter(ImageFilter.GaussianBlur(draw.uniform(0.8, 2.0))))
    x = np.asarray(grey, np.float32)
    down, right = np.gradient(x)
    strength = np.hypot(down, right)
    strength = strength / (np.quantile(strength, draw.uniform(0.93, 0.985)) + 1e-6)
    lines = 255 * (1 - np.clip(strength, 0, 1) ** draw.uniform(1.0, 2.5))
    return Image.fromarray(lines.astype(np.uint8)).convert("RGB")


def cartoon(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Few flat colours, stronger than they were, sometimes with dark outlines."""
    flat = image.filter(ImageFilter.ModeFilter(int(draw.choice([5, 7, 9]))))
    flat = ImageOps.posterize(flat, int(draw.integers(2, 4)))
    if draw.random() < 0.5:
        lines = np.asarray(sketch(image, draw), np.float32) / 255
        flat = Image.fromarray((np.asarray(flat) * lines).astype(np.uint8))
    return flat


def grey(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    return ImageOps.autocontrast(image.convert("L")).convert("RGB")


STYLES: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "plain": plain, "thumbnail": thumbnail, "sketch": sketch, "cartoon": cartoon, "grey": grey,
}  # fmt: skip


def pixels(view: View, root: Path, number: int, size: int, seed: int) -> np.ndarray:
    """Return the undisturbed and the changed picture of a view, uint8 (2, size, size, 3)."""
    draw = np.random.default_rng([seed, number])
    with Image.open(root / view.path) as opened:
        opened.draft("RGB", (size, size))
        image = opened.convert("RGB")
    clean = crop(image, size, draw, 0.5 if view.photo else 0.7)
    return np.stack([np.asarray(clean), np.asarray(STYLES[view.style](clean, draw))])


@torch.inference_mode()
def build(
    views: Sequence[View], root: Path, stem: EfficientNetLiteStem, classifier: torch.nn.Linear, out: Path,
    size: int = 160, batch_size: int = 64, seed: int = 0, part: slice = slice(None),
) -> None:  # fmt: skip
    """Write `maps.npy` (float16, N x C x h x w), `teacher.npy` (float16, N x 1000; zeros where it was not asked) and
    `views.json`; a run that was stopped goes on behind the last whole thousand."""
    out.mkdir(parents=True, exist_ok=True)
    shapes = {"maps": (len(views), size // 16, size // 16, stem.middle_width), "teacher": (len(views), 1000)}
    files = {}
    for name, shape in shapes.items():
        path = out / f"{name}.npy"
        files[name] = (np.lib.format.open_memmap(path, "r+") if path.exists() else
                       np.lib.format.open_memmap(path, "w+", np.float16, shape))  # fmt: skip
    begin, end, _ = part.indices(len(views))
    done_file = out / f"done-{begin}.txt"
    first = int(done_file.read_text()) if done_file.exists() else begin
    (out / "views.json").write_text(json.dumps([asdict(view) for view in views]), encoding="utf-8")
    stem = stem.eval().to(memory_format=torch.channels_last, dtype=torch.bfloat16)
    starts = range(first, end, batch_size)
    for start, made in Progress(_ahead(views[:end], starts, batch_size, root, size, seed), len(starts), "views"):
        group = views[start : min(start + batch_size, end)]
        asked = torch.tensor([view.photo for view in group])
        again = asked & torch.tensor([view.style != "plain" for view in group])
        maps = stem.front(_floats(made[:, 1]))
        clean = maps.clone()
        clean[again] = _padded(stem.front, _floats(made[again.numpy(), 0]))
        top = stem.head(stem.body[stem.middle :](clean)).float().mean((2, 3))
        stop = start + len(group)
        files["maps"][start:stop] = maps.permute(0, 2, 3, 1).half().numpy()
        files["teacher"][start:stop] = (classifier(top) * asked[:, None]).half().numpy()
        if start // batch_size % 50 == 49:
            for file in files.values():
                file.flush()
            done_file.write_text(str(stop))
    done_file.write_text(str(end))


def _floats(images: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return x.sub_(255 * MEAN).div_(255 * STD).bfloat16()


def _padded(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, multiple: int = 16) -> torch.Tensor:
    """Run on a batch filled up to a multiple: for every new batch size the kernels would be prepared anew."""
    filled = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, -len(x) % multiple))
    return run(filled)[: len(x)] if len(x) else run(torch.zeros(multiple, *x.shape[1:], dtype=x.dtype))[:0]


def _ahead(
    views: Sequence[View], starts: Sequence[int], batch_size: int, root: Path, size: int, seed: int
) -> Iterator[tuple[int, np.ndarray]]:
    with ThreadPoolExecutor(2) as pool, ThreadPoolExecutor(1) as runner:
        def make(start: int) -> np.ndarray:
            group = range(start, min(start + batch_size, len(views)))
            return np.stack(list(pool.map(lambda i: pixels(views[i], root, i, size, seed), group)))

        waiting = [(start, runner.submit(make, start)) for start in starts[:2]]
        for start in starts[2:]:
            yield waiting[0][0], waiting.pop(0)[1].result()
            waiting.append((start, runner.submit(make, start)))
        for start, job in waiting:
            yield start, job.result()
