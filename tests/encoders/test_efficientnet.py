"""EfficientNet-Lite against its published table, run layer by layer with batch norms and TensorFlow's padding."""

import pytest
import tiny_towers as tiny
import torch
import torch.nn.functional as F

from clipworks.encoders import efficientnet
from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.formats.native import save
from clipworks.encoders.loading import load
from clipworks.encoders.stems import build_stem
from clipworks.errors import BadWeights, ClipworksError

# kernel, stride of the first block, channels, blocks of every stage, written out
TABLE = {
    "lite0": [(3, 1, 16, 1), (3, 2, 24, 2), (5, 2, 40, 2), (3, 2, 80, 3), (5, 1, 112, 3), (5, 2, 192, 4),
              (3, 1, 320, 1)],
    "lite2": [(3, 1, 16, 1), (3, 2, 24, 3), (5, 2, 48, 3), (3, 2, 88, 4), (5, 1, 120, 4), (5, 2, 208, 5),
              (3, 1, 352, 1)],
}  # fmt: skip


def rows(size):
    """(before, after, kernel, stride, widened) of every block."""
    before, listed = 32, []
    for stage, (kernel, stride, channels, blocks) in enumerate(TABLE[size]):
        for block in range(blocks):
            listed.append((before, channels, kernel, stride if block == 0 else 1, stage > 0))
            before = channels
    return listed


def released(size, seed=0):
    """A state dictionary in the layout of the released weights, random."""
    draw, state = torch.Generator().manual_seed(seed), {}

    def conv(name, norm, after, before, kernel):
        weight = torch.randn(after, before, kernel, kernel, generator=draw, dtype=torch.float64)
        state[f"{name}.weight"] = weight * (2 / (before * kernel**2)) ** 0.5
        for part, low in (("weight", 0.5), ("bias", -0.3), ("running_mean", -0.2), ("running_var", 1)):
            state[f"{norm}.{part}"] = low + torch.rand(after, generator=draw, dtype=torch.float64)

    conv("_conv_stem", "_bn0", 32, 3, 3)
    for number, (before, after, kernel, _, widened) in enumerate(rows(size)):
        name, inner = f"_blocks.{number}.", before * 6 if widened else before
        if widened:
            conv(f"{name}_expand_conv", f"{name}_bn0", inner, before, 1)
        conv(f"{name}_depthwise_conv", f"{name}_bn1", inner, 1, kernel)
        conv(f"{name}_project_conv", f"{name}_bn2", after, inner, 1)
    conv("_conv_head", "_bn1", 1280, rows(size)[-1][1], 1)
    return state


def same(x, weight, stride, groups=1):
    """Convolution of TensorFlow's "same": all windows at stride 1, of which those it places are picked."""
    kernel = weight.shape[-1]
    everywhere = F.conv2d(F.pad(x, (kernel,) * 4), weight, groups=groups)
    picked = []
    for n in x.shape[-2:]:
        count = -(-n // stride)
        before = max((count - 1) * stride + kernel - n, 0) // 2
        picked.append(torch.arange(count) * stride + kernel - before)
    return everywhere[:, :, picked[0]][:, :, :, picked[1]]


def plain(state, x, size):
    """The feature map, norms apart."""

    def norm(x, name):
        s = {part: state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")}
        return (x - s["running_mean"]) / (s["running_var"] + 1e-3) ** 0.5 * s["weight"] + s["bias"]

    x = norm(same(x, state["_conv_stem.weight"], 2), "_bn0").clamp(0, 6)
    for number, (before, after, _, stride, widened) in enumerate(rows(size)):
        name, y = f"_blocks.{number}.", x
        if widened:
            y = norm(same(y, state[f"{name}_expand_conv.weight"], 1), f"{name}_bn0").clamp(0, 6)
        y = norm(same(y, state[f"{name}_depthwise_conv.weight"], stride, y.shape[1]), f"{name}_bn1").clamp(0, 6)
        y = norm(same(y, state[f"{name}_project_conv.weight"], 1), f"{name}_bn2")
        x = x + y if stride == 1 and before == after else y
    return norm(same(x, state["_conv_head.weight"], 1), "_bn1").clamp(0, 6)


@pytest.mark.parametrize("size", ["lite0", "lite2"])
def test_it_is_the_published_network_with_norms_folded(size):
    state = released(size)
    stem = efficientnet.EfficientNetLiteStem(8, size).double().eval()
    stem.read(state)
    draw = torch.Generator().manual_seed(1)
    for height, width in ((128, 128), (160, 160), (224, 224), (75, 90)):  # odd maps too, padded on both sides
        x = torch.randn(1, 3, height, width, generator=draw, dtype=torch.float64)
        want = plain(state, x, size)
        assert 0.01 < float((want > 0).double().mean()) < 0.99
        with torch.no_grad():
            got = stem.head(stem.body(x))
            whole = stem(x)
        assert got.shape == (1, 1280, -(-height // 32), -(-width // 32))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        mapped = torch.einsum("oi,bihw->bohw", stem.projection.weight[:, :, 0, 0], want)
        torch.testing.assert_close(whole, mapped + stem.projection.bias[:, None, None], rtol=1e-9, atol=1e-9)


def test_released_weights_are_all_used_and_checked():
    stem = efficientnet.EfficientNetLiteStem(8, "lite0")
    released_only = released("lite0")
    values = sum(t.numel() for name, t in released_only.items() if name.endswith((".weight", ".bias")))
    gains = sum(t.numel() for name, t in released_only.items() if "_bn" in name and name.endswith(".weight"))
    own = sum(p.numel() for name, p in stem.named_parameters() if not name.startswith("projection"))
    assert own == values - gains  # one bias per channel remains of every norm
    with pytest.raises(BadWeights, match=r"_conv_stem.weight must have the shape \(32, 3, 3, 3\). Got \(32, 3, 5, 5\)"):
        stem.read({**released_only, "_conv_stem.weight": torch.zeros(32, 3, 5, 5)})
    del released_only["_blocks.3._bn1.running_var"]
    with pytest.raises(BadWeights, match=r"no tensor '_blocks.3._bn1.running_var'"):
        stem.read(released_only)


@pytest.mark.parametrize(("size", "channels"), [("lite0", 112), ("lite2", 120)])
def test_tokens_from_the_stored_front_are_the_same(size, channels):
    stem = efficientnet.EfficientNetLiteStem(8, size).double().eval()
    stem.read(released(size))
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        front = stem.front(x)
        assert front.shape == (1, channels, 4, 6)
        torch.testing.assert_close(stem(front), stem(x), rtol=0, atol=0)


def hybrid(image_size=128):
    vision = VisionConfig(**{**tiny.VISION, "stem": "efficientnet-lite0", "patch_size": 32, "image_size": image_size,
                             "pool": "mean", "class_token": False})  # fmt: skip
    text = TextConfig(**{**tiny.TEXT, "tokenizer": "none"})
    return Encoder(EncoderConfig("hybrid", 16, vision, text, PreprocessConfig(size=image_size))).eval()


def test_a_hybrid_tower_has_one_token_per_32_pixels_and_trains():
    encoder = hybrid()
    for side, cells in ((128, 4), (160, 5), (224, 7)):
        output = encoder.visual.run(tiny.pixels(2, side).float())
        assert output.grid == (cells, cells)
        assert output.tokens.shape == (2, cells**2, 24)
        assert torch.isfinite(output.pooled).all()
    output.pooled.sum().backward()
    missing = [name for name, p in encoder.visual.named_parameters() if p.grad is None]
    assert not missing
    stem = encoder.visual.stem
    assert float(stem.body[0].conv.weight.grad.abs().max()) > 0


def test_a_hybrid_tower_is_saved_loaded_and_resized(tmp_path):
    encoder, x = hybrid(), tiny.pixels(2, 128).float()
    save(encoder, tmp_path / "hybrid.safetensors")
    again = load(tmp_path / "hybrid.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(again.encode_image(x), encoder.encode_image(x), rtol=0, atol=0)
        assert again.fingerprint == encoder.fingerprint
        larger = load(tmp_path / "hybrid.safetensors", image_size=160)
        assert larger.visual.grid == (5, 5)
        x = tiny.pixels(2, 160).float()
        torch.testing.assert_close(larger.encode_image(x), encoder.encode_image(x))


def test_the_stem_fixes_the_patch_size():
    with pytest.raises(ClipworksError, match=r"patch_size must be 32 with the stem 'efficientnet-lite2'. Got 16"):
        build_stem(VisionConfig(stem="efficientnet-lite2", patch_size=16))


def test_a_hybrid_tower_returns_its_earlier_maps():
    encoder, x = hybrid(), tiny.pixels(2, 128).float()
    with torch.no_grad():
        output, usual = encoder.visual.run(x, output_stem=(8, 16, 4)), encoder.visual.run(x)
        torch.testing.assert_close(output.pooled, usual.pooled, rtol=0, atol=0)
        torch.testing.assert_close(output.stem[16], encoder.visual.stem.front(x), rtol=0, atol=0)
    assert {side: tuple(m.shape) for side, m in output.stem.items()} == {
        4: (2, 24, 32, 32), 8: (2, 40, 16, 16), 16: (2, 112, 8, 8)}  # fmt: skip
    assert usual.stem == {}
    with pytest.raises(ClipworksError, match=r"output_stem must be one of 2, 4, 8, 16, 32. Got 3"):
        encoder.visual.run(x, output_stem=(3,))
    with pytest.raises(ClipworksError, match="needs a convolutional stem; 'patch' has no earlier maps"):
        tiny.encoder().visual.run(tiny.pixels(), output_stem=(8,))


SHAPES = [(1, 1, 1, 7), (3, 2, 1, 8), (5, 2, 8, 9), (5, 1, 8, 6)]


@pytest.mark.parametrize(("kernel", "stride", "groups", "side"), SHAPES)
@pytest.mark.parametrize("activate", [True, False])
def test_one_step_without_gradients(kernel, stride, groups, side, activate):
    """Where nothing is learned oneDNN computes convolution and ReLU6 in one step: the same numbers."""
    torch.manual_seed(0)
    layer = efficientnet.SameConv(8, 16, kernel, stride, groups, activate)
    layer.conv.weight.data *= 20  # some values above 6
    for rows in (0, 1, 3):
        x = torch.randn(rows, 8, side, side).contiguous(memory_format=torch.channels_last)
        learned = layer(x)
        assert learned.requires_grad
        with torch.inference_mode():
            found = layer(x)
            halves = layer.to(torch.bfloat16)(x.bfloat16())
        layer.float()
        torch.testing.assert_close(found, learned.detach(), rtol=1e-5, atol=1e-5)
        assert halves.dtype == torch.bfloat16
        assert halves.shape == found.shape
        if activate and rows:
            assert found.max() == 6


def test_the_number_of_images_is_left_open_in_an_export():
    layer = efficientnet.SameConv(8, 16, 3, 1, 1, True).eval()
    rows = {"x": {0: torch.export.Dim("rows", min=1, max=64)}}
    with torch.no_grad():
        made = torch.export.export(layer, (torch.randn(2, 8, 6, 6),), dynamic_shapes=tuple(rows.values())).module()
        for count in (1, 5):
            x = torch.randn(count, 8, 6, 6)
            torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)
