"""Posed images with features of their pixels: what points they see, how sure they are of them, where to look again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_range
from .common import Dense
from .rays import image_rays, look_at, visible

COARSE = 24  # longer side of the depth maps by which views are chosen
POINTS = 2000  # at most so many points are looked at again
TRIES = 16  # cameras that are tried for each new view
UNSEEN = 1.0  # how unsure features are of a point that no view saw


@dataclass
class Views:
    """Posed images.

    Attributes
    ----------
    images : float32 (M, H, W, 3), in [0, 1]
    features : float32 (M, h, w, dim), NaN where there are none
    intrinsics : float32 (M, 3, 3), in pixels of the images
    poses : float32 (M, 4, 4), camera to world, see `segment.rays`
    real : the first so many are photos, the others were rendered
    """

    images: torch.Tensor
    features: torch.Tensor
    intrinsics: torch.Tensor
    poses: torch.Tensor
    real: int

    @classmethod
    def of(cls, images: Any, features: Any, intrinsics: Any, poses: Any) -> Views:
        """Check what a user gave; see `opennerf`."""
        given = {"images": images, "features": features, "intrinsics": intrinsics, "poses": poses}
        arrays = {name: np.asarray(value) for name, value in given.items()}
        if arrays["images"].dtype == np.uint8:
            arrays["images"] = arrays["images"] / np.float32(255)
        count = len(arrays["images"]) if arrays["images"].ndim == 4 else 0
        if arrays["intrinsics"].shape == (3, 3):
            arrays["intrinsics"] = np.repeat(arrays["intrinsics"][None], count, 0)
        shapes: dict[str, tuple[int | str, ...]] = {
            "images": ("M", "H", "W", 3), "features": (count, "h", "w", "dim"), "intrinsics": (count, 3, 3),
            "poses": (count, 4, 4),
        }  # fmt: skip
        for name, wanted in shapes.items():
            array = arrays[name]
            fits = array.ndim == len(wanted) and 0 not in array.shape
            if not fits or any(isinstance(w, int) and w != n for w, n in zip(wanted, array.shape, strict=True)):
                raise ClipworksError(f"{name} must have the shape {wanted}. Got {array.shape}.")
            if name != "features" and not np.isfinite(array).all():
                raise ClipworksError(f"{name} must be finite. Got NaN or infinity.")
        if not 0 <= arrays["images"].min() <= arrays["images"].max() <= 1:
            raise ClipworksError("images must be uint8, or lie in [0, 1].")
        if (np.abs(np.linalg.det(arrays["intrinsics"].astype(np.float64))) < 1e-9).any():
            raise ClipworksError("intrinsics must be invertible: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]].")
        made = {name: torch.tensor(np.ascontiguousarray(array), dtype=torch.float32) for name, array in arrays.items()}
        return cls(**made, real=count)

    def draw(self, rays: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random pixels: numbers of the images (N,), whole x and y (N, 2)."""
        count, height, width = self.images.shape[:3]
        flat = torch.randint(count * height * width, (rays,), generator=generator)
        image, rest = flat // (height * width), flat % (height * width)
        return image, torch.stack([rest % width, rest // width], dim=-1)

    def at(self, image: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Colours (N, 3) and features (N, dim) of pixels: those of the cell that a pixel's middle is in."""
        height, width = self.images.shape[1:3]
        rows, columns = self.features.shape[1:3]
        x, y = pixels.unbind(-1)
        row, column = (2 * y + 1) * rows // (2 * height), (2 * x + 1) * columns // (2 * width)
        return self.images[image, y, x], self.features[image, row, column]

    def and_rendered(self, image: Any, features: Any, intrinsics: torch.Tensor, pose: torch.Tensor) -> Views:
        """With one rendered view more; its features are brought to the grid of the others."""
        found = torch.as_tensor(features, dtype=torch.float32)
        if found.ndim != 3 or found.shape[2] != self.features.shape[3]:
            raise ClipworksError(f"extractor must give features of shape (h, w, {self.features.shape[3]}). "
                                 f"Got {tuple(found.shape)}.")  # fmt: skip
        found = F.interpolate(found.permute(2, 0, 1)[None], self.features.shape[1:3], mode="nearest-exact")
        return Views(
            torch.cat([self.images, image[None]]), torch.cat([self.features, found.permute(0, 2, 3, 1)]),
            torch.cat([self.intrinsics, intrinsics[None]]), torch.cat([self.poses, pose[None]]), self.real,
        )  # fmt: skip


def lift(
    points: torch.Tensor, views: Views, depths: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the pixels in which points are seen: mean (N, dim), variance (N,), number of views (N,).

    Parameters
    ----------
    points : (N, 3)
    views : posed images
    depths : (M, H, W), distance of what every pixel of them sees
    tolerance : how much farther than that a point may be to be seen

    Returns
    -------
    Means of unit features, sums over channels of their variances (in [0, 1]); 0 where no view has features of a point
    """
    total = torch.zeros(len(points), views.features.shape[-1])
    square, count = torch.zeros(len(points)), torch.zeros(len(points))
    for number, depth in enumerate(depths):
        seen, at = visible(points, views.intrinsics[number], views.poses[number], depth, tolerance)
        _, found = views.at(torch.full((len(points),), number), at)
        seen = seen & found.isfinite().all(-1)
        unit = F.normalize(found[seen], dim=-1)
        total[seen] += unit
        square[seen] += (unit**2).sum(-1)
        count[seen] += 1
    mean = total / count.clamp(min=1)[:, None]
    return mean, (square / count.clamp(min=1) - (mean**2).sum(-1)).clamp(min=0), count


def uncertainty(variance: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """How unsure the features of points are: their variance, drawn towards that of an unseen point as by one view.

    >>> uncertainty(torch.tensor([0.0, 0.0, 0.5]), torch.tensor([0, 3, 1]))
    tensor([1.0000, 0.2500, 0.7500])
    """
    return (variance * count + UNSEEN) / (count + 1)


def select_views(
    views: Views,
    look: Callable[[torch.Tensor, torch.Tensor, int, int], Any],
    count: int,
    *,
    turn: float = 30.0,
    opaque: float = 0.9,
    seed: int = 0,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cameras from which the most unsure points are seen, one after the other.

    Parameters
    ----------
    views : posed images with their features
    look : what a camera (3, 3), (4, 4) sees at a height and width: colour, depth and opacity of every pixel
    count : how many; fewer are found where renders are not opaque enough
    turn : cameras that look at a point are turned around it by up to so many degrees
    opaque : mean opacity that a view must have
    seed : of the points and the turns

    Returns
    -------
    Intrinsics and pose of each
    """
    draw = np.random.default_rng(seed)
    height, width = views.images.shape[1:3]
    shrink = min(1.0, COARSE / max(height, width))
    tall, wide = max(1, round(height * shrink)), max(1, round(width * shrink))
    scale = torch.tensor([[wide / width], [tall / height], [1.0]])
    depths, points = [], []
    for intrinsics, pose in zip(views.intrinsics, views.poses, strict=True):
        seen = look(intrinsics * scale, pose, tall, wide)
        depths.append(F.interpolate(seen.depth[None, None], (height, width), mode="nearest-exact")[0, 0])
        origins, directions = image_rays(intrinsics * scale, pose, tall, wide)
        points.append((origins + seen.depth.reshape(-1, 1) * directions)[seen.opacity.reshape(-1) > 0.5])
    places = torch.cat(points)
    if not len(places):
        return []
    places = places[torch.from_numpy(draw.permutation(len(places))[:POINTS])]
    tolerance = 0.05 * float(torch.stack(depths).median())
    _, variance, seen_by = lift(places, views, torch.stack(depths), tolerance)
    unsure = uncertainty(variance, seen_by)
    chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(count):
        best, found = 0.0, None
        chance = (unsure**2 / (unsure**2).sum()).double().numpy()
        for _ in range(TRIES):
            target = places[int(draw.choice(len(places), p=chance / chance.sum()))]
            number = int(draw.integers(views.real))
            pose, intrinsics = turned(views.poses[number], target, turn, draw), views.intrinsics[number]
            seen = look(intrinsics * scale, pose, tall, wide)
            if float(seen.opacity.mean()) >= opaque:
                inside, _ = visible(places, intrinsics * scale, pose, seen.depth, tolerance)
                gain = float(unsure[inside].sum())
                if gain > best:
                    best, found = gain, (intrinsics, pose, inside)
        if found is not None:
            intrinsics, pose, inside = found
            chosen.append((intrinsics, pose))
            unsure = torch.where(inside, unsure / 2, unsure)  # another view is better spent elsewhere
    return chosen


def turned(pose: torch.Tensor, target: torch.Tensor, degrees: float, draw: np.random.Generator) -> torch.Tensor:
    """A camera at the same distance from a point, turned around it in a random direction, that looks at it."""
    arm = pose[:3, 3] - target
    axis = torch.tensor(draw.normal(size=3), dtype=torch.float32)
    axis = F.normalize(torch.linalg.cross(axis, arm), dim=0)
    angle = float(np.deg2rad(degrees * draw.random()))
    # Rodrigues' formula for an axis that stands square on the arm
    arm = arm * float(np.cos(angle)) + torch.linalg.cross(axis, arm) * float(np.sin(angle))
    return look_at(target + arm, target, (-pose[:3, 1]).tolist())


def dense_features(encoder: Any, method: str | Dense = "sclip", *, side: int | None = None) -> Callable[[Any], Any]:
    """An extractor: from a picture to unit features (h, w, dim) of its patches, by a dense method of `segment`.

    Parameters
    ----------
    encoder : with an image tower
    method : registered dense method, or one with settings of its own
    side : pixels of the shorter side (default: twice the encoder's image size)
    """
    from ..data.decode import decode_pixels
    from ..encoders.preprocess import _resize
    from .common import enter
    from .segmenter import dense_method

    how, patch = dense_method(method), encoder.config.vision.patch_size
    shorter = int(check_range("side", 2 * encoder.image_size if side is None else side, patch))

    def extract(picture: Any) -> np.ndarray:
        pixels = decode_pixels(picture)
        factor = shorter / min(pixels.shape[:2])
        size = [max(patch, round(n * factor / patch) * patch) for n in pixels.shape[:2]]
        image = torch.from_numpy(_resize(pixels, size[0], size[1], "bicubic").copy()).permute(2, 0, 1)[None] / 255
        with encoder._inference():
            maps = how.features(enter(encoder, image, blocks=how.blocks, sides=how.sides))
            return F.normalize(maps[0].float(), dim=-1).cpu().numpy()

    return extract
