"""The library's own format: everything travels, equal bytes for equal encoders, eight-bit rows, faults."""

import dataclasses
import json
import os
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_formats_open_clip import word_tokenizer
from tiny_towers import SIGLIP_TEXT, SIGLIP_VISION, pixels, shake
from torch import nn

from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.formats import native
from clipworks.encoders.layers import swap
from clipworks.encoders.loading import load, save
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.tokenizers.pretrained import NoTokenizer, PretrainedTokenizer
from clipworks.errors import BadWeights, ClipworksError

SMALL = dict(width=24, layers=2, heads=2, mlp_width=40)
PREPROCESS = PreprocessConfig(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "squash", "none")


def encoder(kind="clip", tokenizer=None, **vision):
    if kind == "siglip":
        v = VisionConfig(**{**SMALL, **SIGLIP_VISION, "image_size": 32, "patch_size": 8, **vision})
        t = TextConfig(**{**SMALL, **SIGLIP_TEXT, "vocab_size": 40, "context_length": 8, "eot_id": 1})
        config = EncoderConfig("tiny", 24, v, t, PREPROCESS, 2.3, logit_bias=-10.0)
    else:
        shape = SMALL if kind == "clip" else dict(kind="resnet", width=16, layers=(1, 1, 1, 1), heads=8,
                                                  activation="relu", pool="attention", class_token=False)  # fmt: skip
        size = dict(image_size=32, patch_size=8) if kind == "clip" else dict(image_size=64)
        v = VisionConfig(**{**shape, **size, **vision})
        t = TextConfig(**SMALL, vocab_size=60, context_length=12, eot_id=59)
        config = EncoderConfig("tiny", 16, v, t, PREPROCESS)
    return shake(Encoder(config, tokenizer)).eval()


def rewrite(path, metadata=None, **tensors):
    """Change the metadata or some tensors (None drops one) of a file."""
    values = load_file(path)
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["clipworks"])
    values = {n: t for n, t in {**values, **tensors}.items() if t is not None}
    text = metadata(record) if callable(metadata) else record
    save_file(values, path, {"clipworks": text if isinstance(text, str) else json.dumps(text)})


@pytest.mark.parametrize("kind", ["clip", "siglip", "resnet"])
def test_everything_travels(tmp_path, kind):
    made = encoder(kind)
    path = save(made, tmp_path / "folder" / "tiny.safetensors")
    back = load(path)
    assert back.config == made.config
    assert back.fingerprint == made.fingerprint
    assert not back.training
    assert all(p.requires_grad for p in back.parameters())
    for name, tensor in made.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    with torch.no_grad():
        images = pixels(2, made.image_size).float()
        torch.testing.assert_close(back.encode_image(images), made.encode_image(images))
    assert os.listdir(path.parent) == ["tiny.safetensors"]


def test_equal_encoders_give_equal_bytes(tmp_path):
    one, two = (save(encoder(), tmp_path / name).read_bytes() for name in ("a", "b"))
    assert one == two
    assert save(load(tmp_path / "a"), tmp_path / "c").read_bytes() == one


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_kept_in_the_file_and_chosen_on_loading(tmp_path, precision):
    made = encoder()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    made.to(dtype)
    path = save(made, tmp_path / "half.safetensors")
    assert load_file(path)["text.positions"].dtype == dtype
    assert load(path).dtype == torch.float32
    torch.testing.assert_close(load(path).text.positions, made.text.positions.float(), rtol=0, atol=0)
    assert load(path, precision="bf16").dtype == torch.bfloat16


def test_tokenizers_travel(tmp_path):
    word_tokenizer(tmp_path / "t")
    words = PretrainedTokenizer(tmp_path / "t" / "tokenizer.json", pad_id=1, clean="canonicalize", fixed_length=True)
    none = NoTokenizer("Put it there.", vocab_size=40, eot_id=1, pad_id=1, fixed_length=True)
    for kind, tokenizer in (("siglip", words), ("siglip", none), ("clip", CLIPTokenizer(pad_id=3)), ("clip", None)):
        made = encoder(kind, tokenizer)
        back = load(save(made, tmp_path / "x.safetensors"))
        assert type(back.tokenizer) is type(tokenizer)
        assert back.fingerprint == made.fingerprint
    back = load(save(encoder("siglip", words), tmp_path / "y.safetensors"))
    assert back.tokenize(["A cat!"]).tolist() == [[2, 3, 1, 1, 1, 1, 1, 1]]
    with pytest.raises(ClipworksError, match=r"Put it there"):
        load(save(encoder("siglip", none), tmp_path / "z.safetensors")).texts("a")


def test_changed_preprocessing_is_saved(tmp_path):
    made = encoder()
    made.preprocess = dataclasses.replace(made.preprocess, config=PreprocessConfig(32))
    assert load(save(made, tmp_path / "x.safetensors")).config.preprocess == PreprocessConfig(32)


def test_another_image_size(tmp_path):
    path = save(encoder(), tmp_path / "x.safetensors")
    large = load(path, image_size=48)
    assert (large.image_size, large.preprocess.config.size, len(large.visual.positions)) == (48, 48, 37)
    assert load(save(large, tmp_path / "y.safetensors")).fingerprint == large.fingerprint
    for wrong in (4, 40.0):
        with pytest.raises(ClipworksError, match=r"image_size must"):
            load(path, image_size=wrong)


# -- eight bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip", "resnet"])
def test_eight_bits_against_numpy(tmp_path, kind):
    made = encoder(kind)
    path = save(made, tmp_path / "q.safetensors", quantize="int8")
    stored, back = load_file(path), load(path).state_dict()
    count = 0
    for name, tensor in made.state_dict().items():
        if f"{name}.scale" not in stored:
            assert torch.equal(back[name], tensor)
            continue
        count += 1
        rows = tensor.numpy().reshape(len(tensor), -1)
        scale = np.abs(rows).max(1) / 127
        whole = np.rint(rows / scale[:, None]).astype(np.int8)
        assert stored[name].dtype == torch.int8
        assert stored[name].shape == tensor.shape
        assert np.abs(stored[name].numpy().reshape(whole.shape).astype(int) - whole).max() <= 1
        error = np.abs(back[name].numpy().reshape(rows.shape) - rows)
        assert (error <= scale[:, None] * 0.5001).all()
        np.testing.assert_allclose(back[name].numpy().reshape(rows.shape),
                                   stored[name].numpy().reshape(rows.shape) * scale[:, None], rtol=1e-5)  # fmt: skip
    matrices = [n for n, t in made.state_dict().items() if n.endswith(".weight") and t.ndim > 1]
    assert count == len(matrices) > 10
    images = pixels(4, made.image_size).float()
    with torch.no_grad():
        cosine = (load(path).encode_image(images) * made.encode_image(images)).sum(1)
    assert cosine.min() > 0.999


def test_eight_bits_are_a_fixed_point_and_small(tmp_path):
    made = encoder(width=96, heads=4, mlp_width=384)
    full = save(made, tmp_path / "f.safetensors").stat().st_size
    path = save(made, tmp_path / "q.safetensors", quantize="int8")
    assert path.stat().st_size < 0.45 * full
    again = load(save(load(path), tmp_path / "q2.safetensors", quantize="int8"))
    for name, tensor in load(path).state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)


def test_a_scale_in_half_precision_is_read(tmp_path):
    path = save(encoder(), tmp_path / "q.safetensors", quantize="int8")
    exact = load(path).state_dict()
    halves = {n: t.half() for n, t in load_file(path).items() if n.endswith(".scale")}
    rewrite(path, **halves)
    for name, tensor in load(path).state_dict().items():
        torch.testing.assert_close(tensor, exact[name], rtol=1e-3, atol=1e-6)


def test_a_row_of_zeros(tmp_path):
    made = encoder()
    with torch.no_grad():
        made.text.projection.weight[3] = 0
    back = load(save(made, tmp_path / "q.safetensors", quantize="int8"))
    assert not back.text.projection.weight[3].any()


@pytest.mark.parametrize("scale", [None, torch.ones(5), torch.ones(16, 1), torch.ones(16, dtype=torch.int32)])
def test_faulty_scales(tmp_path, scale):
    path = save(encoder(), tmp_path / "q.safetensors", quantize="int8")
    rewrite(path, **{"text.projection.weight.scale": scale})
    with pytest.raises(BadWeights, match=r"text.projection.weight is int8 .* one number per row. Found"):
        load(path)


# -- faults --------------------------------------------------------------------------------------------------------


def test_changed_modules_are_refused(tmp_path):
    made = encoder()
    swap(made, "text.blocks.0.attention.q", nn.Sequential(made.text.blocks[0].attention.q))
    with pytest.raises(ClipworksError, match=r"merge or undo.*Added text.blocks.0.attention.q.0.bias"):
        save(made, tmp_path / "x.safetensors")
    made = encoder()
    swap(made, "text.projection", nn.Linear(24, 17, bias=False))
    with pytest.raises(ClipworksError, match=r"other shapes text.projection.weight"):
        save(made, tmp_path / "x.safetensors")
    with pytest.raises(ClipworksError, match=r"must be a CLIPTokenizer or PretrainedTokenizer to be saved. Got object"):
        save(encoder(tokenizer=object()), tmp_path / "x.safetensors")
    with pytest.raises(ClipworksError, match=r"quantize must be one of None, 'int8'. Got 'int4'"):
        save(encoder(), tmp_path / "x.safetensors", quantize="int4")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ClipworksError, match=r"cannot be written"):
        save(encoder(), tmp_path / "file" / "x.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(encoder(), tmp_path / "x.safetensors")
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ClipworksError, match=r"No space left.*bytes needed"):
        save(shake(encoder(), seed=5), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_files_have_usual_permissions(tmp_path):
    mask = os.umask(0o022)
    try:
        path = save(encoder(), tmp_path / "x.safetensors")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_missing_extra_and_misshapen_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    for change, reason in (
        ({"text.norm.bias": None}, "missing text.norm.bias, unexpected none"),
        ({"text.extra": torch.zeros(2)}, "missing none, unexpected text.extra"),
        ({"text.norm.bias": torch.zeros(3)}, r"text.norm.bias is \(3,\), expected \(24,\)"),
        ({"text.norm.bias": torch.full((24,), torch.nan)}, "text.norm.bias holds numbers that are not finite"),
        ({"text.norm.bias": torch.zeros(24, dtype=torch.int64)}, "has the type torch.int64"),
    ):
        save(encoder(), path)
        rewrite(path, **change)
        with pytest.raises(BadWeights, match=reason) as caught:
            load(path)
        assert str(path) in str(caught.value)


def text(**changes):
    """Metadata whose text tower is described otherwise."""
    return lambda r: {**r, "config": {**r["config"], "text": {**r["config"]["text"], **changes}}}


@pytest.mark.parametrize(("change", "reason"), [
    (lambda r: "{", "missing or damaged"),
    (lambda r: [1], "missing or damaged"),
    (lambda r: {**r, "version": 2}, "written in version 2 of the format, this library reads 1"),
    (lambda r: {**r, "config": 3}, "no configuration"),
    (lambda r: {**r, "config": {**r["config"], "visionn": {}}}, "no field 'visionn'.*Did you mean 'vision'"),
    (text(layers=10**9), "cannot be the layers"),
    (text(layers=2.0), "TextConfig.layers must be int.* Got 2.0"),
    (text(mlp_width=-1), "can be built from"),
    (text(norm_eps="small"), "TextConfig.norm_eps must be float. Got 'small'"),
    (lambda r: {**r, "config": {**r["config"], "dim": 10**30}}, "dim must be int, finite and below"),
    (lambda r: {**r, "tokenizer": {"kind": "sentencepiece"}}, "unknown kind of tokenizer 'sentencepiece'"),
    (lambda r: {**r, "tokenizer": {"kind": "json", "file": "{", "options": {}}}, "tokenizer.json cannot be read"),
    (lambda r: {**r, "tokenizer": {"kind": "json"}}, "tokenizer entry is damaged"),
    (lambda r: {**r, "tokenizer": 7}, "tokenizer entry is damaged"),
])  # fmt: skip
def test_damaged_metadata(tmp_path, change, reason):
    path = save(encoder(), tmp_path / "x.safetensors")
    rewrite(path, change)
    with pytest.raises(BadWeights, match=reason) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_truncation_at_every_tenth(tmp_path):
    path = save(encoder(), tmp_path / "x.safetensors")
    data = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(data[: len(data) * tenth // 10])
        with pytest.raises(BadWeights, match=r"x\.safetensors"):
            load(path)


def test_doctest():
    import doctest

    assert doctest.testmod(native).attempted > 0
    assert doctest.testmod(native).failed == 0
