"""OpenNeRF: names for the points of a scene, from posed photos, pixel features in CLIP's space, and rendered new views.

Claim: a field of features, learned beside density and colour from what a dense extractor says of every pixel, finds
things in space by their names: at least 4.9 mIoU above LERF and OpenScene on Replica, with fewer blurred borders than
features of crops, and views rendered where features disagree improve it.

Formula: w_i = alpha_i prod_{j<i} (1 - alpha_j), alpha_i = 1 - exp(-density_i step_i);  C = sum_i w_i c_i;
F = sum over the 24 largest of w_i f(x_i), weights and positions without gradient;
loss = mean |C - pixel|^2 + weight * mean over rays that have features of sum_channels (F - P)^2;
label of a point = argmax_k cos(f(x), t_k).

Paper: Engelmann et al. 2024, OpenNeRF: Open Set 3D Neural Scene Segmentation with Pixel-Wise Features and Rendered
Novel Views (ICLR).
Differs from the paper: any dense method of `segment` gives the features (the paper's extractor, OpenSeg, was trained on
masks); colours are the same from all sides; density and colour lie on plain grids without a network; samples along a
ray are spread evenly in the place of proposal networks; grids are smaller by default, for a processor; geometry that is
known may be handed in. Which views are rendered is not confirmed: here points that few views saw, or saw differently,
are looked at from cameras turned around them.
Defaults: heaviest samples, sum over channels, RAdam from 1e-2 to 1e-3 from the release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_range
from ..progress import Progress
from ..registry import method
from ..zeroshot.sentences import as_text
from .fields import GRIDS, FeatureField, Grids, Radiance
from .rays import Space, distortion, image_rays, pixel_rays, rendering_weights
from .views import Views, select_views

# from points (N, 3) of the world to densities (N,) per unit of length and colours (N, 3) in [0, 1]
Geometry = Callable[[torch.Tensor], "tuple[torch.Tensor, torch.Tensor]"]
Extractor = Callable[[np.ndarray], Any]  # from a picture uint8 (H, W, 3) to features (h, w, dim)
SPREAD = 1e-2  # factor of the distortion loss
GEOMETRY_LR = 0.1  # of density and colour, whose few gradients are small
CHUNK = 4096  # rays, or points, at a time


@dataclass
class Rendered:
    """What is seen along rays.

    Attributes
    ----------
    colour : (N, 3)
    features : (N, dim), not normalised; (N, 0) where they were not asked for
    depth : (N,), mean distance of what is seen
    opacity : (N,), how much of the ray is stopped
    spread : the distortion loss
    """

    colour: torch.Tensor
    features: torch.Tensor
    depth: torch.Tensor
    opacity: torch.Tensor
    spread: torch.Tensor


@dataclass
class Scene:
    """A scene that was learned.

    Attributes
    ----------
    geometry : density and colour of points
    field : features of points, of `space.unit`
    space : where the scene lies
    views : what it was learned from, rendered views included
    losses : mean colour and feature loss of the last tenth of the steps
    """

    geometry: Geometry
    field: FeatureField
    space: Space
    views: Views
    losses: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def features(self, points: Any) -> torch.Tensor:
        """Unit rows (N, dim) of points (N, 3)."""
        x = torch.as_tensor(points, dtype=torch.float32)
        return torch.cat([F.normalize(self.field(self.space.unit(part)), dim=-1) for part in x.split(CHUNK)])

    def scores(self, points: Any, text: Any) -> np.ndarray:
        """Cosines (N, K) of points with class vectors (K, dim)."""
        return self.features(points).numpy() @ as_text(text).T

    def label(self, points: Any, text: Any) -> np.ndarray:
        """Number of the best class of every point."""
        return self.scores(points, text).argmax(1)

    @torch.no_grad()
    def render(self, intrinsics: Any, pose: Any, height: int, width: int, features: bool = True) -> Rendered:
        """What a camera sees, as maps (height, width, ...)."""
        camera, place = (torch.as_tensor(m, dtype=torch.float32) for m in (intrinsics, pose))
        rays = image_rays(camera, place, height, width)
        told = self.field if features else None
        parts = [
            render(self.geometry, told, self.space, *part)
            for part in zip(*(r.split(CHUNK) for r in rays), strict=True)
        ]

        def whole(name: str) -> torch.Tensor:
            return torch.cat([getattr(part, name) for part in parts]).unflatten(0, (height, width))

        spread = torch.stack([part.spread for part in parts]).mean()
        return Rendered(whole("colour"), whole("features"), whole("depth"), whole("opacity"), spread)


@method(card="opennerf", level="M")
def opennerf(
    images: Any,
    features: Any,
    intrinsics: Any,
    poses: Any,
    *,
    space: Space | None = None,
    geometry: Geometry | None = None,
    extractor: Extractor | None = None,
    novel: int = 0,
    turn: float = 30.0,
    opaque: float = 0.9,
    grids: Grids = GRIDS,
    hidden: int = 256,
    weight: float = 1.0,
    steps: int = 2000,
    rays: int = 1024,
    lr: float = 1e-2,
    seed: int = 0,
    progress: bool | None = None,
) -> Scene:
    """Learn the features of a scene's points.

    Parameters
    ----------
    images : (M, H, W, 3), uint8, or floats in [0, 1]
    features : (M, h, w, dim), of their pixels, on a grid of any size; NaN where there are none
    intrinsics : (3, 3) or (M, 3, 3), in pixels of the images
    poses : (M, 4, 4), camera to world, see `segment.rays`
    space : where the scene lies (default: the unit ball, rays from 0.05 to 4)
    geometry : density and colour of points, if known; None learns them from the images
    extractor : of the features of rendered views
    novel : how many views are rendered where features are least sure, half of the steps later
    turn : up to so many degrees their cameras are turned around what they look at
    opaque : mean opacity below which a rendered view is not used
    grids, hidden : of the field, see `segment.fields.FeatureField`
    weight : of the feature loss
    steps : of the optimiser
    rays : per step
    lr : of the features at the start; it falls to a tenth, as that of density and colour does
    seed : of the start, the rays and the samples
    progress : show a bar (default: on a terminal)

    Returns
    -------
    Scene

    Raises
    ------
    ClipworksError
        If arrays do not fit together or are not finite, or an argument is out of range.

    Inputs
    ------
    posed images of one scene and their pixels' features; words are needed only to ask

    Relations
    ---------
    The features are those of any dense method (`views.dense_features`). `views.lift` takes them to points without
    learning anything, as OpenScene's fusion does.

    References
    ----------
    Engelmann et al. 2024, OpenNeRF: Open Set 3D Neural Scene Segmentation with Pixel-Wise Features and Rendered Novel
    Views (ICLR)

    Examples
    --------
    >>> draw, camera = np.random.default_rng(0), np.array([[4.0, 0, 2], [0, 4, 2], [0, 0, 1]])
    >>> pictures, vectors = draw.random((2, 4, 4, 3)), draw.random((2, 2, 2, 5))
    >>> scene = opennerf(pictures, vectors, camera, np.stack([np.eye(4)] * 2), grids=[(2, 4, 8)], steps=2, rays=8)
    >>> scene.label([[0.0, 0.0, 1.0]], np.eye(5)).shape
    (1,)
    """
    check_range("steps", steps, 1), check_range("rays", rays, 1), check_range("weight", weight, 0)
    check_range("novel", novel, 0), check_range("opaque", opaque, 0, 1), check_range("turn", turn, 0, 180)
    if novel and extractor is None:
        raise ClipworksError("extractor must be given where novel views are to be rendered.")
    views = Views.of(images, features, intrinsics, poses)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        radiance = Radiance() if geometry is None else None
        learned = FeatureField(views.features.shape[-1], grids, hidden=hidden)
    where = space or Space()
    known = geometry or (lambda points: radiance(where.unit(points)))  # type: ignore[misc]
    scene = Scene(known, learned, where, views)
    optimisers: list[tuple[float, torch.optim.Optimizer]] = [(lr, torch.optim.RAdam(learned.parameters(), lr))]
    if radiance is not None:
        optimisers.append((GEOMETRY_LR, torch.optim.Adam(radiance.parameters(), GEOMETRY_LR, eps=1e-15)))
    generator = torch.Generator().manual_seed(seed)
    history: list[torch.Tensor] = []
    for step in Progress(range(steps), steps, "learning a scene", enabled=progress):
        if novel and step == (steps + 1) // 2:
            scene.views = _with_novel(scene, extractor, novel, turn, opaque, seed)  # type: ignore[arg-type]
        for rate, optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = rate * 0.1 ** (step / steps)
            optimiser.zero_grad()
        losses = step_losses(scene, rays, generator)
        total = losses["features"] * weight + losses["colour"] + SPREAD * losses["spread"]
        total.backward()
        for _, optimiser in optimisers:
            optimiser.step()
        history.append(torch.stack([losses["colour"], losses["features"]]).detach())
    colour, told = torch.stack(history[-max(1, steps // 10) :]).mean(0).tolist()
    scene.losses = {"colour": colour, "features": told}
    learned.requires_grad_(False)
    if radiance is not None:
        radiance.requires_grad_(False)
    return scene


def step_losses(scene: Scene, rays: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Losses of rays that are drawn from all pixels; rendered views have no colours to learn from."""
    views = scene.views
    image, pixels = views.draw(rays, generator)
    colour, target = views.at(image, pixels)
    origins, directions = pixel_rays(views.intrinsics[image], views.poses[image], pixels + 0.5)
    seen = render(scene.geometry, scene.field, scene.space, origins, directions, generator)
    real = image < views.real
    photo = ((seen.colour - colour)[real] ** 2).mean() if real.any() else seen.colour.sum() * 0
    return {"colour": photo, "features": feature_loss(seen.features, target), "spread": seen.spread}


def feature_loss(rendered: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum over channels of squared differences, mean over the rays (N, dim) whose target is finite; 0 without any.

    >>> float(feature_loss(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])))
    5.0
    """
    known = target.isfinite().all(-1)
    return ((rendered[known] - target[known]) ** 2).sum() / known.sum().clamp(min=1)


def render(
    geometry: Geometry,
    features: FeatureField | None,
    space: Space,
    origins: torch.Tensor,
    directions: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Rendered:
    """Follow rays (N, 3); language changes the field of features alone, never the geometry."""
    points, distance, step = space.march(origins, directions, generator)
    density, colour = geometry(points.flatten(0, 1))
    weights = rendering_weights(density.view_as(distance), step)
    opacity = weights.sum(-1)
    found = origins.new_zeros(len(origins), 0)
    if features is not None:
        heavy, index = weights.detach().topk(min(space.heaviest, space.samples), dim=-1)
        places = points.detach().gather(1, index[..., None].expand(-1, -1, 3))
        found = (heavy[..., None] * features(space.unit(places.flatten(0, 1))).unflatten(0, index.shape)).sum(1)
    return Rendered(
        (weights[..., None] * colour.unflatten(0, distance.shape)).sum(1), found,
        (weights * distance).sum(-1) / opacity.clamp(min=1e-6), opacity, distortion(weights, distance, step),
    )  # fmt: skip


@torch.no_grad()
def _with_novel(
    scene: Scene, extractor: Extractor, count: int, turn: float, opaque: float, seed: int
) -> Views:
    """The views with rendered ones added, and what the extractor says of these."""
    views = scene.views
    height, width = views.images.shape[1:3]

    def look(intrinsics: torch.Tensor, pose: torch.Tensor, tall: int, wide: int) -> Rendered:
        return scene.render(intrinsics, pose, tall, wide, features=False)

    for intrinsics, pose in select_views(views, look, count, turn=turn, opaque=opaque, seed=seed):
        seen = look(intrinsics, pose, height, width)
        picture = (255 * seen.colour).round().clamp(0, 255).byte().numpy()
        views = views.and_rendered(seen.colour, extractor(picture), intrinsics, pose)
    return views
