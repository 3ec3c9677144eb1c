"""Cameras and rays against plain sums, grids by hand, and a scene of two boxes whose answer is known."""

import itertools

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from scipy.spatial.transform import Rotation

from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.metrics.segmentation import confusion, mean_iou
from clipworks.segment.common import enter
from clipworks.segment.fields import PRIMES, FeatureField, HashGrid, Radiance
from clipworks.segment.opennerf import feature_loss, opennerf, render, step_losses
from clipworks.segment.rays import (
    Space,
    contract,
    distortion,
    from_opengl,
    image_rays,
    look_at,
    pixel_rays,
    project,
    rendering_weights,
    visible,
)
from clipworks.segment.sclip import SCLIP
from clipworks.segment.views import Views, dense_features, lift, turned, uncertainty

DRAW = np.random.default_rng(0)
SIDE, FOCAL, DENSE = 32, 40.0, 40.0
CAMERA = torch.tensor([[FOCAL, 0, SIDE / 2], [0, FOCAL, SIDE / 2], [0, 0, 1]])
BOXES = np.array([[[-0.6, -0.2, -0.2], [-0.2, 0.2, 0.2]], [[0.2, -0.2, -0.2], [0.6, 0.2, 0.2]]])
COLOURS = np.array([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9], [0, 0, 0]])
SPACE = Space(near=1.3, far=3.7, samples=48, heaviest=8)
SMALL = dict(space=SPACE, grids=[(3, 8, 32)], hidden=32, rays=128, steps=300)


def by_box(points):
    """Which of the two boxes a point lies in, 2 for none."""
    inside = ((points[..., None, :] >= BOXES[:, 0]) & (points[..., None, :] <= BOXES[:, 1])).all(-1)
    return np.where(inside.any(-1), inside.argmax(-1), 2)


def by_side(points):
    """The same boxes, but the name is that of the side: 0 in front, 1 behind."""
    return np.where(by_box(points) == 2, 2, (points[..., 1] > 0).astype(int))


def density(kind):
    def geometry(points):
        label = torch.from_numpy(kind(points.numpy()))
        return DENSE * (label < 2), torch.tensor(COLOURS, dtype=torch.float32)[label]

    return geometry


def ring(count=12):
    """Cameras all around, in turn from above and from below."""
    angles = np.arange(count) * 2 * np.pi / count + 0.1
    height = np.where(np.arange(count) % 2, 1.4, -1.4)
    eyes = np.stack([2.0 * np.cos(angles), 2.0 * np.sin(angles), height], 1)
    return torch.stack([look_at(torch.tensor(e, dtype=torch.float32), torch.zeros(3)) for e in eyes])


def traced(pose, kind):
    """Labels of an image (SIDE, SIDE) by where each ray enters a box: the slabs, in numpy."""
    pose = pose.numpy().astype(float)
    labels = np.full((SIDE, SIDE), 2)
    for y, x in itertools.product(range(SIDE), range(SIDE)):
        way = pose[:3, :3] @ [(x + 0.5 - SIDE / 2) / FOCAL, (y + 0.5 - SIDE / 2) / FOCAL, 1.0]
        nearest = np.inf
        for low, high in BOXES:
            a, b = (low - pose[:3, 3]) / way, (high - pose[:3, 3]) / way
            first, last = np.minimum(a, b).max(), np.maximum(a, b).min()
            if first < last and first < nearest:
                nearest = first
                labels[y, x] = kind(pose[:3, 3] + (first + 1e-6) * way)
    return labels


def pictures(kind):
    labels = np.stack([traced(pose, kind) for pose in ring()])
    return COLOURS[labels], np.eye(8)[labels]


def surface():
    """Middles of the voxels of a grid of 32 that lie in a box and have a neighbour that does not."""
    at = np.stack(np.meshgrid(*[(np.arange(32) + 0.5) / 16 - 1] * 3, indexing="ij"), -1)
    full = np.pad(by_box(at) < 2, 1)
    rim = np.zeros_like(full)
    for axis, shift in itertools.product(range(3), (-1, 1)):
        rim |= full & ~np.roll(full, shift, axis)
    return at[rim[1:-1, 1:-1, 1:-1]]


def test_weights_against_loops():
    thick, step = DRAW.random((4, 9)) * 3, DRAW.random((4, 9))
    expected = np.zeros((4, 9))
    for n in range(4):
        left = 1.0
        for i in range(9):
            alpha = 1 - np.exp(-thick[n, i] * step[n, i])
            expected[n, i] = alpha * left
            left *= 1 - alpha
        assert expected[n].sum() == pytest.approx(1 - left)
    found = rendering_weights(torch.tensor(thick), torch.tensor(step)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found >= 0).all()
    assert (found.sum(1) <= 1).all()
    t = np.sort(DRAW.random((4, 9)), 1)
    pairs = [sum(w[i] * w[j] * abs(d[i] - d[j]) for i in range(9) for j in range(9)) + (w**2 * s).sum() / 3
             for w, d, s in zip(expected, t, step, strict=True)]  # fmt: skip
    assert float(distortion(*map(torch.tensor, (expected, t, step)))) == pytest.approx(np.mean(pairs))


def test_contraction():
    x = torch.tensor(DRAW.normal(size=(200, 3)) * 3)
    length = x.norm(dim=1)
    near = length <= 1
    assert torch.equal(contract(x)[near], x[near])
    assert contract(1e9 * x).norm(dim=1).max() < 2 + 1e-9
    np.testing.assert_allclose(contract(x)[~near], (2 - 1 / length[~near, None]) * x[~near] / length[~near, None])
    unit = x / length[:, None]
    np.testing.assert_allclose(contract(unit * (1 + 1e-9)), unit, atol=1e-8)
    inside = Space(centre=(1, 2, 3), radius=2).unit(x)
    assert 0 <= float(inside.min()) <= float(inside.max()) <= 1


def test_rays_and_projection_undo_each_other():
    turn = Rotation.from_euler("xyz", [0.3, -0.5, 1.0]).as_matrix()
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3], pose[:3, 3] = torch.tensor(turn), torch.tensor([1.0, -2, 0.5])
    camera = torch.tensor([[50.0, 0, 20], [0, 60, 12], [0, 0, 1]], dtype=torch.float64)
    pixels = torch.tensor(DRAW.random((30, 2)) * [40, 24])
    origins, ways = pixel_rays(camera.expand(30, 3, 3), pose.expand(30, 4, 4), pixels)
    flat = (pixels.numpy() - [20, 12]) / [50, 60]
    expected = np.c_[flat, np.ones(30)] @ turn.T
    np.testing.assert_allclose(ways, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-9)
    distance = torch.tensor(1 + DRAW.random(30))
    found, depth = project(origins + distance[:, None] * ways, camera, pose)
    np.testing.assert_allclose(found, pixels, atol=1e-6)
    np.testing.assert_allclose(depth, distance, atol=1e-6)
    assert (project(origins - ways, camera, pose)[1] < 0).all()
    whole = image_rays(camera, pose, 2, 3)[1]
    assert torch.equal(whole[4], pixel_rays(camera[None], pose[None], torch.tensor([[1.5, 1.5]]).double())[1][0])


def test_cameras_look_where_they_should():
    for up in ((0.0, 0, 1), (0.0, 1, 0)):
        pose = look_at(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.0, 0.5, 0.0]), up)
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-6)
        assert float(torch.linalg.det(pose)) == pytest.approx(1)
        pixel, _ = project(torch.tensor([[0.0, 0.5, 0.0]]), CAMERA, pose)
        np.testing.assert_allclose(pixel, [[SIDE / 2, SIDE / 2]], atol=1e-4)
        above, _ = project(torch.tensor([[0.0, 0.5, 0.0]]) + 0.1 * torch.tensor([up]), CAMERA, pose)
        assert float(above[0, 1]) < SIDE / 2
    assert torch.isfinite(look_at(torch.tensor([0.0, 0, 2]), torch.zeros(3))).all()
    other = from_opengl(torch.eye(4))
    assert other[:3, 2].tolist() == [0, 0, -1]
    assert float(torch.linalg.det(other)) == 1
    draw = np.random.default_rng(0)
    for _ in range(20):
        new, target = turned(pose, torch.tensor([0.1, 0.2, 0.3]), 40, draw), torch.tensor([0.1, 0.2, 0.3])
        a, b = pose[:3, 3] - target, new[:3, 3] - target
        assert float(b.norm()) == pytest.approx(float(a.norm()), rel=1e-5)
        assert float(a @ b / a.norm() ** 2) >= np.cos(np.deg2rad(40)) - 1e-5


def test_grids_against_interpolation_and_a_hash():
    torch.manual_seed(0)
    grid, x = HashGrid(2, 3, 9, channels=2, entries=200), torch.rand(50, 3)
    assert grid.sizes == [3, 9]
    assert [len(t) for t in grid.tables] == [64, 200]
    found = grid(x).detach().numpy()
    lattice = grid.tables[0].detach().numpy().reshape(4, 4, 4, 2)
    expected = RegularGridInterpolator([np.linspace(0, 1, 4)] * 3, lattice)(x.numpy())
    np.testing.assert_allclose(found[:, :2], expected, atol=1e-6)
    table = grid.tables[1].detach().numpy()
    for point, row in zip(x.numpy().astype(np.float32) * 9, found[:, 2:], strict=True):
        low, total = np.floor(point).astype(int), np.zeros(2)
        for corner in itertools.product((0, 1), repeat=3):
            share = np.prod([p - a if c else 1 - p + a for c, p, a in zip(corner, point, low, strict=True)])
            a, b, c = (int(v) * prime for v, prime in zip(low + corner, PRIMES, strict=True))
            total += share * table[(a ^ b ^ c) % 200]
        np.testing.assert_allclose(row, total, atol=1e-5)
    assert torch.isfinite(grid(torch.tensor([[1.0, 1, 1], [0, 0, 0]]))).all()


def field(dim=5):
    torch.manual_seed(1)
    return FeatureField(dim, [(2, 4, 8)], hidden=16)


def some_rays(n=6):
    origins = torch.tensor(DRAW.normal(size=(n, 3)) * 0.1, dtype=torch.float32)
    return origins, torch.nn.functional.normalize(torch.tensor(DRAW.normal(size=(n, 3)), dtype=torch.float32), dim=1)


def misty(points):
    return 1 + points[:, 0].sin(), points.sigmoid()


@torch.no_grad()
def test_rendering_against_loops():
    space, told = Space(near=0.1, far=2.0, samples=8, heaviest=3), field()
    origins, ways = some_rays()
    seen = render(misty, told, space, origins, ways)
    edges = np.linspace(0.1, 2, 9)
    at = (edges[1:] + edges[:-1]) / 2
    step = np.diff(at, append=2.0)
    for n in range(6):
        points = origins[n].numpy() + at[:, None] * ways[n].numpy()
        weights = rendering_weights(torch.tensor(1 + np.sin(points[:, 0]))[None], torch.tensor(step)[None])[0].numpy()
        values = told(space.unit(torch.tensor(points, dtype=torch.float32))).numpy()
        heavy = np.argsort(-weights)[:3]
        np.testing.assert_allclose(seen.features[n], weights[heavy] @ values[heavy], atol=1e-5)
        np.testing.assert_allclose(seen.colour[n], weights @ (1 / (1 + np.exp(-points))), atol=1e-5)
        assert float(seen.depth[n]) == pytest.approx(weights @ at / weights.sum(), rel=1e-4)
        assert float(seen.opacity[n]) == pytest.approx(weights.sum(), rel=1e-4)


@torch.no_grad()
def test_limits_of_rendering():
    origins, ways = some_rays()
    told = field()
    for layer in (told.head[0], told.head[2]):
        layer.weight.zero_()
    constant = told(torch.zeros(1, 3))
    space = Space(near=0.1, far=2.0, samples=24, heaviest=24)
    seen = render(misty, told, space, origins, ways)
    np.testing.assert_allclose(seen.features, seen.opacity[:, None] * constant, atol=1e-5)

    def wall(points):
        return torch.where(points.norm(dim=1) > 1, 1e9, 0.0), points

    told = field()
    seen = render(wall, told, space, torch.zeros(6, 3), ways)
    first = space.march(torch.zeros(6, 3), ways)[0][:, (1.9 / 24 * (np.arange(24) + 0.5) + 0.1 > 1).argmax()]
    np.testing.assert_allclose(seen.features, told(space.unit(first)), atol=1e-6)
    whole = render(misty, told, space, origins, ways).features
    gaps = [float((render(misty, told, Space(near=0.1, far=2.0, samples=24, heaviest=k), origins, ways).features
                   - whole).norm()) for k in (1, 6, 12, 24)]  # fmt: skip
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-6


def test_language_never_changes_geometry():
    shape, vectors = DRAW.random((2, 6, 6, 3)), DRAW.random((2, 3, 3, 5))
    poses = torch.stack([torch.eye(4)] * 2)
    options = dict(space=Space(samples=8), grids=[(2, 4, 8)], rays=16, steps=5)
    one, two, three = (opennerf(shape, f, CAMERA, poses, weight=w, **options)
                       for f, w in ((vectors, 1.0), (vectors, 0.0), (np.full_like(vectors, np.nan), 1.0)))  # fmt: skip
    at = torch.rand(20, 3)
    for other in (two, three):
        for a, b in zip(one.geometry(at), other.geometry(at), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(one.features(at), two.features(at))
    assert three.losses["features"] == 0

    def learned(points):
        return (points @ thick).exp(), (points * thick).sigmoid()

    thick = torch.ones(3, requires_grad=True)
    one.field.requires_grad_(True)
    one.geometry = learned
    losses = step_losses(one, 32, torch.Generator().manual_seed(0))
    losses["features"].backward()
    assert thick.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in one.field.parameters())
    losses["colour"].backward()
    assert thick.grad.abs().sum() > 0


def test_pixels_without_features_do_not_count():
    seen, told = torch.rand(6, 4, requires_grad=True), torch.rand(6, 4)
    told[2, 1], told[4] = float("nan"), float("nan")
    loss = feature_loss(seen, told)
    kept = [0, 1, 3, 5]
    assert float(loss.detach()) == pytest.approx(((seen - told)[kept] ** 2).sum(1).mean().item(), rel=1e-5)
    loss.backward()
    assert torch.isfinite(seen.grad).all()
    assert not seen.grad[[2, 4]].any()
    assert float(feature_loss(seen, told * float("nan")).detach()) == 0


def test_features_of_a_pixel_are_those_of_its_cell():
    views = Views.of(np.zeros((1, 6, 10, 3)), DRAW.random((1, 3, 4, 2)), CAMERA, np.eye(4)[None])
    for y, x in itertools.product(range(6), range(10)):
        found = views.at(torch.tensor([0]), torch.tensor([[x, y]]))[1][0]
        row, column = int((y + 0.5) / 6 * 3), int((x + 0.5) / 10 * 4)
        assert torch.equal(found, views.features[0, row, column])


def test_lifting_by_hand():
    """Two cameras, one in front of a wall and one behind it; what one of them cannot see does not count."""
    poses = torch.stack([look_at(torch.tensor([0.0, y, 0.0]), torch.zeros(3)) for y in (-2.0, 2.0)])
    vectors = np.zeros((2, 1, 1, 2))
    vectors[0, ..., 0], vectors[1, ..., 1] = 3.0, 0.5
    views = Views.of(np.zeros((2, 8, 8, 3)), vectors, [[8, 0, 4], [0, 8, 4], [0, 0, 1]], poses.numpy())
    points = torch.tensor([[0.0, -0.1, 0.0], [0.0, 0.1, 0.1], [0.3, 0.0, 0.0], [9.0, 0.0, 0.0]])
    mean, variance, count = lift(points, views, torch.full((2, 8, 8), 2.0), tolerance=0.05)
    assert count.tolist() == [1, 1, 2, 0]
    np.testing.assert_allclose(mean, [[1, 0], [0, 1], [0.5, 0.5], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(variance, [0, 0, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(uncertainty(variance, count), [0.5, 0.5, 2 / 3, 1], atol=1e-6)
    seen, at = visible(points, views.intrinsics[0], poses[0], torch.full((8, 8), 2.0), 0.05)
    assert seen.tolist() == [True, False, True, False]
    assert at[0].tolist() == [4, 4]


def test_two_boxes_are_told_apart():
    images, vectors = pictures(by_box)
    scene = opennerf(images, vectors, CAMERA, ring(), geometry=density(by_box), **SMALL)
    at = surface()
    found = scene.label(at, np.eye(8)[:2])
    assert (found == by_box(at)).mean() > 0.95
    assert mean_iou(confusion(by_box(at), found, 2)) > 0.9
    np.testing.assert_allclose(scene.scores(at, 7 * np.eye(8)[:2]), scene.scores(at, np.eye(8)[:2]), atol=1e-6)
    seen = scene.render(CAMERA, ring()[3], SIDE, SIDE)
    truth = traced(ring()[3], by_box)
    assert (seen.features.numpy()[..., :2].argmax(-1) == truth)[truth < 2].mean() > 0.9
    assert float(seen.opacity[torch.from_numpy(truth == 2)].mean()) < 0.1


def test_rendered_views_of_the_other_side_help():
    """The boxes have another name behind, and only the photos of the front have features."""
    images, vectors = pictures(by_side)
    vectors[ring()[:, 1, 3].numpy() > -0.3] = np.nan

    def extract(picture):
        assert picture.dtype == np.uint8
        return np.eye(8)[((picture[..., None, :] / 255 - COLOURS) ** 2).sum(-1).argmin(-1)]

    at = surface()
    scores = {}
    for novel in (0, 4):
        scene = opennerf(images, vectors, CAMERA, ring(), geometry=density(by_side), extractor=extract, novel=novel,
                         turn=60, opaque=0.05, **SMALL)  # fmt: skip
        assert len(scene.views.images) == 12 + novel
        scores[novel] = (scene.label(at, np.eye(8)[:2]) == by_side(at)).mean()
    assert scores[4] > scores[0] + 0.1
    assert scores[4] > 0.85


def test_density_and_colour_against_interpolation():
    """Sums of what scipy interpolates between the corners, on axes in the order z, y, x."""
    torch.manual_seed(0)
    radiance, x = Radiance((3, 5)), torch.rand(40, 3)
    thick, colour = radiance(x)
    assert torch.allclose(thick, torch.full((40,), np.exp(-2.0), dtype=torch.float32))
    assert torch.equal(colour, torch.full((40, 3), 0.5))
    with torch.no_grad():
        for grid in radiance.grids:
            grid.normal_()
    expected = 0
    for grid in radiance.grids:
        axes, corners = [np.linspace(0, 1, grid.shape[-1])] * 3, grid[0].detach().numpy()
        expected = expected + RegularGridInterpolator(axes, corners.transpose(1, 2, 3, 0))(x.numpy()[:, ::-1])
    thick, colour = (found.detach().numpy() for found in radiance(x))
    np.testing.assert_allclose(np.log(thick), expected[:, 0] - 2, atol=1e-5)
    np.testing.assert_allclose(colour, 1 / (1 + np.exp(-expected[:, 1:])), atol=1e-5)


@pytest.mark.slow
def test_shape_is_learned_from_photos_alone():
    """Nothing but posed photos: surfaces are where they were traced, all names are right, and rendered views help."""
    images, vectors = pictures(by_side)
    vectors[ring()[:, 1, 3].numpy() > -0.3] = np.nan

    def extract(picture):
        return np.eye(8)[((picture[..., None, :] / 255 - COLOURS) ** 2).sum(-1).argmin(-1)]

    at, names = surface(), {}
    for novel in (0, 4):
        scene = opennerf(images, vectors, CAMERA, ring(), extractor=extract, novel=novel, turn=60, opaque=0.05,
                         **{**SMALL, "rays": 256})  # fmt: skip
        names[novel] = (scene.label(at, np.eye(8)[:2]) == by_side(at)).mean()
    assert names[0] > 0.85
    assert names[4] > max(0.97, names[0])
    new = look_at(torch.tensor([1.7, -1.0, 0.4]), torch.zeros(3))  # none of the photos
    truth, seen = traced(new, by_side), scene.render(CAMERA, new, SIDE, SIDE)
    assert float(((seen.colour - torch.tensor(COLOURS[truth], dtype=torch.float32)) ** 2).mean()) < 10**-2.2  # 22 dB
    assert float(seen.opacity[torch.from_numpy(truth < 2)].mean()) > 0.85
    assert float(seen.opacity[torch.from_numpy(truth == 2)].mean()) < 0.15


def test_the_extractor_is_a_dense_method():
    encoder, picture = toy_encoder(), DRAW.integers(0, 256, (16, 24, 3), np.uint8)
    found = dense_features(encoder, side=16)(picture)
    with torch.no_grad():
        plain = SCLIP().features(enter(encoder, torch.from_numpy(picture).permute(2, 0, 1)[None] / 255))[0].numpy()
    np.testing.assert_allclose(found, plain / np.linalg.norm(plain, axis=-1, keepdims=True), atol=1e-5)


def test_faults():
    good = dict(images=np.zeros((2, 4, 4, 3)), features=np.zeros((2, 2, 2, 5)), intrinsics=np.eye(3),
                poses=np.stack([np.eye(4)] * 2))  # fmt: skip
    faults = [
        ({"images": np.zeros((4, 4, 3))}, "images must have the shape"),
        ({"images": np.full((2, 4, 4, 3), 9.0)}, "uint8, or lie in"),
        ({"features": np.zeros((3, 2, 2, 5))}, r"features must have the shape \(2"),
        ({"poses": np.full((2, 4, 4), np.nan)}, "poses must be finite"),
        ({"intrinsics": np.zeros((3, 3))}, "invertible"),
        ({"novel": 1}, "extractor must be given"),
        ({"steps": 0}, "steps must lie in"),
    ]
    for change, message in faults:
        with pytest.raises(ClipworksError, match=message):
            opennerf(**{**good, **change})
    with pytest.raises(ClipworksError, match="far must lie in"):
        Space(near=2.0, far=1.0)
