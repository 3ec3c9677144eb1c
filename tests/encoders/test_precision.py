"""Precision: what is refused, what stays exact, and that the fast path never leaks."""

import copy
import threading

import pytest
import tiny_towers as tiny
import torch

from clipworks.encoders import precision
from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.errors import ClipworksError


@pytest.fixture
def usual_matmul():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def small():
    """Large enough that rounding averages out as in a real tower."""
    vision = VisionConfig(image_size=64, patch_size=16, width=128, layers=4, heads=4, mlp_width=256)
    text = TextConfig(vocab_size=50, context_length=12, width=96, layers=2, heads=4, mlp_width=192, eot_id=49)
    return Encoder(EncoderConfig("small", 64, vision, text, PreprocessConfig(size=64))).eval()


def test_names():
    assert precision.choose("auto", "cpu") == "fp32"
    assert precision.choose("bf16", "cpu") == "bf16"
    assert precision.choose("fp16", "cuda") == "fp16"
    with pytest.raises(ClipworksError, match=r"fp16' is not offered on the CPU.*Use 'bf16' or 'fp32'"):
        small().to_precision("fp16")
    with pytest.raises(ClipworksError, match=r"precision must be one of .*Got 'bf-16'.*Did you mean 'bf16'"):
        small().to_precision("bf-16")


def test_bf16_weights_give_nearly_the_same_vectors():
    exact, half = small(), small().to_precision("bf16")
    pixels, tokens = tiny.pixels(6, 64).float(), tiny.tokens((5, 9, 12))
    assert half.precision == "bf16"
    assert half.visual.blocks[0].mlp.up.weight.dtype == torch.bfloat16
    assert half.log_scale.dtype == torch.float32
    assert half.logit_scale == exact.logit_scale
    assert half.fingerprint != exact.fingerprint
    for a, b in (
        (exact.images(pixels), half.images(pixels)),
        (exact.encode_text(tokens), half.encode_text(tokens)),
    ):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b.norm(dim=1), torch.ones(len(b)), atol=1e-6, rtol=0)
        assert (a * b).sum(1).min() > 0.9995
        assert not torch.equal(a, b)


def test_bf16_runs_every_seam():
    half = small().to_precision("bf16")
    pixels = tiny.pixels(2, 64).float()
    seams = {"prompts": {1: torch.zeros(2, 128)}, "attention": {0: "vv", 1: "mixed:0.5", 3: torch.eye(19)},
             "output_attention": (0, 3), "mask": torch.ones(2, 16), "output_layers": (2,)}  # fmt: skip
    assert half.encode_image(pixels, **seams).dtype == torch.float32
    assert half.images(tiny.pixels(2, 96).float()).isfinite().all()
    assert half.visual.run(pixels.bfloat16(), output_attention=(0,)).attentions[0].dtype == torch.float32


def test_batch_norms_stay_in_float32():
    vision = VisionConfig(kind="resnet", image_size=64, patch_size=32, width=8, layers=(1, 1, 1, 1), heads=4,
                          activation="relu", pool="attention", class_token=False)  # fmt: skip
    encoder = Encoder(EncoderConfig("r", 64, vision, small().config.text, PreprocessConfig(size=64)))
    tiny.shake(encoder, std=0.1).eval()
    exact = encoder.images(tiny.pixels(3, 64).float())
    encoder.to_precision("bf16")
    assert encoder.visual.bn1.running_var.dtype == encoder.visual.bn1.weight.dtype == torch.float32
    assert encoder.visual.conv1.weight.dtype == torch.bfloat16
    assert (encoder.images(tiny.pixels(3, 64).float()) * exact).sum(1).min() > 0.999


def test_there_and_back_keeps_what_bf16_keeps():
    encoder = small().to_precision("bf16")
    weights = copy.deepcopy(encoder.state_dict())
    encoder.to_precision("fp32")
    assert encoder.precision == "fp32"
    assert all(torch.equal(w.float(), encoder.state_dict()[n].float()) for n, w in weights.items())


def test_the_fast_path_is_exact_here_or_not_used(usual_matmul):
    error = precision.fast_matmul_error()
    with precision.fast_matmul() as used:
        assert used == (error < 1e-5)
        assert torch.get_float32_matmul_precision() == ("medium" if used else "highest")
        x, w = torch.randn(33, 257), torch.randn(129, 257)
        product = torch.nn.functional.linear(x, w).double()
    exact = x.double() @ w.double().T
    assert (product - exact).norm() / exact.norm() < 1e-5
    assert torch.get_float32_matmul_precision() == "highest"
    assert precision.fast_matmul_error.cache_info().misses == 1


def test_the_fast_path_is_refused_when_the_probe_fails(usual_matmul, monkeypatch):
    monkeypatch.setattr(precision, "fast_matmul_error", lambda: 3e-3)  # a CPU whose "medium" is true bf16
    with precision.fast_matmul() as used:
        assert not used
        assert torch.get_float32_matmul_precision() == "highest"


def test_the_fast_path_never_leaks(usual_matmul, monkeypatch):
    monkeypatch.setattr(precision, "fast_matmul_error", lambda: 0.0)
    with pytest.raises(KeyError), precision.fast_matmul(), precision.fast_matmul():
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"
    with precision.fast_matmul("cuda") as used:
        assert not used
    # two threads whose blocks overlap without being nested: first in, first out
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first():
        with precision.fast_matmul():
            first_in.set()
            second_in.wait(5)
        first_out.set()

    def second():
        first_in.wait(5)
        with precision.fast_matmul():
            second_in.set()
            first_out.wait(5)
            seen.append(torch.get_float32_matmul_precision())

    seen = []
    threads = [threading.Thread(target=f) for f in (first, second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(10)
    assert seen == ["medium"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_inference_uses_the_fast_path_and_training_code_does_not(usual_matmul, monkeypatch):
    monkeypatch.setattr(precision, "fast_matmul_error", lambda: 0.0)
    encoder, seen = small(), []
    encoder.visual.norm_post.register_forward_hook(
        lambda *_: seen.append(torch.get_float32_matmul_precision())
    )
    encoder.images(tiny.pixels(1, 64).float())
    encoder.encode_image(tiny.pixels(1, 64).float())
    assert seen == ["medium", "highest"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["bf16", "fp16", "auto"])
def test_half_precision_on_cuda(name):
    exact, pixels, tokens = small(), tiny.pixels(6, 64).float(), tiny.tokens((5, 9, 12))
    half = small().to("cuda").to_precision(name)
    assert half.precision in ("bf16", "fp16")
    assert (half.images(pixels) * exact.images(pixels)).sum(1).min() > 0.9995
    texts = half.encode_text(tokens.cuda()).cpu()
    assert (texts * exact.encode_text(tokens)).sum(1).min() > 0.9995
