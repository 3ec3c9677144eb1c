"""The modified ResNet against a functional recomputation from its tensors, and its seams."""

import pytest
import tiny_towers as tiny
import torch
import torch.nn.functional as F

from clipworks.encoders.config import VisionConfig
from clipworks.encoders.resnet import ModifiedResNet
from clipworks.errors import ClipworksError

SHAPE = dict(kind="resnet", image_size=64, patch_size=32, width=8, layers=(2, 1, 1, 2), heads=4, activation="relu",
             pool="attention", class_token=False)  # fmt: skip


def make(dim=16, **changes):
    tower = ModifiedResNet(VisionConfig(**{**SHAPE, **changes}), dim).double().eval()
    return tiny.shake(tower, std=0.15)


def plain(tower, pixels, mask=None, positions=None):
    """Stem, four stages, attention pool by loops; returns the vector, the stages' maps and the pool's weights."""
    p = tower.state_dict()

    def conv(name, x, **how):
        return F.conv2d(x, p[name + ".weight"], **how)

    def bn(name, x):
        mean, var, w, b = (
            p[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * w + b

    x = bn("bn1", conv("conv1", pixels, stride=2, padding=1)).clamp(min=0)
    x = bn("bn2", conv("conv2", x, padding=1)).clamp(min=0)
    x = F.avg_pool2d(bn("bn3", conv("conv3", x, padding=1)).clamp(min=0), 2)
    maps = []
    for stage, count in enumerate(tower.config.layers):
        for j in range(count):
            name, halve = f"layers.{stage}.{j}", stage > 0 and j == 0
            y = bn(f"{name}.bn1", conv(f"{name}.conv1", x)).clamp(min=0)
            y = bn(f"{name}.bn2", conv(f"{name}.conv2", y, padding=1)).clamp(min=0)
            y = F.avg_pool2d(y, 2) if halve else y
            y = bn(f"{name}.bn3", conv(f"{name}.conv3", y))
            if f"{name}.downsample.conv.weight" in p:
                x = F.avg_pool2d(x, 2) if halve else x
                x = bn(f"{name}.downsample.bn", conv(f"{name}.downsample.conv", x))
            x = (x + y).clamp(min=0)
        maps.append(x)
    cells = x.flatten(2).transpose(1, 2)
    cells = torch.cat([cells.mean(1, keepdim=True), cells], 1) + (
        p["pool.positions"] if positions is None else positions
    )
    q, k, v = (cells @ p[f"pool.{n}.weight"].T + p[f"pool.{n}.bias"] for n in "qkv")
    d = q.shape[-1] // tower.config.heads
    out, weights = torch.zeros_like(q[:, 0]), []
    for h in range(tower.config.heads):
        s = slice(h * d, (h + 1) * d)
        logits = torch.einsum("bd,bnd->bn", q[:, 0, s], k[..., s]) / d**0.5
        if mask is not None:
            logits[:, 1:][~mask] = -torch.inf
        weights.append(logits.softmax(-1))
        out[:, s] = torch.einsum("bn,bnd->bd", weights[-1], v[..., s])
    return out @ p["pool.out.weight"].T + p["pool.out.bias"], maps, torch.stack(weights, 1)


@torch.no_grad()
def test_forward_maps_and_pool_attention():
    tower, x = make(), tiny.pixels(3, 64)
    pooled, maps, weights = plain(tower, x)
    output = tower.run(x, output_layers=(0, 2, -1), output_attention=("pool",))
    torch.testing.assert_close(tower(x), pooled)
    torch.testing.assert_close(output.pooled, pooled)
    for asked in (0, 2, -1):
        torch.testing.assert_close(output.layers[asked], maps[asked])
    torch.testing.assert_close(output.tokens, maps[3].flatten(2).transpose(1, 2))
    torch.testing.assert_close(output.class_attention("pool"), weights[:, :, 1:])
    assert output.grid == (2, 2)
    joint = tower.project(output.tokens)
    value = F.conv2d(maps[3], tower.pool.v.weight[..., None, None], tower.pool.v.bias)
    joint_map = F.conv2d(value, tower.pool.out.weight[..., None, None], tower.pool.out.bias)
    torch.testing.assert_close(joint, joint_map.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_masked_cells_and_other_sizes():
    tower, x = make(), tiny.pixels(2, 64)
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    torch.testing.assert_close(tower(x, mask=mask), plain(tower, x, mask)[0])
    wide = tiny.pixels(2, 64, wide=128)
    table = tower.pool.positions
    grid = F.interpolate(table[1:].T.reshape(1, -1, 2, 2), (2, 4), mode="bicubic", align_corners=False)
    positions = torch.cat([table[:1], grid[0].flatten(1).T])
    torch.testing.assert_close(tower(wide), plain(tower, wide, positions=positions)[0])


@pytest.mark.parametrize("seam", ["prompts", "attention", "keep", "positions"])
def test_seams_that_a_resnet_has_not_are_refused(seam):
    with pytest.raises(ClipworksError, match=f"so it has no {seam}"):
        make().run(tiny.pixels(1, 64), **{seam: {0: torch.zeros(1, 8)}})


PUBLISHED = {
    "RN50": ((3, 4, 6, 3), 64, 32, 224, 1024, 38_316_896),
    "RN101": ((3, 4, 23, 3), 64, 32, 224, 512, 56_259_936),
    "RN50x4": ((4, 6, 10, 6), 80, 40, 288, 640, 87_137_080),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_published_number_of_weights(name):
    layers, width, heads, size, dim, count = PUBLISHED[name]
    config = VisionConfig(**{**SHAPE, "layers": layers, "width": width, "heads": heads, "image_size": size})
    with torch.device("meta"):
        tower = ModifiedResNet(config, dim)
    assert sum(p.numel() for p in tower.parameters()) == count


def test_batch_size_invariance_and_eval_mode_inside_images():
    encoder = tiny.encoder(vision={**tiny.VISION, **SHAPE}).train()
    x = tiny.pixels(3, 64)
    before = encoder.visual.bn1.running_mean.clone()
    together = encoder.images(x)
    torch.testing.assert_close(torch.cat([encoder.images(row) for row in x]), together)
    assert torch.equal(encoder.visual.bn1.running_mean, before)
    assert all(m.training for m in encoder.modules())
