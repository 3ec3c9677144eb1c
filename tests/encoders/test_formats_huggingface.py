"""Folders written by transformers, loaded by us: features and logits equal within 1e-5; faults are named."""

import json

import pytest
import torch
from plain_clip import randomise, token_rows
from test_formats_open_clip import word_tokenizer

from clipworks.encoders.formats import huggingface
from clipworks.encoders.loading import load
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.errors import BadWeights, ClipworksError

transformers = pytest.importorskip("transformers")

CLIP_IMAGES = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3,
               "rescale_factor": 1 / 255, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32},
               "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}  # fmt: skip
SIGLIP_IMAGES = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255,
                 "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip


def clip(act="quick_gelu", vocab=300, **text):
    return randomise(transformers.CLIPModel(transformers.CLIPConfig(
        projection_dim=24,
        vision_config=dict(hidden_size=48, intermediate_size=100, num_hidden_layers=3, num_attention_heads=4,
                           image_size=32, patch_size=8, hidden_act=act),
        text_config=dict(vocab_size=vocab, hidden_size=32, intermediate_size=72, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=16, hidden_act=act,
                         **{"eos_token_id": vocab - 1, "bos_token_id": vocab - 2, "pad_token_id": 1, **text}),
    )))  # fmt: skip


def siglip(act="gelu_pytorch_tanh", image=32):
    shape = dict(hidden_size=48, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4, hidden_act=act)
    return randomise(transformers.SiglipModel(transformers.SiglipConfig(
        vision_config=dict(**shape, image_size=image, patch_size=8),
        text_config=dict(**shape, vocab_size=40, max_position_embeddings=8),
    )))  # fmt: skip


def folder(path, model, images=CLIP_IMAGES, **options):
    model.save_pretrained(path, **options)
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    return path


def edit(file, **changes):
    record = json.loads(file.read_text())
    for key, value in changes.items():
        part = record
        *way, last = key.split("__")
        for step in way:
            part = part[step]
        part[last] = value
    file.write_text(json.dumps(record))


def same(encoder, model, tokens, image=32):
    pixels = torch.randn(3, 3, image, image, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model(input_ids=tokens, pixel_values=pixels)
        images, texts, scale = encoder(pixels, tokens)
        torch.testing.assert_close(images, want.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(texts, want.text_embeds, atol=1e-5, rtol=0)
        logits = scale * images @ texts.T + (0 if encoder.bias is None else encoder.bias)
        torch.testing.assert_close(logits, want.logits_per_image, atol=1e-5 * float(scale), rtol=0)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_clip(tmp_path, act):
    model = clip(act)
    encoder = load(folder(tmp_path / "m", model))
    same(encoder, model, token_rows(3, 16, 2, 290, 299))
    assert (encoder.config.vision.activation, encoder.dim) == (act.replace("_pytorch", ""), 24)
    preprocess = encoder.config.preprocess
    assert (preprocess.size, preprocess.mean, preprocess.std) == (32, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    assert (preprocess.resize, preprocess.crop, preprocess.interpolation) == ("shortest", "center", "bicubic")


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu"])
def test_siglip(tmp_path, act):
    model = siglip(act)
    encoder = load(folder(tmp_path / "m", model, SIGLIP_IMAGES))
    same(encoder, model, token_rows(3, 8, 2, 40, 1, pad=1))
    preprocess = encoder.config.preprocess
    assert (preprocess.size, preprocess.resize, preprocess.crop) == (32, "squash", "none")
    with pytest.raises(ClipworksError, match=r"Put the tokenizer.json of the model into"):
        encoder.texts("a cat")


def test_siglip_with_its_tokenizer(tmp_path):
    model = siglip()
    path = folder(tmp_path / "m", model, SIGLIP_IMAGES)
    word_tokenizer(path)
    encoder = load(path)
    assert encoder.tokenize(["A cat!"]).tolist() == [[2, 3, 1, 1, 1, 1, 1, 1]]
    with torch.no_grad():
        want = model.get_text_features(torch.tensor([[2, 3, 1, 1, 1, 1, 1, 1]]))
        want = getattr(want, "pooler_output", want)
    torch.testing.assert_close(encoder.texts("a cat", normalize=False), want, atol=1e-5, rtol=1e-5)


def test_real_vocabulary_gets_clips_tokenizer_and_equal_text_vectors(tmp_path):
    model = clip(vocab=49408)
    encoder = load(folder(tmp_path / "m", model))
    assert isinstance(encoder.tokenizer, CLIPTokenizer)
    tokens = torch.tensor([[49406, 320, 2368, *[49407] * 13]])  # padded with the end token, as transformers does
    with torch.no_grad():
        want = model.get_text_features(tokens)
        want = getattr(want, "pooler_output", want)
    torch.testing.assert_close(encoder.texts("a cat", normalize=False), want, atol=1e-5, rtol=1e-5)


def test_shards_and_pickled_weights(tmp_path):
    model, tokens = clip(), token_rows(3, 16, 2, 290, 299)
    path = folder(tmp_path / "shards", model, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    same(load(path), model, tokens)
    with pytest.raises(ClipworksError, match=r"sha256 needs a single weights file"):
        load(path, sha256="0" * 64)
    victim = sorted(path.glob("*.safetensors"))[1]
    victim.rename(tmp_path / "gone")
    with pytest.raises(BadWeights, match=rf"shard '{victim.name}' is missing"):
        load(path)
    path = folder(tmp_path / "bin", model)
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    same(load(path), model, tokens)
    same(load(path / "pytorch_model.bin"), model, tokens)


def test_half_precision_weights(tmp_path):
    model = clip().half()
    encoder = load(folder(tmp_path / "m", model))
    assert encoder.dtype == torch.float32
    same(encoder, model.float(), token_rows(3, 16, 2, 290, 299))


def test_old_files_mean_the_largest_id_by_end_token_2(tmp_path):
    path = folder(tmp_path / "m", clip())
    edit(path / "config.json", text_config__eos_token_id=2)
    assert load(path).config.text.eot_id == 299


def test_what_config_json_leaves_out_is_the_classes_default(tmp_path):
    """transformers' own defaults, read from its classes."""
    for kind, classes in (("clip", (transformers.CLIPTextConfig, transformers.CLIPVisionConfig)),
                          ("siglip", (transformers.SiglipTextConfig, transformers.SiglipVisionConfig))):  # fmt: skip
        for part, cls in zip(("text", "vision"), classes, strict=True):
            theirs = cls().to_dict()
            ours = {k: v for k, v in huggingface.DEFAULTS[kind][part].items()}
            assert {k: theirs[k] for k in ours} == ours
    path = folder(tmp_path / "m", clip())
    record = json.loads((path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        record[part].pop("hidden_act")
        record[part].pop("layer_norm_eps")
    (path / "config.json").write_text(json.dumps(record))
    assert load(path).config.vision.activation == "quick_gelu"


def test_the_older_twin_of_a_section_counts(tmp_path):
    path = folder(tmp_path / "m", clip("gelu"))
    record = json.loads((path / "config.json").read_text())
    edit(path / "config.json", vision_config__hidden_act="quick_gelu", vision_config_dict=record["vision_config"])
    config = load(path).config
    theirs = transformers.CLIPConfig.from_pretrained(path)
    assert (config.vision.activation, theirs.vision_config.hidden_act) == ("gelu", "gelu")


def test_processor_config_of_newer_files(tmp_path):
    path = folder(tmp_path / "m", clip())
    (path / "preprocessor_config.json").rename(tmp_path / "old")
    with pytest.raises(BadWeights, match=r"no preprocessor_config.json"):
        load(path)
    (path / "processor_config.json").write_text(json.dumps({"image_processor": CLIP_IMAGES}))
    assert load(path).config.preprocess.mean == (0.48, 0.46, 0.41)


IMAGE_FAULTS = {
    "resample": (1, "resample must be 2"), "do_normalize": (False, "must be on"),
    "rescale_factor": (1.0, "rescale_factor must be 1/255"), "crop_size": (28, "must be the same"),
    "size": ({"height": 32, "width": 48}, "made square"), "image_mean": (None, "preprocessor_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("key", IMAGE_FAULTS)
def test_preprocessing_that_cannot_be_followed(tmp_path, key):
    value, reason = IMAGE_FAULTS[key]
    path = folder(tmp_path / "m", clip(), {**CLIP_IMAGES, key: value})
    with pytest.raises(BadWeights, match=reason):
        load(path)


CONFIG_FAULTS = {
    "model_type": ("blip", "model_type must be 'clip' or 'siglip'. Got 'blip'"),
    "text_config__hidden_act": ("silu", "hidden_act must be one of .* Got 'silu'"),
    "vision_config__num_attention_heads": (5, "heads must divide the width 48. Got 5"),
    "vision_config__image_size": ([32, 64], "image_size must be one number"),
    "vision_config__num_hidden_layers": (4, "missing vision_model.encoder.layers.3.self_attn"),
    "vision_config__layer_norm_eps": ("small", "config.json"),
    "text_config__num_hidden_layers": (1, "unexpected text_model.encoder.layers.1.layer_norm1.bias"),
    "projection_dim": (23, r"visual.projection.weight is \(24, 48\), expected \(23, 48\)"),
    "text_config": ("none", "config.json"),
    "text_config__hidden_size": ("32", "config.json"),
    "vision_config__intermediate_size": (-5, "no encoder can be built|expected"),
    "text_config__num_attention_heads": (0, "heads must lie in"),
}


@pytest.mark.parametrize("key", CONFIG_FAULTS)
def test_configuration_faults_are_named(tmp_path, key):
    value, reason = CONFIG_FAULTS[key]
    path = folder(tmp_path / "m", clip())
    edit(path / "config.json", **{key: value})
    with pytest.raises(BadWeights, match=reason):
        load(path)


def test_missing_configuration_and_damaged_weights(tmp_path):
    path = folder(tmp_path / "m", clip())
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(BadWeights, match=r"cut short"):
        load(path)
    (path / "model.safetensors").write_bytes(data)
    (path / "config.json").unlink()
    with pytest.raises(BadWeights, match=r"config.json must lie beside them"):
        load(path)
