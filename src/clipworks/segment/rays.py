"""Cameras, rays and what is seen along them: the geometry of posed images, as pure functions of tensors.

Poses are camera-to-world matrices (4, 4) in the convention of computer vision (OpenCV, COLMAP): x to the right, y down,
z into the picture; `from_opengl` turns those of OpenGL, Blender and Nerfstudio. Intrinsics are (3, 3) in pixels, the
middle of the first pixel is at (0.5, 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import check_range


@dataclass(frozen=True)
class Space:
    """Where a scene lies and how finely rays are followed through it.

    Attributes
    ----------
    centre, radius : of the ball that is kept as it is; what lies outside is contracted into twice its radius
    near, far : distances between which a ray is followed
    samples : along a ray
    heaviest : samples of a ray whose features count, those of the largest weights
    """

    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    radius: float = 1.0
    near: float = 0.05
    far: float = 4.0
    samples: int = 64
    heaviest: int = 24

    def __post_init__(self) -> None:
        check_range("radius", self.radius, 1e-9)
        check_range("near", self.near, 0)
        check_range("far", self.far, self.near + 1e-9)
        check_range("samples", self.samples, 1)
        check_range("heaviest", self.heaviest, 1)

    def unit(self, points: torch.Tensor) -> torch.Tensor:
        """Points (..., 3) of the world, however far, in [0, 1]."""
        return (contract((points - points.new_tensor(self.centre)) / self.radius) + 2) / 4

    def march(
        self, origins: torch.Tensor, directions: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples of rays (N, 3): points (N, S, 3), their distances and the steps to the next, (N, S) each.

        With a generator every sample lies anywhere in its part of the ray, without in its middle.
        """
        edges = torch.linspace(self.near, self.far, self.samples + 1)
        size = (len(origins), self.samples)
        within = torch.full(size, 0.5) if generator is None else torch.rand(size, generator=generator)
        distance = edges[:-1] + within * (edges[1] - edges[0])
        step = torch.diff(distance, append=torch.full((len(origins), 1), self.far), dim=1)
        return origins[:, None] + distance[..., None] * directions[:, None], distance, step


def contract(x: torch.Tensor) -> torch.Tensor:
    """Points as they are inside the unit ball, (2 - 1 / |x|) x / |x| outside: all of space within a radius of 2.

    >>> contract(torch.tensor([[0.5, 0, 0], [0, 4.0, 0]])).tolist()
    [[0.5, 0.0, 0.0], [0.0, 1.75, 0.0]]
    """
    length = x.norm(dim=-1, keepdim=True).clamp(min=1.0)
    return (2 - 1 / length) * x / length


def pixel_rays(
    intrinsics: torch.Tensor, poses: torch.Tensor, pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Origins and unit directions (N, 3) of rays through pixels (N, 2), x and y, of cameras (N, 3, 3), (N, 4, 4)."""
    homogeneous = F.pad(pixels, (0, 1), value=1.0)
    inside = torch.linalg.solve(intrinsics, homogeneous[..., None])
    directions = (poses[..., :3, :3] @ inside)[..., 0]
    return poses[..., :3, 3].expand_as(directions), F.normalize(directions, dim=-1)


def image_rays(
    intrinsics: torch.Tensor, pose: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for all pixels of one image (3, 3), (4, 4), row by row: (H W, 3) each."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return pixel_rays(intrinsics[None], pose[None], torch.stack([x, y], -1).reshape(-1, 2).to(intrinsics))


def project(points: torch.Tensor, intrinsics: torch.Tensor, pose: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, 2) of points (N, 3) in one image, and their distance, below 0 behind the camera."""
    seen = (points - pose[:3, 3]) @ pose[:3, :3]
    flat = seen @ intrinsics.T
    depth = seen[:, 2:]
    return flat[:, :2] / torch.where(depth.abs() < 1e-9, 1e-9, flat[:, 2:]), seen.norm(dim=-1) * depth[:, 0].sign()


def visible(
    points: torch.Tensor, intrinsics: torch.Tensor, pose: torch.Tensor, depth: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which points (N, 3) an image sees, and in which of its pixels (N, 2), whole numbers x and y.

    Parameters
    ----------
    points, intrinsics, pose : as for `project`, the intrinsics for the size of `depth`
    depth : (H, W), distance of what is seen in every pixel
    tolerance : how much farther than that a point may be
    """
    height, width = depth.shape
    pixels, distance = project(points, intrinsics, pose)
    at = pixels.floor().nan_to_num(-1, -1, -1).clamp(-1, max(height, width)).long()
    inside = (distance > 0) & (at >= 0).all(1) & (at[:, 0] < width) & (at[:, 1] < height)
    at = torch.where(inside[:, None], at, 0)
    return inside & (distance <= depth[at[:, 1], at[:, 0]] + tolerance), at


def look_at(eye: torch.Tensor, target: torch.Tensor, up: Sequence[float] = (0.0, 0.0, 1.0)) -> torch.Tensor:
    """Pose (4, 4) of a camera at a point that looks at another, with `up` upwards in the picture."""
    forward = F.normalize(target - eye, dim=0)
    above = torch.tensor(up, dtype=eye.dtype)
    if float(torch.linalg.cross(forward, above).norm()) < 1e-6:  # looks straight up or down
        above = above.roll(1)
    right = F.normalize(torch.linalg.cross(forward, above), dim=0)
    pose = torch.eye(4, dtype=eye.dtype)
    pose[:3] = torch.stack([right, torch.linalg.cross(forward, right), forward, eye], dim=1)
    return pose


def from_opengl(poses: torch.Tensor) -> torch.Tensor:
    """Poses (..., 4, 4) of cameras that look along their own -z with y upwards."""
    return poses * poses.new_tensor([1.0, -1.0, -1.0, 1.0])


def rendering_weights(density: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """How much of a ray each sample stops: alpha_i prod_{j<i} (1 - alpha_j), alpha = 1 - exp(-density step); (N, S).

    >>> rendering_weights(torch.tensor([[0.0, 1e9, 1.0]]), torch.ones(1, 3))
    tensor([[0., 1., 0.]])
    """
    through = density * step
    before = torch.cumsum(F.pad(through, (1, 0)), dim=-1)[..., :-1]
    return torch.exp(-before) * -torch.expm1(-through)


def distortion(weights: torch.Tensor, distance: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """How spread out the weights of rays are: mean of sum_ij w_i w_j |t_i - t_j| + sum_i w_i^2 step_i / 3.

    Barron et al. 2022, Mip-NeRF 360 (CVPR). Distances ascend.
    """
    mass, moment = weights.cumsum(-1) - weights, (weights * distance).cumsum(-1) - weights * distance
    apart = 2 * (weights * (distance * mass - moment)).sum(-1)
    return (apart + (weights**2 * step).sum(-1) / 3).mean()
